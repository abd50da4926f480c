"""Ends a process whose loop stands still, and shows where: nothing else notices a thread that waits for ever."""

import faulthandler
import sys
import threading
import time

from jax_resnet.peers import end

COMPILING = 4  # times the patience, where a step is compiled
WAITING = 1.25  # where the devices are waited for, and with them other processes
SPARE = 30  # seconds until it is done without Python, which a library that keeps Python's lock keeps out


class Watchdog:
    """Ends the process, by status 1, with the stacks of all threads, when `limit` seconds pass without `beat`.

    0: never. A context manager.
    """

    def __init__(self, limit: float):
        self._limit = limit
        self._doing, self._until, self._armed = "", float("inf"), 0.0
        self._left = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._limit:
            self.beat("starting", COMPILING)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._limit:
            faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str, times: float = 1) -> None:
        """The loop is alive, and begins with `doing`, for which it has `times` the patience."""
        if not self._limit or self._left.is_set():
            return
        now = time.monotonic()
        self._doing, self._until = doing, now + times * self._limit
        if now - self._armed > 1 or times == COMPILING:
            self._armed = now
            faulthandler.dump_traceback_later(times * self._limit + SPARE, exit=True, file=sys.__stderr__ or 2)

    def _watch(self) -> None:
        while not self._left.wait(min(1.0, self._limit / 4)):
            if time.monotonic() > self._until:
                faulthandler.dump_traceback(file=sys.__stderr__ or 2)
                end(
                    f"stuck: {self._doing} has taken more than config.stuck_after allows; the stacks above say where", 1
                )
