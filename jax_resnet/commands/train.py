"""Train as `python -m jax_resnet.main` does: `jax-resnet train --config FILE`."""

import runpy


def main() -> None:
    """Run the command, as Python would by its module's name."""
    runpy.run_module("jax_resnet.main", run_name="__main__", alter_sys=True)
