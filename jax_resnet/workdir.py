"""The folder of one run: who may write it, and the config it was begun with."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jax_resnet.config import differences, from_json, to_json
from jax_resnet.errors import UserError


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes all of it or nothing."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, file)


def read_config(workdir: Path) -> ConfigDict | None:
    """The config a workdir was begun with, None if it was not. Raises UserError if the file is damaged."""
    file = workdir / "config.json"
    try:
        return from_json(json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: cannot be read ({e}); restore it, or choose another workdir") from None


def claim(workdir: Path, config: ConfigDict) -> Path:
    """Makes the folder and writes config.json, or checks that the one there is of the same run; returns the folder.

    Raises UserError if the folder cannot be written, or names what differs.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as e:
        raise UserError(f"--workdir={workdir}: cannot be written ({e.strerror}); choose another") from None
    stored = read_config(workdir)
    if stored is not None:
        check_same_config(stored, config, workdir)
    elif jax.process_index() == 0:
        write_json(workdir / "config.json", to_json(config))
    return workdir


def check_same_config(stored: ConfigDict, config: ConfigDict, workdir: Path, group: str = "") -> None:
    """Raises UserError naming every key, of those that begin with `group`, that makes the two compute other things."""
    if different := [text for text in differences(stored, config) if text.startswith(group)]:
        raise UserError(
            f"--workdir={workdir}: holds a run of another config ({'; '.join(different)}); "
            "choose another workdir, or delete this one"
        )
