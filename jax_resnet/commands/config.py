"""The command `jax-resnet config CONFIG`: prints what the config comes to, draws its rates with --plot."""

import re
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jax_resnet.commands.cli import check_plot
from jax_resnet.config import parse_flags
from jax_resnet.errors import UserError


def main() -> None:
    """Runs the command. Raises UserError for a user's mistake."""
    of = sys.argv[0]  # whose flags a mistyped one is compared with
    config_flags.DEFINE_config_file("config", None, "The config file, with `:argument` where it takes one.")
    flags.DEFINE_string("plot", None, "The learning rate over the epochs, as a PNG.", module_name=of)
    app.define_help_flags()
    argv = list(sys.argv)
    given = any(re.match(r"--?config(=|$)", arg) for arg in argv)
    if len(argv) > 1 and not argv[1].startswith("-"):
        if given:
            raise UserError(f"{argv[1]!r} and --config: give one config")
        argv[1] = f"--config={argv[1]}"
    elif not given and len(argv) > 1 and (later := [arg for arg in argv[1:] if not arg.startswith("-")]):
        raise UserError(f"{later[0]!r}: the config comes first, flags after it")
    parse_flags(argv)
    c, plot = flags.FLAGS.config, flags.FLAGS.plot
    if c is None:
        raise UserError("give a config, for example configs/resnet20_digits.py")
    if plot is not None:
        check_plot(Path(plot))
    from jax_resnet.commands import overview  # loads JAX, for which a mistyped flag should not wait

    experiment, here = overview.prepare(c)
    table = Table.grid(padding=(0, 2))
    for title, rows in overview.sections(c, experiment, here):
        table.add_row(f"[bold]{title}")
        for name, text in rows:
            table.add_row(f"  {name}", Text(text))
        table.add_row()
    if plot is not None:
        overview.draw(experiment, Path(plot))
    Console(highlight=False).print(table)
