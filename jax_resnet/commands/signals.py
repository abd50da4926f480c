"""Note a signal to stop, let the loop save its state, and exit."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from jax_resnet.runtime.host import STOP_SIGNALS

# After so long the main thread is assumed to be inside the compiler, where Python's handlers wait.
BLOCKED_SECONDS = 5.0
# After Ctrl-C a KeyboardInterrupt gets so long to end the process by itself.
IMPATIENT_SECONDS = 2.0


class Signals:
    """Note the first SIGINT, SIGTERM or SIGHUP, so that the loop can save its state and exit.

    After it Ctrl-C exits at once. A further SIGTERM, which launchers repeat, or SIGHUP never cuts the
    save short.

    `otherwise` exits in place of a main thread that does not return to Python: another thread calls it
    with the signal after BLOCKED_SECONDS. None while there is unsaved state.
    """

    def __init__(self, otherwise: Callable[[int], Any] | None = None) -> None:
        self.received = 0
        self.otherwise = otherwise
        self._left = False

    def __enter__(self) -> "Signals":
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                # A signal that nohup ignores stays ignored.
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._note)
            # Python's handlers wait until C++ code returns; the bytes written to this pipe do not.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._read,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.otherwise = None
        self._left = True
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._write)  # ends the thread

    def _note(self, signum: int, _: Any) -> None:
        if self.received:
            return
        self.received = signum
        if signal.SIGINT in self._previous:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
        os.write(2, b"\nstopping: the step at hand ends, then its state is saved; Ctrl-C to leave at once\n")

    def _watch(self, pipe: int) -> None:
        received: list[int] = []
        while byte := os.read(pipe, 1):
            signum = byte[0]
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
