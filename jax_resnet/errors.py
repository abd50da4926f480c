"""What a user did wrong, in one line."""

import difflib
import errno
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from absl import logging

LACKING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)  # what the machine has no more of
# What threads and finalizers of libraries raise where the disk is full; the run itself ends with a line about it.
REPORTED_BY_THE_RUN = (
    *(os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)),  # TensorBoard's thread that writes
    *("handle is closed", "Event loop is closed"),  # that thread's queue, and Orbax's loop, as the interpreter ends
)


class UserError(Exception):
    """A mistake in what the user gave: a command prints its one line, without a traceback, and exits with `status`."""

    status = 2  # the same command can never succeed: launchers do not restart it


class TransientError(UserError):
    """A fault of a network, a disk or a killed process, told in one line too: the same command may succeed later."""

    status = 1  # launchers restart it


class NotPrepared(UserError):
    """A dataset that is known, but not prepared on this machine."""


class Interrupted(BaseException):
    """A signal ended the run; its state is saved. The text says how to go on, `signum` which signal it was.

    No Exception, as KeyboardInterrupt is none: a caller's `except Exception` shall not go on with the next training.
    """

    def __init__(self, text: str, signum: int):
        super().__init__(text)
        self.signum = signum


def fail(error: UserError) -> int:
    """Print the one line and return the exit status of a command that `error` has ended."""
    print(f"error: {error}", file=sys.stderr)
    return error.status


def unwritable(path: object, error: OSError) -> UserError:
    """Return the error for a file or folder that cannot be written: transient where the machine has run out of room."""
    kind = TransientError if error.errno in LACKING else UserError
    return kind(f"{path}: cannot be written ({error.strerror})")


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


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def did_you_mean(name: str, known: Iterable[str], *, listed: int = 12) -> str:
    """The end of an error line about an unknown `name`: the nearest known names, or the first `listed` of them."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:  # the best, and what is nearly as good
        likeness = [difflib.SequenceMatcher(None, found, name).ratio() for found in near]
        near = [found for found, ratio in zip(near, likeness, strict=True) if ratio > likeness[0] - 0.05]
        return f"did you mean {' or '.join(near)}?"
    more = f" … ({len(known)} in all)" if len(known) > listed else ""
    return f"known: {', '.join(known[:listed])}{more}" if known else "none are known"


def choose(what: str, name: str, known: Iterable[str]) -> None:
    """Raises UserError naming `what` and the nearest known name, unless `name` is among `known`."""
    known = list(known)
    if name not in known:
        raise UserError(f"{what}: unknown name {name!r}; {did_you_mean(str(name), known)}")
