"""One fate: when a process of a job ends by a fault, all of them end, in seconds, with its error as their last line.

JAX ends the others only when a process has been silent for the length of a heartbeat, and one that leaves orderly
waits for them. Here what ended a process is left with JAX's coordination service, which each looks up twice a second.

A loop that stands still is a fault too: nothing else notices a thread that waits for ever.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # jax.distributed has no public key-value store

from jax_resnet.commands.status import exit_status
from jax_resnet.errors import Interrupted, UserError, first_line
from jax_resnet.runtime.distributed import PATIENCE
from jax_resnet.runtime.host import COMPILING

KEY, HEARD = "jax_resnet/end", "jax_resnet/heard/"
PARTING, PARTED = "jax_resnet/parting/", "jax_resnet/parted/"
EVERY = 0.5  # seconds between looking it up
# Seconds that the process with the service stays, at most, for the others to have looked it up. They may be dead: JAX,
# who wants a sign of life every half HEARTBEAT, may abort this one as long after their last.
LINGER = 6.0
SAVING = 10.0  # seconds for what is being saved to get onto disk, for which the others have to live
SPARE = 30  # seconds until it is done without Python, which a library that keeps Python's lock keeps out
_watching, _ending = threading.Lock(), threading.Lock()


@contextlib.contextmanager
def one_fate(saved: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Ends the process, and its peers, when what is inside ends by an exception other than Interrupted.

    Before it tells them, it waits for `saved`, which returns when what is being saved is on disk, but not for long.

    Where there is one process only, this does nothing: the exception goes on to the caller.
    """
    if not jax.distributed.is_initialized():  # asking for the number of processes would look for devices
        yield
        return
    if _watching.acquire(blocking=False):
        threading.Thread(target=_watch, args=(_client(),), daemon=True).start()
    try:
        yield
    except (Interrupted, GeneratorExit):
        raise
    except UserError as e:
        _wait_until(saved)
        end(f"error: {e}", exit_status(e))
    except BaseException as e:
        traceback.print_exc()
        if isinstance(e, Exception):  # an impatient Ctrl-C is none
            _wait_until(saved)
        end(f"{type(e).__name__}: {first_line(e)}", 130 if isinstance(e, KeyboardInterrupt) else 1)


def _wait_until(saved: Callable[[], None]) -> None:
    def wait() -> None:
        with contextlib.suppress(Exception):  # what the process ends by is the first fault
            saved()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(SAVING)


def end(text: str, status: int) -> NoReturn:
    """Ends this process with `text` as its last line, at once, and those of its job with the same.

    If another has ended before, it is that one's text.
    """
    _ending.acquire()  # for good: the thread that looks the end up has nothing to add
    if jax.distributed.is_initialized():
        if status == 1:  # a fault: whose; a user's mistake is everybody's, and so is a signal to stop
            text = f"process {jax.process_index()} on {socket.gethostname()}: {text}"
        _set(KEY, distributed.global_state, json.dumps([text, status]))
        with contextlib.suppress(Exception):
            text, status = json.loads(_client().key_value_try_get(KEY))
        _heard()
    _leave(text, status)


def part(status: int) -> None:
    """Leaves the process by `status` when all of the job do, the one with the service last.

    JAX's own way to leave together stops the service while others may still be asking it whether all is well.
    """
    job: Any = distributed.global_state
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):
        _wait_for_all(PARTING, job)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # JAX's C++ would have the last line: who has left is missing
        if job.process_id:
            _set(f"{PARTED}{job.process_id}", job)
        else:
            _wait_for_all(PARTED, job)
            time.sleep(EVERY)  # from saying so to having left
    os._exit(status)


def _wait_for_all(key: str, job: Any, seconds: float = PATIENCE) -> None:
    _set(f"{key}{job.process_id}", job)
    deadline = time.monotonic() + seconds
    while len(job.client.key_value_dir_get(key)) < job.num_processes and time.monotonic() < deadline:
        time.sleep(0.05)


def _set(key: str, job: Any, text: str = "") -> None:
    with contextlib.suppress(Exception):  # set already, or the service is gone
        job.client.key_value_set(key, text)


def _client() -> Any:
    return distributed.global_state.client


def _heard() -> None:
    """Says that this process knows how the job ends. The one with the service waits for all: it would abort them."""
    job: Any = distributed.global_state
    with contextlib.suppress(Exception):
        if job.process_id:
            _set(f"{HEARD}{job.process_id}", job)
        else:
            _wait_for_all(HEARD, job, LINGER)
            time.sleep(EVERY)  # from having heard to having left


def _watch(client: Any) -> None:
    while True:
        time.sleep(EVERY)
        try:
            text, status = json.loads(client.key_value_try_get(KEY))
        except Exception as e:
            if "NOT_FOUND" in str(e):
                continue
            if distributed.global_state.client is None:  # the job is over
                return
            text, status = f"process {jax.process_index()}: the others are lost ({first_line(e)})", 1
        else:
            _heard()
        _ending.acquire()
        _leave(text, status)


def _leave(text: str, status: int) -> NoReturn:
    with contextlib.suppress(Exception):
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # which a progress bar hides
        sys.stdout.flush()
        print(f"{show_cursor}\n{text}", file=sys.stderr, flush=True)
    os._exit(status)


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
