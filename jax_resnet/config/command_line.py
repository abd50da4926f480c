"""The command line: the config's file, its overrides, and one line for each mistake in them."""

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
    """Return the folder of the project's config files: inside an installed package, else beside it.

    A configs/ beside an installed package belongs to another distribution. The list is empty where
    there is no such folder.
    """
    package = Path(__file__).resolve().parents[1]
    folders = (package / "configs", package.parent / "configs")
    return [folder for folder in folders if folder.is_dir()][:1]


def find_config(path: str) -> str:
    """Return the existing file that `path`, with an optional `:argument`, means.

    It is searched as it is, then in the project's configs/, with or without `.py`. Raises UserError
    with near names if there is none.
    """
    name, colon, argument = path.partition(":")
    relative = name.removeprefix("configs/")
    candidates = [Path(name)]
    if not Path(relative).is_absolute():
        candidates += [folder / relative for folder in config_dirs()]
    for candidate in candidates:
        for file in (candidate, candidate.parent / f"{candidate.name}.py"):
            if file.is_file():
                return f"{file}{colon}{argument}"
    known = sorted(f.stem for d in config_dirs() for f in d.glob("*.py"))
    raise UserError(
        f"--config: no file {name!r} here or among the project's configs; " + did_you_mean(Path(name).stem, known)
    )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parse the command line into `flags.FLAGS`; return the arguments that are no flags.

    The unit of a duration (epochs, steps, examples) on the command line replaces that of the file.
    Raises UserError with one line for any mistake.
    """
    keys = [key for key, _ in leaves(default())]
    try:
        rest = flags.FLAGS(_find_config_flag(list(argv)))
    except UserError:
        raise
    except flags.UnrecognizedFlagError as e:
        raise _unknown_flag(e.flagname, keys) from None
    except (AttributeError, KeyError) as e:
        # ml_collections raises these for a key that the config does not have.
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


def _unknown_flag(name: str, keys: Sequence[str]) -> UserError:
    if name.startswith("config."):
        return UserError(f"--{name} needs a config to change: give --config=FILE")
    meant = RENAMED.get(name, name)
    for key in keys:
        if key == meant or key.endswith(f".{meant}"):
            return UserError(f"--{name}: no such flag; did you mean --config.{key}?")
    own = ["config", *(flag.name for flag in flags.FLAGS.get_flags_for_module(sys.argv[0]))]
    return UserError(f"--{name}: no such flag; {did_you_mean(name, own)}")


def _find_config_flag(argv: list[str]) -> list[str]:
    for i, arg in enumerate(argv):
        if re.match(r"--?config=", arg):
            argv[i] = "--config=" + find_config(arg.partition("=")[2])
        elif re.match(r"--?config$", arg):
            if i + 1 < len(argv) and not argv[i + 1].startswith("-"):
                argv[i + 1] = find_config(argv[i + 1])
                continue
            raise UserError("--config: which file? For example --config configs/resnet20_digits.py")
    return argv


def _replace_units(config: ConfigDict, overrides: dict[str, Any]) -> None:
    for key in overrides:
        parent, _, unit = key.rpartition(".")
        siblings = [u for u in UNITS if u != unit and f"{parent}.{u}" not in overrides]
        if unit in UNITS and isinstance(get_key(config, parent), ConfigDict):
            for sibling in siblings:
                get_key(config, parent)[sibling] = None


def _config_file_fault(e: Exception) -> UserError:
    text = str(e).strip()
    if "has no attribute 'get_config'" in text:
        return UserError("--config: the file defines no get_config(), which must return the config")
    frames = traceback.extract_tb(e.__traceback__)
    last = next((frame for frame in reversed(frames) if "ml_collections" not in frame.filename), frames[-1])
    file: str | None = last.filename
    line = last.lineno
    if isinstance(e, SyntaxError):
        file = e.filename
        line = e.lineno
    kind = type(e).__name__
    if "Traceback" in text:
        # ml_collections passes a TypeError and the like on as text.
        file, line = re.findall(r'File "([^"]+)", line (\d+)', text)[-1]
        kind, _, text = text.splitlines()[-1].partition(": ")
    missing = re.search(r"""['"](\w+)['"]""", text)
    if last is not frames[-1] and missing:
        # ml_collections names a missing key by its last part only.
        moved = [old for old in RENAMED if old.rpartition(".")[2] == missing[1]]
        if moved:
            text = f"no key {missing[1]!r}; {moved[0]} is now {RENAMED[moved[0]]}"
    return UserError(f"--config: {kind} in {file}, line {line}: {text}")


def _wrong_type(key: str, value: str, keys: Sequence[str]) -> UserError:
    inside = [k for k in keys if k.startswith(f"{key}.")]
    if inside:
        return UserError(f"--config.{key}={value}: {key} is a group of keys; set one, such as --config.{inside[0]}")
    group, _, name = key.rpartition(".")
    parent = get_key(default(), group) if group else default()
    message = f"--config.{key}={value}: must be of type {parent.get_type(name).__name__}"
    if parent[name] is not None:
        message += f"; for example --config.{key}={parent[name]}"
    return UserError(message)
