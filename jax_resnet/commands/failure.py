"""End all processes of a job within seconds when one fails, with its error as their last line.

JAX ends the others only when a process has been silent for the length of a heartbeat, and a process
that leaves orderly waits for them. So a failing process leaves its error with JAX's coordination
service, which every process polls twice a second.

A stalled loop is a fault too: nothing else notices a thread that waits for ever.
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
from jax._src import distributed  # has the key-value store

from jax_resnet.commands.status import exit_status
from jax_resnet.errors import Interrupted, UserError, first_line
from jax_resnet.runtime.distributed import PATIENCE
from jax_resnet.runtime.host import COMPILING

# Keys of the coordination service; all but the first are prefixes of a process id.
END_KEY, ACKNOWLEDGED_KEY = "jax_resnet/end", "jax_resnet/heard/"
PARTING_KEY, PARTED_KEY = "jax_resnet/parting/", "jax_resnet/parted/"
POLL_SECONDS = 0.5
# The process with the service waits so long, at most, for the others to read the error. They may be
# dead: JAX, which expects a heartbeat every half HEARTBEAT, may abort this process that long after.
LINGER_SECONDS = 6.0
# A save gets so long to finish, for which the other processes have to live.
SAVING_SECONDS = 10.0
# So much later faulthandler ends the process without Python, whose lock a library may be holding.
SPARE_SECONDS = 30
_watching = threading.Lock()
_ending = threading.Lock()


@contextlib.contextmanager
def one_fate(saved: Callable[[], None] = lambda: None) -> Iterator[None]:
    """End the process, and its peers, when the body raises an exception other than Interrupted.

    Before it tells the peers, it waits up to SAVING_SECONDS for `saved`, which returns when all saves
    are on disk. A process that is alone passes the exception on to the caller.
    """
    # Asking for the number of processes would look for devices.
    if not jax.distributed.is_initialized():
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
        # A second Ctrl-C, which is no Exception, does not wait.
        if isinstance(e, Exception):
            _wait_until(saved)
        end(f"{type(e).__name__}: {first_line(e)}", 130 if isinstance(e, KeyboardInterrupt) else 1)


def _wait_until(saved: Callable[[], None]) -> None:
    def wait() -> None:
        # The process reports only the first fault.
        with contextlib.suppress(Exception):
            saved()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(SAVING_SECONDS)


def end(text: str, status: int) -> NoReturn:
    """End this process at once with `text` as its last line, and its peers with the same.

    The text is that of another process if that one has ended before.
    """
    # The lock is never released, so that the polling thread adds nothing.
    _ending.acquire()
    if jax.distributed.is_initialized():
        # A fault is that of one process; a user's mistake and a signal to stop concern all of them.
        if status == 1:
            text = f"process {jax.process_index()} on {socket.gethostname()}: {text}"
        _set(END_KEY, distributed.global_state, json.dumps([text, status]))
        with contextlib.suppress(Exception):
            text, status = json.loads(_client().key_value_try_get(END_KEY))
        _acknowledge()
    _leave(text, status)


def part(status: int) -> None:
    """Exit with `status` together with all processes of the job, the one with the service last.

    JAX's own shutdown stops the service while other processes may still be polling it.
    """
    job: Any = distributed.global_state
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):
        _wait_for_all(PARTING_KEY, job)
        # JAX's C++ would print a last line about processes that have left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if job.process_id:
            _set(f"{PARTED_KEY}{job.process_id}", job)
        else:
            _wait_for_all(PARTED_KEY, job)
            # The last process that said so has yet to exit.
            time.sleep(POLL_SECONDS)
    os._exit(status)


def _wait_for_all(key: str, job: Any, seconds: float = PATIENCE) -> None:
    _set(f"{key}{job.process_id}", job)
    deadline = time.monotonic() + seconds
    while len(job.client.key_value_dir_get(key)) < job.num_processes and time.monotonic() < deadline:
        time.sleep(0.05)


def _set(key: str, job: Any, text: str = "") -> None:
    # The key may be set already, or the service gone.
    with contextlib.suppress(Exception):
        job.client.key_value_set(key, text)


def _client() -> Any:
    return distributed.global_state.client


def _acknowledge() -> None:
    """Note that this process knows how the job ends.

    The process with the service waits for the others, which would abort without the service.
    """
    job: Any = distributed.global_state
    with contextlib.suppress(Exception):
        if job.process_id:
            _set(f"{ACKNOWLEDGED_KEY}{job.process_id}", job)
        else:
            _wait_for_all(ACKNOWLEDGED_KEY, job, LINGER_SECONDS)
            # The last process that acknowledged has yet to exit.
            time.sleep(POLL_SECONDS)


def _watch(client: Any) -> None:
    while True:
        time.sleep(POLL_SECONDS)
        try:
            text, status = json.loads(client.key_value_try_get(END_KEY))
        except Exception as e:
            if "NOT_FOUND" in str(e):
                continue
            # The job is over.
            if distributed.global_state.client is None:
                return
            text = f"process {jax.process_index()}: the others are lost ({first_line(e)})"
            status = 1
        else:
            _acknowledge()
        _ending.acquire()
        _leave(text, status)


def _leave(text: str, status: int) -> NoReturn:
    with contextlib.suppress(Exception):
        # A progress bar hides the cursor.
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        sys.stdout.flush()
        print(f"{show_cursor}\n{text}", file=sys.stderr, flush=True)
    os._exit(status)


class Watchdog:
    """End the process, status 1, with the stacks of all threads, `limit` seconds after a `beat`.

    A `limit` of 0 means never. A context manager.
    """

    def __init__(self, limit: float):
        self._limit = limit
        self._doing = ""
        self._until = float("inf")
        self._armed = 0.0
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
        """Note that the loop is alive and begins with `doing`, which may take `times` the limit."""
        if not self._limit or self._left.is_set():
            return
        now = time.monotonic()
        self._doing, self._until = doing, now + times * self._limit
        if now - self._armed > 1 or times == COMPILING:
            self._armed = now
            timeout = times * self._limit + SPARE_SECONDS
            faulthandler.dump_traceback_later(timeout, exit=True, file=sys.__stderr__ or 2)

    def _watch(self) -> None:
        while not self._left.wait(min(1.0, self._limit / 4)):
            if time.monotonic() > self._until:
                faulthandler.dump_traceback(file=sys.__stderr__ or 2)
                advice = "the stacks above say where"
                end(f"stuck: {self._doing} has taken more than config.stuck_after allows; {advice}", 1)
