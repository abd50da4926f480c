"""The command line: which file a config is, its overrides, and one line for each mistake in them."""

import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jax_resnet.config.defaults import default
from jax_resnet.config.durations import UNITS
from jax_resnet.config.keys import RENAMED, get_key, leaves, near_key
from jax_resnet.errors import UserError, did_you_mean


def config_dirs() -> list[Path]:
    """Return where the project's config files lie: inside the package in an installed wheel, else beside it.

    What lies beside an installed package is another distribution's configs/.
    """
    package = Path(__file__).resolve().parents[1]
    inside, beside = package / "configs", package.parent / "configs"
    return [d for d in ([inside] if inside.is_dir() else [beside]) if d.is_dir()]


def find_config(path: str) -> str:
    """The existing file that `path` (with an optional `:argument`) means; raises UserError with near names.

    Looked for as given, then in the project's configs/, with or without `.py`.
    """
    name, colon, argument = path.partition(":")
    inside = name.removeprefix("configs/")
    found = [Path(name), *(d / inside for d in config_dirs() if not Path(inside).is_absolute())]
    for candidate in found:
        for file in (candidate, candidate.parent / f"{candidate.name}.py"):
            if file.is_file():
                return f"{file}{colon}{argument}"
    known = sorted(f.stem for d in config_dirs() for f in d.glob("*.py"))
    raise UserError(
        f"--config: no file {name!r} here or among the project's configs; " + did_you_mean(Path(name).stem, known)
    )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line into `flags.FLAGS`; raises UserError with one line for any mistake in it.

    Of a duration's units (epochs, steps, examples) the one on the command line replaces the one in the file.
    """
    keys = [key for key, _ in leaves(default())]
    try:
        rest = flags.FLAGS(_with_found_config(list(argv)))
    except UserError:
        raise
    except flags.UnrecognizedFlagError as e:
        if e.flagname.startswith("config."):
            raise UserError(f"--{e.flagname} needs a config to change: give --config=FILE") from None
        meant = RENAMED.get(e.flagname, e.flagname)
        prefixed = [k for k in keys if k == meant or k.endswith(f".{meant}")]
        own = ["config", *(flag.name for flag in flags.FLAGS.get_flags_for_module(sys.argv[0]))]
        hint = f"did you mean --config.{prefixed[0]}?" if prefixed else did_you_mean(e.flagname, own)
        raise UserError(f"--{e.flagname}: no such flag; {hint}") from None
    except (AttributeError, KeyError) as e:  # ml_collections, for a key that the config does not have
        unknown = re.search(r"'(\w+)", str(e))
        mistyped = next((m[1] for a in argv if (m := re.match(r"--?config\.([\w.]+)", a)) and m[1] not in keys), None)
        if not unknown or not mistyped or unknown[1] not in mistyped:
            raise _config_file_fault(e) from None
        raise UserError(f"--config.{mistyped}: no such key; {near_key(mistyped, keys)}") from None
    except (flags.IllegalFlagValueError, TypeError) as e:
        match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(e), re.S)
        if isinstance(e, TypeError) or "Traceback" in str(e):
            raise _config_file_fault(e) from None
        if not match:
            raise UserError(str(e).removeprefix("flag ")) from None
        raise _wrong_type(match[1], match[2], keys) from None
    except flags.Error as e:
        raise UserError(str(e)) from None
    except Exception as e:
        raise _config_file_fault(e) from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r}: not a flag; flags begin with --, values follow =")
    if flags.FLAGS["config"].present and not isinstance(flags.FLAGS.config, ConfigDict):
        raise UserError(f"--config: get_config() returned {type(flags.FLAGS.config).__name__}, not a ConfigDict")
    if flags.FLAGS.config is not None:
        _replace_units(flags.FLAGS.config, config_flags.get_override_values(flags.FLAGS["config"]))
    return rest


def _with_found_config(argv: list[str]) -> list[str]:
    for i, arg in enumerate(argv):
        if re.match(r"--?config=", arg):
            argv[i] = "--config=" + find_config(arg.partition("=")[2])
        elif re.match(r"--?config$", arg):
            if i + 1 < len(argv) and not argv[i + 1].startswith("-"):
                argv[i + 1] = find_config(argv[i + 1])
                continue
            raise UserError("--config: which file? For example --config configs/resnet20_digits.py")
    return argv


def _replace_units(c: ConfigDict, overrides: dict[str, Any]) -> None:
    for key in overrides:
        parent, _, unit = key.rpartition(".")
        siblings = [u for u in UNITS if u != unit and f"{parent}.{u}" not in overrides]
        if unit in UNITS and isinstance(get_key(c, parent), ConfigDict):
            for sibling in siblings:
                get_key(c, parent)[sibling] = None


def _config_file_fault(e: Exception) -> UserError:
    text = str(e).strip()
    if "has no attribute 'get_config'" in text:
        return UserError("--config: the file defines no get_config(), which must return the config")
    frames = traceback.extract_tb(e.__traceback__)
    last = next((frame for frame in reversed(frames) if "ml_collections" not in frame.filename), frames[-1])
    file, line = (e.filename, e.lineno) if isinstance(e, SyntaxError) else (last.filename, last.lineno)
    kind = type(e).__name__
    if "Traceback" in text:  # ml_collections hands on a fault of these types as text
        file, line = re.findall(r'File "([^"]+)", line (\d+)', text)[-1]
        kind, _, text = text.splitlines()[-1].partition(": ")
    missing = re.search(r"""['"](\w+)['"]""", text)
    if last is not frames[-1] and missing:  # ml_collections knows a missing key by its last name
        moved = [old for old in RENAMED if old.rpartition(".")[2] == missing[1]]
        text = f"no key {missing[1]!r}; {moved[0]} is now {RENAMED[moved[0]]}" if moved else text
    return UserError(f"--config: {kind} in {file}, line {line}: {text}")


def _wrong_type(key: str, value: str, keys: Sequence[str]) -> UserError:
    inside = [k for k in keys if k.startswith(f"{key}.")]
    if inside:
        return UserError(f"--config.{key}={value}: {key} is a group of keys; set one, such as --config.{inside[0]}")
    group, _, name = key.rpartition(".")
    parent = get_key(default(), group) if group else default()
    example = f"; for example --config.{key}={parent[name]}" if parent[name] is not None else ""
    return UserError(f"--config.{key}={value}: must be of type {parent.get_type(name).__name__}{example}")
