"""What a user did wrong, in one line."""

import difflib
import errno
from collections.abc import Iterable

LACKING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)  # what the machine has no more of


class UserError(Exception):
    """A mistake in what the user gave: a command prints its one line, without a traceback."""


class TransientError(UserError):
    """A fault of a network, a disk or a killed process, told in one line too: the same command may succeed later."""


class NotPrepared(UserError):
    """A dataset that is known, but not prepared on this machine."""


class Interrupted(BaseException):
    """A signal ended the run; its state is saved. The text says how to go on, `signum` which signal it was.

    No Exception, as KeyboardInterrupt is none: a caller's `except Exception` shall not go on with the next training.
    """

    def __init__(self, text: str, signum: int):
        super().__init__(text)
        self.signum = signum


def unwritable(path: object, error: OSError) -> UserError:
    """Return the error for a file or folder that cannot be written: transient where the machine has run out of room."""
    kind = TransientError if error.errno in LACKING else UserError
    return kind(f"{path}: cannot be written ({error.strerror})")


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
