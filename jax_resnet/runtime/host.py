"""The program that a training runs in, and what the training asks of it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
COMPILER_THREAD = "compiler"  # compiles what is not needed yet
MEETING_THREAD = "meeting"  # waits for a job's other processes
# Factors on config.stuck_after.
COMPILING = 4.0
# For a step that is on the devices: a peer waits longer than the stuck process, so that this one reports the stall.
WAITING = 1.25


class Host:
    """The program that a training runs in: somebody else's, which it leaves as it is.

    Nothing here ends the process, handles a signal or starts a thread, and KeyboardInterrupt passes through. Override
    `stop_requested` to have a training save its state and raise Interrupted. The command has a host of its own, with
    signals, a watchdog and one fate for all processes of a job: see commands/host.py.
    """

    joins_threads = True  # else a thread that still compiles outlives the training

    def stop_requested(self) -> int:
        """Return the number of the signal that asks to stop, as signal.SIGTERM; 0 for none.

        Asked after every step and evaluation batch, and while the compiler or a batch is waited for.
        """
        return 0

    def beat(self, doing: str, patience: float = 1.0) -> None:
        """Note that the loop is alive, and begins with `doing`.

        That may take `patience` times the seconds given to `watching`.
        """

    @contextmanager
    def watching(self, seconds: float) -> Iterator[None]:
        """Watch the loop inside: `seconds` may pass without `beat`; 0: for ever."""
        yield

    @contextmanager
    def all_saved(self, text: str, wait: Callable[[], None]) -> Iterator[None]:
        """Allow the process to end inside, with `text` as its last line: all state is on disk once `wait` returns."""
        yield

    @contextmanager
    def one_fate(self, wait: Callable[[], None]) -> Iterator[None]:
        """Tell the other processes of the job when what is inside fails.

        First call `wait`, which returns when all is saved, but do not let it hold the others up for long.
        """
        yield
