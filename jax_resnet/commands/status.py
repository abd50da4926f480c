"""Choose the exit status of a command, which tells a launcher whether to restart it."""

import sys

from jax_resnet.errors import TransientError, UserError

# The same command can never succeed: launchers do not restart it.
MISTAKE = 2
# Launchers restart the command.
TRANSIENT = 1


def exit_status(error: UserError) -> int:
    """Return the exit status of a command that ends by `error`."""
    return TRANSIENT if isinstance(error, TransientError) else MISTAKE


def fail(error: UserError) -> int:
    """Print the line of `error`, and return the exit status of a command that ends by it."""
    print(f"error: {error}", file=sys.stderr)
    return exit_status(error)
