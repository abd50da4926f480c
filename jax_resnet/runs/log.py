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
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jax_resnet.errors import UserError, unwritable
from jax_resnet.runs.curves import draw_curves
from jax_resnet.runs.metrics_log import FILE, read_metrics
from jax_resnet.runs.paths import AnyPath, is_remote, write
from jax_resnet.runs.trace import Trace
from jax_resnet.runs.workdir import write_json

HEADINGS = {"accuracy_top1": "top-1", "accuracy_top5": "top-5"}
WIDTHS = {"split": len("validation_ema")}
LINES = 20  # of broken images


def shown(name: str, value: float) -> str:
    """Write a metric of that name as the console has it: 0.1234, or 98.61 % for an accuracy."""
    return f"{100 * value:.2f} %" if name.startswith("accuracy") else f"{value:.4f}"


class _Console(Console):
    """Go on in silence when what it prints into is closed (`| head`): the run matters more than its lines."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


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
        self.console = _Console(highlight=False, soft_wrap=True, quiet=not self.active)
        self.workdir, self._steps, self._epoch = workdir, steps, epoch
        self._table_begun, self._step = False, start_step
        self._broken: set[tuple[str, str]] = set()
        self._began, self._before = time.monotonic(), 0.0
        self._progress: Progress | None = None
        self.trace = Trace(None, profile, steps)
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
        try:
            self._events = _summary_writer(folder / "tensorboard", start_step + 1)
        except OSError as e:
            raise unwritable(folder / "tensorboard", e) from None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed:,} of {task.total:,}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task("compiling …", total=steps, completed=start_step)
            self._progress.start()

    @property
    def seconds(self) -> float:
        """Wall seconds of the run, those before it was resumed included."""
        return self._before + time.monotonic() - self._began

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.trace.__exit__()
        if self._progress:
            self._progress.stop()
        if self.active:
            for file in (self._lines, self._events):  # after an error that is the one to be told
                with contextlib.suppress(OSError) if error else contextlib.nullcontext():
                    file.close()
            if self._scratch and self.upload(at_end=True):
                shutil.rmtree(self._scratch, ignore_errors=True)

    def upload(self, *, at_end: bool = False) -> bool:
        """Copies to a remote workdir what has grown since the last time; says so and returns False if it cannot."""
        if not self.active or self._scratch is None:
            return True
        if not at_end:
            self._events.flush()
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
        """Prints a line, above the bar if there is one."""
        self.console.print(text, markup=False)

    def header(self, rows: dict[str, str]) -> None:
        """What is about to run."""
        width = max(map(len, rows))
        for name, text in rows.items():
            self.say(f"{name:<{width}}  {text}")

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
        timed = images_per_second is not None
        speed = f"{images_per_second:,.0f} images/s  input wait {input_wait:.1%}" if timed else "compiled"
        means = [f"{name.removesuffix('_top1')} {shown(name, value)}" for name, value in metrics.items()]
        counts = [f"{skipped:,} skipped"] if skipped else []
        text = "  ".join([*(means or ["no update"]), *counts, speed.replace("%", " %")])
        if self._progress:
            self._progress.update(self._task, completed=step, description=text)
        else:
            self.say(f"step {step:>{len(f'{self._steps:,}')},} of {self._steps:,}  {text}")
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
        """Report one row of the table of evaluations: the means among the metrics, the loss first."""
        row = {"step": f"{step:,}", "epoch": f"{self._epoch(step):.1f}", "split": split}
        row |= {"examples": f"{metrics['examples']:,}", "loss": shown("loss", metrics["loss"])}
        for name, value in metrics.items():
            if isinstance(value, float):
                row[HEADINGS.get(name, name)] = shown(name, value)
        if not self._table_begun:
            self.say("  ".join(f"{name:>{WIDTHS.get(name, 10)}}" for name in row))
            self._table_begun = True
        self.say("  ".join(f"{text:>{WIDTHS.get(name, 10)}}" for name, text in row.items()))
        self._record("eval", step, split=split, **metrics)

    def saving(self, step: int, blocked: float, seconds: float) -> None:
        """How long saving has held up the loop, of the seconds that this process has trained."""
        if blocked > 0:
            self.say(f"saving took {blocked:.2f} s, {blocked / seconds:.2%} of the time".replace("%", " %"))
            self._record("save", step, blocked_seconds=round(blocked, 4), share=round(blocked / seconds, 6))

    def broken(self, split: str, name: str, reason: str) -> None:
        """An image that cannot be decoded, named once. The first LINES are printed, by the process that read them."""
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
        """Writes result.json and curves.png; says how many images were broken."""
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
        group = f"{kind}_ema" if values.get("split", "").endswith("_ema") else kind
        for name, value in values.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{group}/{name}", value, step)
