"""What a training asks of the program that it runs in."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
COMPILER_THREAD = "compiler"  # compiles what is not needed yet
MEETING_THREAD = "meeting"  # waits for a job's other processes
# Factors on the time that a step may take.
COMPILING = 4.0
WAITING = 1.25  # Wait longer here, so that the stuck process, not its peers, reports the stall.


class Host:
    """The program that a training runs in: somebody else's, which it leaves as it is.

    Nothing here ends the process, handles a signal or starts a thread, and KeyboardInterrupt passes through. Override
    `stop_requested` to have a training save its state and raise Interrupted. The command has a host of its own, with
    signals, a watchdog and one fate for all processes of a job: see commands/host.py.
    """

    joins_threads = True  # else a thread that still compiles outlives the training

    def stop_requested(self) -> int:
        """Return the number of the signal that asks to stop, 0 for none. Asked after every step."""
        return 0

    def beat(self, doing: str, patience: float = 1.0) -> None:
        """Note that the loop is alive, and begins with `doing`, which may take `patience` times as long as a step."""

    @contextmanager
    def watching(self, seconds: float) -> Iterator[None]:
        """Watch the loop inside: `seconds` may pass without `beat`."""
        yield

    @contextmanager
    def all_saved(self, text: str, wait: Callable[[], None]) -> Iterator[None]:
        """Allow the process to end inside, with `text` as its last line: all state is on disk once `wait` returns."""
        yield

    @contextmanager
    def one_fate(self, wait: Callable[[], None]) -> Iterator[None]:
        """Tell the other processes of the job when what is inside fails, once `wait` returns: all is saved then."""
        yield
