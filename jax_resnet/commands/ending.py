"""How a command ends: nothing said twice, nothing left running."""

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

# What threads and finalizers of libraries raise where the disk is full; the run itself ends with a line about it.
REPORTED_BY_THE_RUN = (
    *(os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)),  # TensorBoard's thread that writes
    *("handle is closed", "Event loop is closed"),  # that thread's queue, and Orbax's loop, as the interpreter ends
)

PLAIN = {"×": "x", "…": "...", "–": "-", "→": "->", "±": "+-", "≤": "<=", "·": "*"}


def lacking(error: Exception) -> UserError:
    """Return, in one line, that memory, disk or files ran out. Raises `error` again if it says nothing of the kind."""
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
    """Silence what libraries log, and what their threads and finalizers raise where the run itself reports the fault.

    On a full disk TensorBoard's writer raises an OSError in its thread, and Orbax leaves a closed event loop and a
    coroutine that was never awaited. Those texts alone are left out. `sys.excepthook` stays as it is: what ends the
    main thread is always printed.
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
    """Have what a terminal cannot print, × or an accent, replaced rather than raise UnicodeEncodeError."""

    def replaced(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        text = error.object[error.start : error.end]
        return "".join(PLAIN.get(character, "?") for character in text), error.end

    codecs.register_error("plain", replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def leave(status: int) -> int:
    """Return `status`, to exit with; or exit with it at once where a thread would keep the process for minutes.

    Of a job of several processes each leaves together with the others.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # Whoever read it has gone; Python would try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    names = {thread.name for thread in threading.enumerate()}
    jax: Any = sys.modules.get("jax")  # a mistyped flag ends before JAX is loaded
    if jax and jax.distributed.is_initialized() and MEETING_THREAD not in names:
        from jax_resnet.commands.failure import part

        part(status)
    if {COMPILER_THREAD, MEETING_THREAD} & names:
        sys.stderr.flush()
        os._exit(status)
    return status
