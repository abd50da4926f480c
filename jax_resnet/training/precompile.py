"""Ahead-of-time compilation of the steps, on a thread beside what a run begins with."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any

from jax_resnet.data.sampling import Phase, phase_at
from jax_resnet.runtime.host import COMPILER_THREAD

EVALUATION = "evaluation"


class StepsAhead:
    """Compiles a jitted step once for each kind of batch in `phases`, in their order, and then the evaluation's.

    `shapes` gives the abstract arguments of a phase's step; `evaluation` is a jitted step and its abstract arguments.
    Where there are no phases nothing is compiled ahead. Leaving the `with` lets no further compilation begin, and with
    `joins` waits for the one that has.
    """

    def __init__(
        self,
        step: Any,
        phases: Sequence[Phase],
        shapes: Callable[[Phase], tuple[Any, ...]],
        evaluation: tuple[Any, tuple[Any, ...]],
        *,
        joins: bool = True,
    ):
        self._step, self._phases, self._joins = step, phases, joins
        self._eval_step = evaluation[0]
        wanted: dict[Any, tuple[Any, tuple[Any, ...]]] = {_kind(phase): (step, shapes(phase)) for phase in phases}
        self._wanted = wanted | {EVALUATION: evaluation} if phases else {}
        self._compiled: dict[Any, Future[Any]] = {kind: Future() for kind in self._wanted}
        self._left = False
        self._thread: Thread | None = None

    def __enter__(self) -> "StepsAhead":
        if self._wanted:
            # No daemon: it would be cut off inside the compiler when the interpreter ends, which aborts the process.
            self._thread = Thread(target=self._compile, name=COMPILER_THREAD)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        if self._thread and self._joins:
            self._thread.join()

    def _compile(self) -> None:
        for kind, (step, args) in self._wanted.items():
            if self._left:
                return
            try:
                self._compiled[kind].set_result(step.lower(*args).compile())
            except BaseException as e:
                for future in self._compiled.values():
                    if not future.done():
                        future.set_exception(e)
                return

    def at(self, step: int, stopped: Callable[[], Any] = lambda: False) -> Any:
        """Return what to call for update `step`, counted from 0, when it is compiled; None if `stopped()` before.

        An update that is before all phases is compiled when it is first called. Raises what the compiler raised, for
        whichever phase: at once, not when that begins.
        """
        if not self._phases or step < self._phases[0].first_step:
            return self._step
        future = self._compiled[_kind(phase_at(self._phases, step))]
        while not future.done():
            if stopped():
                return None
            wait([future], timeout=0.1)
        for kind, other in self._compiled.items():
            if other.done() and kind != EVALUATION:
                other.result()
        return future.result()

    def evaluation(self) -> Any:
        """Return what to call for a batch of the evaluation, when it is compiled.

        Where compiling failed, as it may for want of memory beside a training, it is compiled when it is first called.
        """
        future = self._compiled.get(EVALUATION)
        if future is None or future.exception():
            return self._eval_step
        return future.result()


def _kind(phase: Phase) -> tuple[int | None, int]:
    return phase.image_size, phase.batch_size
