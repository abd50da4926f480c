"""Errors that a command reports in one line."""

import difflib
import errno
from collections.abc import Iterable

# The machine has run out of disk, quota or open files, or its disk is read-only.
LACKING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)


class UserError(Exception):
    """A mistake of the user: a command prints its one line, without a traceback."""


class TransientError(UserError):
    """A fault of a network, a disk or a killed process: the same command may succeed later."""


class NotPrepared(UserError):
    """A known dataset that is not prepared on this machine."""


class Interrupted(BaseException):
    """The end of a run by the signal `signum`, with its state saved. The text says how to resume.

    Like KeyboardInterrupt it is no Exception, so that a caller's `except Exception` does not start the
    next training.
    """

    def __init__(self, text: str, signum: int):
        super().__init__(text)
        self.signum = signum


def unwritable(path: object, error: OSError) -> UserError:
    """Make the error for a path that cannot be written: transient for errors in LACKING."""
    kind = TransientError if error.errno in LACKING else UserError
    return kind(f"{path}: cannot be written ({error.strerror})")


def first_line(error: BaseException) -> str:
    """Shorten another library's error to one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def did_you_mean(name: str, known: Iterable[str], *, listed: int = 12) -> str:
    """Suggest the nearest known names for an unknown `name`, or else list the first `listed`."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        # Only names nearly as good as the best one are suggested.
        ratios = [difflib.SequenceMatcher(None, other, name).ratio() for other in near]
        near = [other for other, ratio in zip(near, ratios, strict=True) if ratio > ratios[0] - 0.05]
        return f"did you mean {' or '.join(near)}?"
    if not known:
        return "none are known"
    more = f" … ({len(known)} in all)" if len(known) > listed else ""
    return f"known: {', '.join(known[:listed])}{more}"


def choose(what: str, name: str, known: Iterable[str]) -> None:
    """Raise UserError naming `what` and the nearest known name, unless `name` is known."""
    known = list(known)
    if name not in known:
        raise UserError(f"{what}: unknown name {name!r}; {did_you_mean(str(name), known)}")
