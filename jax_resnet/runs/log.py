"""Report a run: a bar or lines, metrics.jsonl, TensorBoard events, a trace, result.json."""

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jax_resnet.errors import UserError, unwritable
from jax_resnet.runs.console import Screen, percent, shown
from jax_resnet.runs.curves import draw_curves
from jax_resnet.runs.metrics_reader import FILE, read_metrics
from jax_resnet.runs.paths import AnyPath, is_remote, write
from jax_resnet.runs.trace import Trace
from jax_resnet.runs.workdir import write_json

MAX_REPORTED_IMAGES = 20


def _summary_writer(folder: Path, purge_step: int) -> Any:
    """Make TensorBoard's event writer, but keep tensorboardX from importing torch."""
    hide = "torch" not in sys.modules
    if hide:
        # An import of torch now fails, as if it were not installed.
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            # Another training's thread may have removed it already.
            sys.modules.pop("torch", None)
    return SummaryWriter(str(folder), purge_step=purge_step)


class Telemetry:
    """Report one run from process 0; on the others every method does nothing.

    `steps` is the number of updates of the training, `epoch` returns the epoch of a step, and
    `profile` is config.profile. The run resumes from `start_step`: records after it, by a process
    that died, are dropped, so that each step is recorded once.
    """

    def __init__(
        self,
        workdir: AnyPath,
        steps: int,
        epoch: Callable[[int], float],
        *,
        start_step: int = 0,
        profile: str | None = None,
    ):
        self.active = jax.process_index() == 0
        self.workdir, self._epoch, self._step = workdir, epoch, start_step
        self._broken: set[tuple[str, str]] = set()  # split, name of the image
        self._began = time.monotonic()
        self._before = 0.0  # seconds, before the run was resumed
        self._writers: dict[str, Any] = {}
        self.trace = Trace(None, profile, steps)
        self.screen = Screen(steps, start_step, quiet=not self.active)
        if not self.active:
            return
        rows: list[dict[str, Any]] = []
        if start_step:
            rows = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        if rows:
            self._before = rows[-1]["seconds"]
        self._broken = {(row["split"], row["name"]) for row in rows if row["kind"] == "broken"}
        self._scratch: Path | None = None
        if is_remote(workdir):
            # An object store cannot append to a file, so the files grow in a local folder.
            self._scratch = Path(tempfile.mkdtemp(prefix="jax_resnet-"))
        folder = self._scratch or workdir
        self.trace = Trace(folder, profile, steps)
        self._uploaded: dict[Path, int] = {}  # bytes
        write(folder / FILE, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._lines = (folder / FILE).open("a", buffering=1)
        self._folder = folder / "tensorboard"
        self._purge_step = start_step + 1
        self._writer("train")

    def _writer(self, name: str) -> Any:
        """Return the writer of "train" or of a split, each a TensorBoard run: curves overlay."""
        if name not in self._writers:
            try:
                self._writers[name] = _summary_writer(self._folder / name, self._purge_step)
            except OSError as e:
                raise unwritable(self._folder, e) from None
        return self._writers[name]

    @property
    def seconds(self) -> float:
        """Return the wall seconds of the run, including those before it was resumed."""
        return self._before + time.monotonic() - self._began

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.trace.close()
        self.screen.close()
        if self.active:
            # After an error, that error is the one to report.
            ignored = (OSError,) if error else ()
            for file in (self._lines, *self._writers.values()):
                with contextlib.suppress(*ignored):
                    file.close()
            if self._scratch and self.upload(at_end=True):
                shutil.rmtree(self._scratch, ignore_errors=True)

    def upload(self, *, at_end: bool = False) -> bool:
        """Copy files that have grown to a remote workdir; report a failure and return False."""
        if not self.active or self._scratch is None:
            return True
        if not at_end:
            for writer in self._writers.values():
                writer.flush()
        try:
            for file in filter(Path.is_file, self._scratch.rglob("*")):
                size = file.stat().st_size
                if self._uploaded.get(file) != size:
                    write(self.workdir / str(file.relative_to(self._scratch)), file.read_bytes())
                    self._uploaded[file] = size
        except UserError as e:
            # The run goes on; only a checkpoint that cannot be written ends it.
            outcome = f"left in {self._scratch}" if at_end else "tried again at the next save"
            self.say(f"{e}; {outcome}")
            return False
        return True

    def say(self, text: str) -> None:
        """Print a line."""
        self.screen.say(text)

    def train(
        self,
        step: int,
        *,
        metrics: Mapping[str, float],
        learning_rate: float,
        images_per_second: float | None = None,
        input_wait: float | None = None,
        skipped: int = 0,
    ) -> None:
        """Report means over the steps since the last call; the first, which compiles, has no speed.

        `input_wait` is the share of the time spent waiting for batches. The means leave out the
        `skipped` updates; `metrics` is empty if all were skipped.
        """
        speed = ""
        if images_per_second is not None and input_wait is not None:
            speed = f"{images_per_second:,.0f} images/s  input wait {percent(input_wait, 1)}"
        facts = [f"epoch {self._epoch(step):.2f}"]
        facts += [f"{name.removesuffix('_top1')} {shown(name, value)}" for name, value in metrics.items()]
        if not metrics:
            facts.append("no update")
        if skipped:
            facts.append(f"{skipped:,} skipped")
        self.screen.train(step, [*facts, f"lr {learning_rate:.3g}"], speed)
        self._record(
            "train",
            step,
            **metrics,
            learning_rate=learning_rate,
            images_per_second=images_per_second,
            input_wait=input_wait and round(input_wait, 5),
            skipped=skipped or None,
        )

    def evaluation(self, step: int, split: str, metrics: dict[str, Any]) -> None:
        """Report the metrics of a split."""
        self.screen.evaluation(step, self._epoch(step), split, metrics)
        self._record("eval", step, split=split, **metrics)

    def saving(self, step: int, blocked: float, seconds: float) -> None:
        """Report how many seconds saving has blocked the loop, of the `seconds` of training."""
        if blocked > 0:
            self.say(f"saving took {blocked:.2f} s, {percent(blocked / seconds, 2)} of the time")
            self._record("save", step, blocked_seconds=round(blocked, 4), share=round(blocked / seconds, 6))

    def broken(self, split: str, name: str, reason: str) -> None:
        """Report an undecodable image once. Its reader prints the first MAX_REPORTED_IMAGES."""
        if (split, name) in self._broken:
            return
        self._broken.add((split, name))
        text = f"{split} split: {name}: {reason}"
        excess = len(self._broken) - MAX_REPORTED_IMAGES
        if excess == 1:
            text = f"further images that cannot be decoded are named in {self.workdir / FILE} only"
        if excess <= 1 and self.active:
            self.say(text)
        elif excess <= 1:
            print(f"process {jax.process_index()}: {text}", file=sys.stderr)
        self._record("broken", self._step, split=split, name=name, reason=reason)

    def result(self, step: int, splits: dict[str, Any], config: dict[str, Any]) -> None:
        """Write result.json and curves.png; say how many images were broken."""
        if self.active:
            result = {"step": step, "splits": splits, "wall_seconds": round(self.seconds, 1), "config": config}
            write_json(self.workdir / "result.json", result)
            draw_curves(read_metrics(self._scratch or self.workdir), self.workdir / "curves.png")
        if counts := Counter(split for split, _ in self._broken):
            listed = ", ".join(f"{n:,} of {split}" for split, n in sorted(counts.items()))
            self.say(f"images that cannot be decoded: {listed}")

    def _record(self, kind: str, step: int, **values: Any) -> None:
        self._step = step
        if not self.active:
            return
        row = {"step": step, "kind": kind, "seconds": round(self.seconds, 3), **values}
        try:
            self._lines.write(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n")
        except OSError as e:
            raise unwritable(self.workdir / FILE, e) from None
        if kind in ("train", "eval"):
            writer = self._writer(values.get("split", kind))
            for name, value in values.items():
                # Counts say nothing as curves.
                if isinstance(value, float):
                    writer.add_scalar(name, value, step)
