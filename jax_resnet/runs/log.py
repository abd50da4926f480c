"""What a run shows and leaves behind: a bar or lines, metrics.jsonl, TensorBoard events, a trace, result.json."""

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

LINES = 20  # of broken images


def _summary_writer(folder: Path, purge_step: int) -> Any:
    """TensorBoard's event writer. tensorboardX would load torch, where that is installed, only to know its tensors."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # importing it now fails, as where it is absent
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            sys.modules.pop("torch", None)  # another training's thread may have done so
    return SummaryWriter(str(folder), purge_step=purge_step)


class Telemetry:
    """Reports one run from process 0; on the others every method does nothing.

    `steps` are the updates of the whole training, `epoch` gives the epoch of a step. `start_step` is the step the run
    goes on from: what was recorded after it, by a process that died, is dropped, so each step stands once. `profile` is
    config.profile.
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
        self._broken: set[tuple[str, str]] = set()
        self._began, self._before = time.monotonic(), 0.0
        self._writers: dict[str, Any] = {}
        self.trace = Trace(None, profile, steps)
        self.screen = Screen(steps, start_step, quiet=not self.active)
        if not self.active:
            return
        rows = [r for r in read_metrics(workdir) if r["step"] <= start_step] if start_step else []
        self._before = rows[-1]["seconds"] if rows else 0.0
        self._broken = {(r["split"], r["name"]) for r in rows if r["kind"] == "broken"}
        # What is appended to is kept here, for an object store takes whole files.
        self._scratch = Path(tempfile.mkdtemp(prefix="jax_resnet-")) if is_remote(workdir) else None
        folder = self._scratch or workdir  # of this machine
        self.trace = Trace(folder, profile, steps)
        self._uploaded: dict[Path, int] = {}
        write(folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())
        self._lines = (folder / "metrics.jsonl").open("a", buffering=1)
        self._folder, self._purge_step = folder / "tensorboard", start_step + 1
        self._writer("train")

    def _writer(self, name: str) -> Any:
        """Return the writer of a run of TensorBoard: training and each split are one, so that their curves overlay."""
        if name not in self._writers:
            try:
                self._writers[name] = _summary_writer(self._folder / name, self._purge_step)
            except OSError as e:
                raise unwritable(self._folder, e) from None
        return self._writers[name]

    @property
    def seconds(self) -> float:
        """Wall seconds of the run, those before it was resumed included."""
        return self._before + time.monotonic() - self._began

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.trace.__exit__()
        self.screen.close()
        if self.active:
            for file in (self._lines, *self._writers.values()):  # after an error that is the one to be told
                with contextlib.suppress(OSError) if error else contextlib.nullcontext():
                    file.close()
            if self._scratch and self.upload(at_end=True):
                shutil.rmtree(self._scratch, ignore_errors=True)

    def upload(self, *, at_end: bool = False) -> bool:
        """Copy to a remote workdir what has grown since the last time; say so and return False if that fails."""
        if not self.active or self._scratch is None:
            return True
        if not at_end:
            for writer in self._writers.values():
                writer.flush()
        try:
            for file in self._scratch.rglob("*"):
                if file.is_file() and self._uploaded.get(file) != (size := file.stat().st_size):
                    write(self.workdir / str(file.relative_to(self._scratch)), file.read_bytes())
                    self._uploaded[file] = size
        except UserError as e:  # the run matters more; a checkpoint that cannot be written will end it
            self.say(f"{e}; {f'left in {self._scratch}' if at_end else 'tried again at the next save'}")
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
        """Report means over the steps since the last call; no speed for the first, whose time is the compiler's.

        `input_wait` is the share of that time that was spent waiting for batches. Of the updates `skipped` were
        skipped, which the means leave out: if that is all of them, `metrics` is empty.
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
        """Report how long saving has held up the loop, of the seconds that this process has trained."""
        if blocked > 0:
            self.say(f"saving took {blocked:.2f} s, {percent(blocked / seconds, 2)} of the time")
            self._record("save", step, blocked_seconds=round(blocked, 4), share=round(blocked / seconds, 6))

    def broken(self, split: str, name: str, reason: str) -> None:
        """Report an image that cannot be decoded, once. The first LINES are printed, by the process that read them."""
        if (split, name) in self._broken:
            return
        self._broken.add((split, name))
        text = f"{split} split: {name}: {reason}"
        if len(self._broken) == LINES + 1:
            text = f"further images that cannot be decoded are named in {self.workdir / 'metrics.jsonl'} only"
        if len(self._broken) > LINES + 1:
            pass
        elif self.active:
            self.say(text)
        else:
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
                if isinstance(value, float):  # counts say nothing as curves
                    writer.add_scalar(name, value, step)
