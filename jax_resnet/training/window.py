"""Means over the steps since the last report, and how fast they went."""

import math
import time
from typing import Any

import jax

from jax_resnet.data.loader import Feed
from jax_resnet.errors import UserError
from jax_resnet.training.evaluate import IN_FLIGHT
from jax_resnet.training.metrics import Sums, total
from jax_resnet.training.tasks import Task


def check_finite(finite: bool, what: str, step: int) -> None:
    """Raise UserError unless `finite`: a run must not save, or report, NaNs."""
    if not finite:
        raise UserError(
            f"{what} is no longer finite at step {step:,}, and this step is not saved; lower "
            "config.optimizer.learning_rate or lengthen config.schedule.warmup"
        )


class Window:
    """Sums of the steps since the last report, and the time they took."""

    def __init__(self, batches: Feed, task: Task) -> None:
        self._batches, self._task, self._waited = batches, task, 0.0
        self._sums: list[Sums] = []
        self._began: float | None = None  # None until the first step is done: its time is the compiler's

    def add(self, sums: Sums) -> None:
        """Take the sums of one more step, and wait for an earlier one if the host has run ahead."""
        self._sums.append(sums)
        if len(self._sums) >= IN_FLIGHT:
            jax.block_until_ready(self._sums[-IN_FLIGHT])

    def close(self, step: int) -> dict[str, Any]:
        """Return metrics, images_per_second and input_wait (a share of the time), and begin a new window.

        The metrics are the loss and the task's headline. With a guard also skipped; if that is every update there are
        no metrics. Raises UserError if the loss is not finite.
        """
        totals = total(self._sums)
        report: dict[str, Any] = {"metrics": {}}
        if "skipped" in totals:
            report["skipped"] = totals["skipped"]
        if totals["examples"]:
            means = self._task.summary(totals)
            check_finite(math.isfinite(means["loss"]), "the loss", step)
            report["metrics"] = {name: means[name] for name in ("loss", self._task.headline)}
        if self._began is not None:
            seconds = time.monotonic() - self._began
            report["images_per_second"] = totals["examples"] / seconds
            report["input_wait"] = (self._batches.waited - self._waited) / seconds
        self.restart()
        return report

    def restart(self) -> None:
        """Begin a new window, and its clock, so that saving and evaluating do not count."""
        self._sums, self._began, self._waited = [], time.monotonic(), self._batches.waited
