"""What a person sees of a run: lines, and on a terminal a bar below them."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

HEADINGS = {"accuracy_top1": "top-1", "accuracy_top5": "top-5"}
WIDTHS = {"split": len("validation_ema")}


class _Console(Console):
    """Go on in silence when what it prints into is closed (`| head`): the run matters more than its lines."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Screen:
    """Prints what happens to a run of `steps` updates that goes on from step `start`; nothing if `quiet`."""

    def __init__(self, steps: int, start: int, *, quiet: bool):
        self.console = _Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._steps, self._columns = steps, tuple[str, ...]()
        self._began = time.monotonic()
        self._first: tuple[int, float] | None = None  # step and time of the first report of this process
        self._progress: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._progress = Progress(
                TextColumn("step {task.completed:,} of {task.total:,}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task("compiling", total=steps, completed=start)
            self._progress.start()

    def close(self) -> None:
        """Take the bar away."""
        if self._progress:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(text, markup=False)

    def header(self, rows: Mapping[str, str]) -> None:
        """Print what is about to run."""
        width = max(map(len, rows))
        for name, text in rows.items():
            self.say(f"{name:<{width}}  {text}")

    def train(self, step: int, facts: Sequence[str], speed: str) -> None:
        """Print a line about the updates up to `step`; `speed` is empty for the first, whose time is the compiler's."""
        now = time.monotonic()
        total = f"{self._steps:,}"
        parts = [f"step {step:>{len(total)},} of {total}", *facts]
        parts.append(speed or f"first step after {now - self._began:.1f} s")
        if self._first and step > self._first[0]:
            first_step, first_time = self._first
            parts.append(f"{clock((self._steps - step) * (now - first_time) / (step - first_step))} left")
        self._first = self._first or (step, now)
        self.say("  ".join(parts))
        if self._progress:
            self._progress.update(self._task, completed=step, description="")

    def evaluation(self, step: int, epoch: float, split: str, metrics: Mapping[str, Any]) -> None:
        """Print one row of the table of evaluations: examples, loss, and the metrics that are floats."""
        row = {"step": f"{step:,}", "epoch": f"{epoch:.1f}", "split": split}
        row |= {"examples": f"{metrics['examples']:,}", "loss": shown("loss", metrics["loss"])}
        for name, value in metrics.items():
            if isinstance(value, float):
                row[HEADINGS.get(name, name)] = shown(name, value)
        if self._columns != tuple(row):
            self._columns = tuple(row)
            self.say("  ".join(f"{name:>{WIDTHS.get(name, 10)}}" for name in row))
        self.say("  ".join(f"{text:>{WIDTHS.get(name, 10)}}" for name, text in row.items()))


def shown(name: str, value: float) -> str:
    """Write a metric of that name as the console has it: 0.1234, or 98.61 % for an accuracy."""
    return percent(value, 2) if name.startswith("accuracy") else f"{value:.4f}"


def percent(share: float, digits: int) -> str:
    """Write 0.9861 as "98.61 %"."""
    return f"{100 * share:.{digits}f} %"


def clock(seconds: float) -> str:
    """Write 4321 seconds as "1:12:01", 83 as "1:23"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
