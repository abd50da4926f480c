"""Print the numbers of a config, and plot its learning rate: `jax-resnet config CONFIG`."""

import sys
from pathlib import Path

from absl import flags

from jax_resnet.commands.cli import check_plot, parse_config, print_rows


def main() -> None:
    """Run the command. Raises UserError for a user's mistake."""
    # Suggestions for a mistyped flag come from the flags of the program's own module.
    flags.DEFINE_string("plot", None, "The learning rate over the epochs, as a PNG.", module_name=sys.argv[0])
    config = parse_config()
    plot = flags.FLAGS.plot
    if plot is not None:
        check_plot(Path(plot))
    # This import loads JAX, for which a mistyped flag should not wait.
    from jax_resnet.commands import overview

    experiment = overview.prepare(config)
    print_rows("keys that differ from the defaults", overview.changed_keys(config))
    print_rows("numbers that follow", overview.derived_numbers(experiment) | overview.parameters(experiment))
    print_rows("learning rate", overview.learning_rates(experiment))
    if plot is not None:
        overview.draw(experiment, Path(plot))
