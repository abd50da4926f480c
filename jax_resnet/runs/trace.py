"""Trace chosen updates for XProf."""

import contextlib
from typing import Any

import jax

from jax_resnet.config import traced_steps
from jax_resnet.errors import UserError
from jax_resnet.runs.paths import AnyPath


class Trace:
    """Trace the updates that `steps` names, "FIRST:LAST", into folder/profile. To be closed.

    It does nothing without `steps`, or without `folder` (in all processes of a job but the first).
    Raises UserError if the updates begin after `end`, the last of the training.
    """

    def __init__(self, folder: AnyPath | None, steps: str | None, end: int):
        if steps is not None and traced_steps(steps).start > end:
            raise UserError(f"config.profile={steps}: begins after the last update, {end:,}")
        self._folder = folder
        self._on = False
        self._steps = range(0)
        if folder is not None and steps is not None:
            self._steps = traced_steps(steps)

    def of(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which to call update `step`, counted from 1."""
        if step not in self._steps:
            return contextlib.nullcontext()
        if not self._on:
            jax.profiler.start_trace(str(self._folder / "profile"))  # type: ignore[operator]
            self._on = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, sums: Any) -> None:
        """Stop after the last traced update, once its `sums` are computed."""
        if self._on and step + 1 not in self._steps:
            jax.block_until_ready(sums)
            self.close()

    def close(self) -> None:
        """Stop, if a trace is on."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
