"""The process of a command as the host of a training: it may end when a signal, a stall or a peer's fault says so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from jax_resnet.commands import notice
from jax_resnet.commands.failure import Watchdog, end, one_fate
from jax_resnet.commands.signals import Signals
from jax_resnet.runtime.host import Host


class CommandHost(Host):
    """A host that owns its process. Make one with `command_host`."""

    joins_threads = False  # ending.leave ends the process, whatever still compiles

    def __init__(self, signals: Signals):
        self._signals, self._watchdog = signals, Watchdog(0)

    def stop_requested(self) -> int:
        """Return the signal that was received, 0 for none."""
        return self._signals.received

    def beat(self, doing: str, patience: float = 1.0) -> None:
        """See Host."""
        self._watchdog.beat(doing, patience)

    @contextmanager
    def watching(self, seconds: float) -> Iterator[None]:
        """See Host. When the time is over the process ends, with the stacks of its threads. 0 seconds: never."""
        with Watchdog(seconds) as self._watchdog:
            yield

    @contextmanager
    def all_saved(self, text: str, wait: Callable[[], None]) -> Iterator[None]:
        """See Host. Inside, a signal ends the process even while the main thread is in C++."""

        def leave(signum: int) -> NoReturn:
            wait()
            end(text, 128 + signum)

        self._signals.otherwise = leave
        try:
            yield
        finally:
            self._signals.otherwise = None

    @contextmanager
    def one_fate(self, wait: Callable[[], None]) -> Iterator[None]:
        """See Host."""
        with one_fate(wait):
            yield


@contextmanager
def command_host() -> Iterator[CommandHost]:
    """Make this process the host of a training: with handlers of signals and of preemption, and one fate for a job."""

    def leave_at_once(signum: int) -> NoReturn:
        end("stopped before its first step; the same command starts or resumes the run", 128 + signum)

    with one_fate(), Signals(leave_at_once) as signals:
        notice.watch()
        yield CommandHost(signals)
