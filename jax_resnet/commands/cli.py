"""What the commands beside `main` share: flags, pictures, and a user's mistake as one line."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import logging

from jax_resnet.commands.ending import print_plainly
from jax_resnet.commands.status import fail
from jax_resnet.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse, except that a mistake is one line that says what was meant."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        if message.startswith("unrecognized arguments") and unknown.startswith("-"):
            message = f"{unknown}: no such flag; {did_you_mean(unknown, flags)}"
        raise UserError(message)


def whole(flag: str, text: str, most: int = 999_999_999) -> int:
    """The number that a flag was given. Raises UserError if it is none from 1 to `most`."""
    if not (re.fullmatch(r"[1-9]\d{0,8}", text) and int(text) <= most):
        raise UserError(f"{flag}={text}: must be a whole number, from 1 to {most}")
    return int(text)


def check_plot(file: Path) -> None:
    """Raises UserError for a --plot that `save_plot` could not write, before time is spent on what it shows."""
    if file.suffix.lower() != ".png":
        raise UserError(f"--plot={file}: must end in .png")
    check_writable("--plot", file)


def check_writable(flag: str, file: Path) -> None:
    """Raises UserError for a file that could not be written, before time is spent on what it is to hold."""
    if os.path.isdir(file) or not os.access(file if os.path.exists(file) else file.parent, os.W_OK):
        raise UserError(f"{flag}={file}: cannot be written; is {file.parent} a folder that you may write to?")


def save_plot(figure: Any, file: Path) -> None:
    """Writes a figure of matplotlib as a PNG. Raises UserError if it cannot be written."""
    try:
        figure.savefig(file, dpi=120, format="png")
    except OSError as e:
        raise UserError(f"--plot={file}: cannot be written ({e.strerror})") from None


def print_files(files: Sequence[os.PathLike[str]]) -> None:
    """Says what `write_model` has written."""
    print("\n".join(map(str, files)))
    if len(files) == 1:
        print("timm has no network of this shape, so no config.json; names and layouts are those it would have")


def run(main: Callable[[], None]) -> None:
    """Runs a command and leaves with its exit status: 2, after one line on stderr, for a user's mistake."""
    logging.set_verbosity(logging.ERROR)  # Orbax and JAX report at length
    print_plainly()
    try:
        main()
    except UserError as e:
        sys.exit(fail(e))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
