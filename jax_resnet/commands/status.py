"""The exit status of a command, which tells a launcher whether to try again."""

import sys

from jax_resnet.errors import TransientError, UserError

MISTAKE = 2  # the same command can never succeed: launchers do not restart it
TRANSIENT = 1  # launchers restart it


def exit_status(error: UserError) -> int:
    """Return the exit status of a command that `error` has ended."""
    return TRANSIENT if isinstance(error, TransientError) else MISTAKE


def fail(error: UserError) -> int:
    """Print the one line and return the exit status of a command that `error` has ended."""
    print(f"error: {error}", file=sys.stderr)
    return exit_status(error)
