"""What a user did wrong, in one line."""

import difflib
import errno
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from absl import logging

LACKING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)  # what the machine has no more of


class UserError(Exception):
    """A mistake in what the user gave: a command prints its one line, without a traceback, and exits with status 2."""


class Unmet(UserError):
    """The other processes of a job have not come: the same command may find them later."""


class NotPrepared(UserError):
    """A dataset that is known, but not prepared on this machine."""


class Interrupted(Exception):
    """A signal ended the run; its state is saved. The text says how to go on, `signum` which signal it was."""

    def __init__(self, text: str, signum: int):
        super().__init__(text)
        self.signum = signum


def fail(error: UserError) -> int:
    """Prints the one line; returns the exit status of a command that a user's mistake has ended."""
    print(f"error: {error}", file=sys.stderr)
    return 1 if isinstance(error, Unmet) else 2


def lacking(error: Exception) -> UserError:
    """As a user's mistake, that memory, disk or files ran out. Raises `error` again if it says nothing of the kind."""
    if isinstance(error, MemoryError) or re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
        return UserError(
            f"memory ran out ({first_line(error)}); give a smaller config.batch_size, a larger config.accumulate or a "
            "smaller network"
        )
    if isinstance(error, OSError) and error.errno in LACKING:
        return UserError(f"{error.filename or 'a file of the run'}: cannot be written or opened ({error.strerror})")
    raise error


def hush() -> None:
    """Leaves unprinted what libraries log, and what their threads raise where a disk is full: the run says so itself.

    Of TensorBoard's writer that is an OSError; of Orbax's, after an error, that its event loop is closed, and when the
    process ends that it did not wait for what it had begun.
    """
    logging.set_verbosity(logging.FATAL)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)

    def heard(hook: Callable[..., Any], error: Callable[..., BaseException | None]) -> Callable[..., None]:
        def hooked(*args: Any) -> None:
            found = error(*args)
            if not isinstance(found, OSError) and str(found) != "Event loop is closed":
                hook(*args)

        return hooked

    sys.excepthook = heard(sys.__excepthook__, lambda _, error, __: error)
    sys.unraisablehook = heard(sys.__unraisablehook__, lambda args: args.exc_value)
    threading.excepthook = heard(threading.__excepthook__, lambda args: args.exc_value)


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
