"""Being asked to stop: note it, let the loop save, and leave."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from jax_resnet.runtime.host import STOP_SIGNALS

# After so long the main thread is taken to be inside the compiler, where Python's handlers wait.
BLOCKED_SECONDS = 5.0
# So long a KeyboardInterrupt has, after Ctrl-C, to end the process by itself.
IMPATIENT_SECONDS = 2.0


class Signals:
    """Notes the first SIGINT, SIGTERM or SIGHUP, so that the loop can save and leave.

    After it Ctrl-C leaves at once. Launchers repeat SIGTERM: no further one, and no SIGHUP, cuts the save short.

    `otherwise` leaves in place of a main thread that does not come back to Python: it is called with the signal, on
    another thread, BLOCKED_SECONDS after it. None while there is unsaved state.
    """

    def __init__(self, otherwise: Callable[[int], Any] | None = None) -> None:
        self.received = 0
        self.otherwise = otherwise
        self._left = False

    def __enter__(self) -> "Signals":
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup wants it
                    self._previous[signum] = signal.signal(signum, self._note)
            # Python's handlers wait until C++ code returns; what is written here does not.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._read,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.otherwise, self._left = None, True
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._write)  # which ends the thread

    def _note(self, signum: int, _: Any) -> None:
        if self.received:
            return
        self.received = signum
        if signal.SIGINT in self._previous:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
        os.write(2, b"\nstopping: the step at hand ends, then its state is saved; Ctrl-C to leave at once\n")

    def _watch(self, pipe: int) -> None:
        received: list[int] = []
        while got := os.read(pipe, 1):
            signum = got[0]
            if signum not in self._previous:
                continue
            received.append(signum)
            if len(received) == 1:
                threading.Thread(target=self._leave, args=(signum,), daemon=True).start()
            elif signum == signal.SIGINT:
                time.sleep(IMPATIENT_SECONDS)
                if not self._left:
                    os._exit(128 + signum)
        os.close(pipe)

    def _leave(self, signum: int) -> None:
        time.sleep(BLOCKED_SECONDS)
        if leave := self.otherwise:
            leave(signum)
