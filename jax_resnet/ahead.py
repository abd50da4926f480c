"""Steps compiled ahead of need, on a thread beside the training."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any

from jax_resnet.data.order import Phase, phase_at
from jax_resnet.signals import COMPILER


class StepsAhead:
    """A jitted step, compiled once for each kind of batch in `phases`, in their order, on a thread.

    `shapes` gives the abstract arguments of a phase's step. Where batches are all of one kind there is no thread, and
    the step is compiled when it is first called. Leaving the `with` lets no further compilation begin.
    """

    def __init__(self, step: Any, phases: Sequence[Phase], shapes: Callable[[Phase], tuple[Any, ...]]):
        self._step, self._phases, self._shapes = step, phases, shapes
        self._compiled: dict[Any, Future[Any]] = {_kind(phase): Future() for phase in phases}
        self._left = False

    def __enter__(self) -> "StepsAhead":
        if len(self._compiled) > 1:
            # No daemon: it would be cut off inside the compiler when the interpreter ends, which aborts the process. A
            # command that wants to end sooner calls signals.leave.
            Thread(target=self._compile, name=COMPILER).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True

    def _compile(self) -> None:
        for phase in self._phases:
            future = self._compiled[_kind(phase)]
            if self._left or future.done():
                continue
            try:
                future.set_result(self._step.lower(*self._shapes(phase)).compile())
            except BaseException as e:
                future.set_exception(e)
                return

    def at(self, step: int, stopped: Callable[[], Any] = lambda: False) -> Any:
        """What to call for update `step`, counted from 0; waits until it is compiled, or until `stopped()`.

        Raises what the compiler raised, for whichever phase: at once, not when that begins.
        """
        if len(self._compiled) < 2:
            return self._step
        future = self._compiled[_kind(phase_at(self._phases, step))]
        while not future.done() and not stopped():
            wait([future], timeout=0.1)
        for other in self._compiled.values():
            if other.done():
                other.result()
        return future.result() if future.done() else self._step


def _kind(phase: Phase) -> tuple[int | None, int]:
    return phase.image_size, phase.batch_size
