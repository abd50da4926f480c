"""Being asked to stop: note it, let the loop save, and leave."""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait
from typing import Any

COMPILER = "compiler"  # the name of a thread that compiles what is not needed yet


HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Notes the first SIGINT, SIGTERM or SIGHUP, so that the loop can save and leave; a second one acts at once."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "Signals":
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in HANDLED:
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup wants it
                    self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: Any) -> None:
        self.received = signum
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(2, b"\nstopping: the step at hand ends, then its state is saved; once more to leave at once\n")


def follow_parent(*_: int) -> None:
    """Has this process end when the one that began it does, even if that is killed."""
    parent: Any = multiprocessing.parent_process()

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def leave(status: int) -> int:
    """`status`, to exit with; or exits with it at once where a COMPILER thread would keep the process for minutes."""
    if any(thread.name == COMPILER for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
