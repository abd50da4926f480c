"""End a command: report nothing twice, leave nothing running."""

import codecs
import errno
import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

from absl import logging

from jax_resnet.errors import LACKING, TransientError, UserError, first_line
from jax_resnet.runtime.host import COMPILER_THREAD, MEETING_THREAD

# Errors of libraries' threads and finalizers on a full disk, which the run itself reports.
REPORTED_BY_THE_RUN = (
    # TensorBoard's writing thread.
    *(os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)),
    # The queue of that thread, and Orbax's event loop, when the interpreter ends.
    *("handle is closed", "Event loop is closed"),
)

PLAIN = {"×": "x", "…": "...", "–": "-", "→": "->", "±": "+-", "≤": "<=", "·": "*"}


def lacking(error: Exception) -> UserError:
    """Make the error for memory, disk or files that ran out. Raises `error` again if none did."""
    if isinstance(error, MemoryError) or re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
        return UserError(
            f"memory ran out ({first_line(error)}); give a smaller config.batch_size, a larger config.accumulate or a "
            "smaller network"
        )
    if isinstance(error, OSError) and error.errno in LACKING:
        return TransientError(
            f"{error.filename or 'a file of the run'}: cannot be written or opened ({error.strerror})"
        )
    raise error


def hush() -> None:
    """Silence the logs of libraries, and errors of their threads that the run itself reports.

    On a full disk TensorBoard's writer raises an OSError in its thread, and Orbax leaves a closed event
    loop and a coroutine that was never awaited. Only those texts are left out. `sys.excepthook` stays
    unchanged: an error that ends the main thread is always printed.
    """
    logging.set_verbosity(logging.FATAL)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)

    def unless_reported(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
        def filtered(args: Any) -> None:
            if not any(text in str(args.exc_value) for text in REPORTED_BY_THE_RUN):
                hook(args)

        return filtered

    sys.unraisablehook = unless_reported(sys.__unraisablehook__)
    threading.excepthook = unless_reported(threading.__excepthook__)


def print_plainly() -> None:
    """Replace characters that a terminal cannot print, × or an accent, without an error."""

    def replaced(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        text = error.object[error.start : error.end]
        return "".join(PLAIN.get(character, "?") for character in text), error.end

    codecs.register_error("plain", replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def discard_output() -> None:
    """Print nothing more to a stdout whose reader is gone, as behind `| head`: Python flushes once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def leave(status: int) -> int:
    """Return the exit `status`, or exit at once if a thread would keep the process for minutes.

    The processes of a job exit together.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
    names = {thread.name for thread in threading.enumerate()}
    # A mistyped flag ends the command before JAX is loaded.
    jax: Any = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized() and MEETING_THREAD not in names:
        from jax_resnet.commands.failure import part

        part(status)
    if {COMPILER_THREAD, MEETING_THREAD} & names:
        sys.stderr.flush()
        os._exit(status)
    return status
