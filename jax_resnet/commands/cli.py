"""Share among commands: flags, configs, files to write, rows to print, one-line errors."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from jax_resnet.commands.ending import discard_output, print_plainly
from jax_resnet.commands.status import fail
from jax_resnet.config import parse_flags
from jax_resnet.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """Parse arguments as argparse does, and report a mistake in one line that suggests a flag."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        if message.startswith("unrecognized arguments") and unknown.startswith("-"):
            message = f"{unknown}: no such flag; {did_you_mean(unknown, known)}"
        raise UserError(message)


def positive_integer(flag: str, text: str, most: int = 999_999_999) -> int:
    """Parse the value of a flag. Raises UserError if it is not an integer from 1 to `most`."""
    if not (re.fullmatch(r"[1-9]\d{0,8}", text) and int(text) <= most):
        raise UserError(f"{flag}={text}: must be a whole number, from 1 to {most}")
    return int(text)


def parse_config() -> ConfigDict:
    """Parse the command line into `flags.FLAGS`; return the config, the first argument or --config.

    Raises UserError for a mistake in it, and if it has no config or two.
    """
    config_flags.DEFINE_config_file("config", None, "The config file, with `:argument` where it takes one.")
    app.define_help_flags()
    argv = list(sys.argv)
    if len(argv) > 1 and not argv[1].startswith("-"):
        argv[1] = f"--config={argv[1]}"
    if sum(bool(re.match(r"--?config(=|$)", argument)) for argument in argv) > 1:
        raise UserError("--config: given twice, counting the first argument; give one config")
    parse_flags(argv)
    if flags.FLAGS.config is None:
        raise UserError("--config is missing: give a config, for example configs/resnet20_digits.py")
    return flags.FLAGS.config


def check_plot(file: Path) -> None:
    """Raise UserError for a --plot that `save_plot` could not write, before time is spent on it."""
    if file.suffix.lower() != ".png":
        raise UserError(f"--plot={file}: must end in .png")
    check_writable("--plot", file)


def check_writable(flag: str, file: Path) -> None:
    """Raise UserError for a file that could not be written, before time is spent on its content."""
    target = file if os.path.exists(file) else file.parent
    if os.path.isdir(file) or not os.access(target, os.W_OK):
        raise UserError(f"{flag}={file}: cannot be written; is {file.parent} a folder that you may write to?")


def save_plot(figure: Any, file: Path) -> None:
    """Write a figure of matplotlib as a PNG. Raises UserError if it cannot be written."""
    try:
        figure.savefig(file, dpi=120, format="png")
    except OSError as e:
        raise UserError(f"--plot={file}: cannot be written ({e.strerror})") from None


def print_rows(title: str, rows: Mapping[str, str]) -> None:
    """Print a title, and below it each name beside its text of one line or more."""
    width = max(map(len, rows), default=0) + 2
    print(title)
    for name, text in rows.items():
        print("  " + name.ljust(width) + text.replace("\n", "\n  " + " " * width))
    print()


def print_files(files: Sequence[os.PathLike[str]]) -> None:
    """Print the files that `write_model` has written."""
    print("\n".join(map(str, files)))
    if len(files) == 1:
        print("timm has no network of this shape, so no config.json; names and layouts are those it would have")


def run(main: Callable[[], None]) -> None:
    """Run a command and exit with its status: 2, after one line on stderr, for a user's mistake."""
    # Orbax and JAX log at length.
    logging.set_verbosity(logging.ERROR)
    print_plainly()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        sys.exit(128 + signal.SIGPIPE)
    except UserError as e:
        sys.exit(fail(e))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
