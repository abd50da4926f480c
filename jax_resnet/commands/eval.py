"""Evaluate a checkpoint as `python -m jax_resnet.main --mode=eval` does: `jax-resnet eval`."""

import runpy
import sys


def main() -> None:
    """Run the command, as Python would by its module's name."""
    sys.argv.insert(1, "--mode=eval")
    runpy.run_module("jax_resnet.main", run_name="__main__", alter_sys=True)
