"""Means over the steps since the last report, and how fast they went."""

import math
import time
from typing import Any

import jax

from jax_resnet.data.loader import Feed
from jax_resnet.errors import UserError
from jax_resnet.training.evaluate import IN_FLIGHT
from jax_resnet.training.metrics import Sums, total


def check_finite(finite: bool, what: str, step: int) -> None:
    """Raise UserError unless `finite`: a run must not save, or report, NaNs."""
    if not finite:
        raise UserError(
            f"{what} is no longer finite at step {step:,}, and this step is not saved; lower "
            "config.optimizer.learning_rate or lengthen config.schedule.warmup"
        )


class Window:
    """Sums of the steps since the last report, and the time they took."""

    def __init__(self, batches: Feed) -> None:
        self._batches, self._waited = batches, 0.0
        self._sums: list[Sums] = []
        self._began: float | None = None  # None until the first step is done: its time is the compiler's

    def add(self, sums: Sums) -> None:
        """Take the sums of one more step, and wait for an earlier one if the host has run ahead."""
        self._sums.append(sums)
        jax.block_until_ready(self._sums[-IN_FLIGHT:][0])

    def close(self, step: int) -> dict[str, Any]:
        """Return loss, accuracy, images_per_second and input_wait (a share of the time), and begin a new window.

        With a guard also skipped; loss and accuracy are None if that is every update.
        Raises UserError if the loss is not finite.
        """
        totals = total(self._sums)
        loss, accuracy = (totals[name] / (totals["examples"] or math.nan) for name in ("loss", "correct_top1"))
        means: dict[str, Any] = {"loss": loss, "accuracy": accuracy}
        if "skipped" in totals:
            means["skipped"] = totals["skipped"]
        if not totals["examples"]:
            means.update(loss=None, accuracy=None)
        check_finite(not totals["examples"] or math.isfinite(loss), "the loss", step)
        if self._began is not None:
            seconds = time.monotonic() - self._began
            means["images_per_second"] = totals["examples"] / seconds
            means["input_wait"] = (self._batches.waited - self._waited) / seconds
        self.restart()
        return means

    def restart(self) -> None:
        """Begin a new window, without the time of what was done in between."""
        self._sums, self._began, self._waited = [], time.monotonic(), self._batches.waited
