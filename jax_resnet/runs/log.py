"""What a run shows and leaves behind: a bar or lines, metrics.jsonl, TensorBoard events, a picture, result.json."""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jax_resnet.config import traced_steps
from jax_resnet.errors import UserError, unwritable
from jax_resnet.runs.metrics_log import FILE, read_metrics
from jax_resnet.runs.paths import AnyPath, is_remote, write
from jax_resnet.runs.workdir import write_json
from jax_resnet.training.plan import Plan

COLUMNS = ("step", "epoch", "split", "examples", "loss", "top-1", "top-5")
WIDTHS = {"split": len("validation_ema")}
LINES = 20  # of broken images


class _Console(Console):
    """Goes on in silence when what it prints into is closed (`| head`): the run matters more than its lines."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


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

    `start_step` is the step the run goes on from: what was recorded after it, by a process that died, is dropped, so
    each step stands once.
    """

    def __init__(self, workdir: AnyPath, plan: Plan, start_step: int):
        self.active = jax.process_index() == 0
        self.console = _Console(highlight=False, soft_wrap=True, quiet=not self.active)
        self._workdir, self._plan = workdir, plan
        self._table_begun, self._step = False, start_step
        self._broken: set[tuple[str, str]] = set()
        self._began, self._before = time.monotonic(), 0.0
        self._progress: Progress | None = None
        self.folder: AnyPath | None = None  # of this machine, for what goes to the workdir; None: nothing does
        if not self.active:
            return
        rows = [r for r in read_metrics(workdir) if r["step"] <= start_step] if start_step else []
        self._before = rows[-1]["seconds"] if rows else 0.0
        self._broken = {(r["split"], r["name"]) for r in rows if r["kind"] == "broken"}
        # What is appended to is kept here, for an object store takes whole files.
        self._scratch = Path(tempfile.mkdtemp(prefix="jax_resnet-")) if is_remote(workdir) else None
        folder = self.folder = self._scratch or workdir
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
            self._task = self._progress.add_task("compiling …", total=plan.steps, completed=start_step)
            self._progress.start()

    @property
    def seconds(self) -> float:
        """Wall seconds of the run, those before it was resumed included."""
        return self._before + time.monotonic() - self._began

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, error: object, *_: object) -> None:
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
                    write(self._workdir / str(file.relative_to(self._scratch)), file.read_bytes())
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
        loss: float | None,
        accuracy: float | None,
        learning_rate: float,
        images_per_second: float | None = None,
        input_wait: float | None = None,
        skipped: int = 0,
    ) -> None:
        """Means over the steps since the last call; no speed for the first, whose time is the compiler's.

        `input_wait` is the share of that time that was spent waiting for batches. Of the updates `skipped` were
        skipped, which the means leave out: if that is all of them, they are None.
        """
        timed = images_per_second is not None
        speed = f"{images_per_second:,.0f} images/s  input wait {input_wait:.1%}" if timed else "compiled"
        means = "no update  " if loss is None else f"loss {loss:.4f}  accuracy {accuracy:.2%}  "
        text = f"{means}{f'{skipped:,} skipped  ' if skipped else ''}{speed}".replace("%", " %")
        if self._progress:
            self._progress.update(self._task, completed=step, description=text)
        else:
            self.say(f"step {step:>{len(f'{self._plan.steps:,}')},} of {self._plan.steps:,}  {text}")
        self._record(
            "train",
            step,
            loss=loss,
            accuracy_top1=accuracy,
            learning_rate=learning_rate,
            images_per_second=images_per_second,
            input_wait=input_wait and round(input_wait, 5),
            skipped=skipped or None,
        )

    def evaluation(self, step: int, split: str, metrics: dict[str, Any]) -> None:
        """One row of the table of evaluations."""
        columns = [c for c in COLUMNS if c != "top-5" or "accuracy_top5" in metrics]
        if not self._table_begun:
            self.say("  ".join(f"{c:>{WIDTHS.get(c, 10)}}" for c in columns))
            self._table_begun = True
        values = {
            "step": f"{step:,}",
            "epoch": f"{self._plan.position(step) / self._plan.steps_per_epoch:.1f}",
            "split": split,
            "examples": f"{metrics['examples']:,}",
            "loss": f"{metrics['loss']:.4f}",
            "top-1": f"{100 * metrics['accuracy_top1']:.2f} %",
            "top-5": f"{100 * metrics.get('accuracy_top5', 0):.2f} %",
        }
        self.say("  ".join(f"{values[c]:>{WIDTHS.get(c, 10)}}" for c in columns))
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
            text = f"further images that cannot be decoded are named in {self._workdir / 'metrics.jsonl'} only"
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
            write_json(self._workdir / "result.json", result)
            draw_curves(read_metrics(self._scratch or self._workdir), self._workdir / "curves.png")
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
            raise unwritable(self._workdir / FILE, e) from None
        group = f"{kind}_ema" if values.get("split", "").endswith("_ema") else kind
        for name, value in values.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{group}/{name}", value, step)


class Trace:
    """Traces the updates that `steps` names, "FIRST:LAST", into folder/profile, as XProf reads it. A context manager.

    Without `folder` (the processes of a job but the first) or `steps` it does nothing. Raises UserError if they begin
    after `end`, the last update of all.
    """

    def __init__(self, folder: AnyPath | None, steps: str | None, end: int):
        if steps is not None and traced_steps(steps).start > end:
            raise UserError(f"config.profile={steps}: begins after the last update, {end:,}")
        self._folder, self._on = folder, False
        self._steps = range(0) if folder is None or steps is None else traced_steps(steps)

    def of(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """What to call update `step` in, counted from 1."""
        if step not in self._steps:
            return contextlib.nullcontext()
        if not self._on:
            jax.profiler.start_trace(str(self._folder / "profile"))  # type: ignore[operator]
            self._on = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, sums: Any) -> None:
        """Ends with the last of the updates, when it has given its `sums`."""
        if self._on and step + 1 not in self._steps:
            jax.block_until_ready(sums)
            self._stop()

    def _stop(self) -> None:
        self._on = False
        jax.profiler.stop_trace()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            self._stop()


def draw_curves(rows: list[dict[str, Any]], file: AnyPath) -> None:
    """Loss, accuracy and learning rate over the steps, as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, title, name in zip(
        panels, ("loss", "accuracy", "learning rate"), ("loss", "accuracy_top1", "learning_rate"), strict=True
    ):
        shown = [r for r in rows if r["kind"] in ("train", "eval") and name in r]
        for split in dict.fromkeys(r.get("split", r["kind"]) for r in shown):
            points = [(r["step"], r[name]) for r in shown if r.get("split", r["kind"]) == split]
            if points:
                axes.plot(*zip(*points, strict=True), label=split, marker="." if len(points) < 50 else "")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines and name != "learning_rate":
            axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write(file, picture.getvalue())
