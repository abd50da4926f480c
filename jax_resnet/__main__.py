"""Run a command: `python -m jax_resnet COMMAND …`, or the console script `jax-resnet`."""

import importlib
import sys

from jax_resnet.commands.cli import run
from jax_resnet.errors import UserError, did_you_mean

COMMANDS = {
    "train": "train as a config says, or go on from the newest checkpoint",
    "eval": "evaluate a checkpoint of a run",
    "config": "print what a config comes to",
    "compile": "say what a training takes, on devices that are not here too",
    "summarize": "count what networks cost",
    "checkpoints": "list what a run has saved, and verify it",
    "average": "average the weights of a run's checkpoints",
    "export": "write a run's weights for other programs",
    "prepare": "write a dataset once, to be read fast at random",
}


def main() -> None:
    """Run the command that the first argument names. JAX is not loaded before."""
    run(_command)


def _command() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "-help", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:<{width}}  {purpose}" for command, purpose in COMMANDS.items()]
        print("usage: jax-resnet COMMAND …; jax-resnet COMMAND --help has its flags", "", *lines, sep="\n")
        return
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command; {did_you_mean(name, COMMANDS)}")
    sys.argv[:2] = [f"jax-resnet {name}"]
    importlib.import_module(f"jax_resnet.commands.{name}").main()


if __name__ == "__main__":
    main()
