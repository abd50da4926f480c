"""Claim the folder of a run, and read the config that it was started with."""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from jax_resnet.config import differences, from_json, to_json
from jax_resnet.errors import UserError
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.paths import COMMITTED, AnyPath, absolute, is_remote, make_folder, names, read, write

# About four programs of a run take longer to compile.
MIN_COMPILE_SECONDS = 0.1
_sharing = threading.Lock()  # guards the two below
_sharers: list[AnyPath] = []  # workdirs of running trainings
_cache = contextlib.ExitStack()  # restores JAX's own cache


def write_json(file: AnyPath, content: dict[str, Any]) -> None:
    """Write JSON atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    write(file, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def has_checkpoints(workdir: AnyPath) -> bool:
    """Tell whether a checkpoint has been saved completely."""
    folder = workdir / "checkpoints"
    steps = [folder / name for name in names(folder) if name.isdigit()]
    if is_remote(workdir):
        return any((step / COMMITTED).exists() for step in steps)
    return bool(steps)


def read_config(workdir: AnyPath) -> ConfigDict | None:
    """Read the config of a workdir, from config.json or else the newest checkpoint.

    Returns None if there is neither. Raises UserError if the file or the checkpoint is damaged.
    """
    file = workdir / "config.json"
    try:
        values = json.loads(read(file))
        if not isinstance(values, dict) or not values:
            raise ValueError("it holds no config")
        return from_json(values)
    except FileNotFoundError:
        if not has_checkpoints(workdir):
            return None
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{file}: cannot be read ({e}); delete it, the checkpoints hold it too") from None
    with Checkpoints(workdir) as checkpoints:
        return from_json(checkpoints.config(checkpoints.latest_step() or 0))


@contextlib.contextmanager
def claimed(workdir: AnyPath, config: ConfigDict) -> Iterator[ConfigDict | None]:
    """Make the folder of a run and lock it; write config.json, or compare the stored config.

    Yields the stored config, None if nothing has been saved yet: the folder then takes the new one.
    `progressive` may differ, see training.resume.check_same_past. An object store has no locks, so
    nothing keeps another run out of one. Raises UserError if the folder cannot be written or is in
    use, and UserError naming the keys that differ.
    """
    with contextlib.ExitStack() as stack:
        try:
            make_folder(workdir)
            local = () if is_remote(workdir) else (workdir, workdir / "checkpoints")
            if any(folder.exists() and not os.access(folder, os.W_OK) for folder in local):
                raise PermissionError(13, "Permission denied")
            if local and jax.process_index() == 0:
                lock = stack.enter_context((workdir / "lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--workdir={workdir}: another process is training in it; wait, or choose another"
            ) from None
        except OSError as e:
            raise UserError(f"--workdir={workdir}: cannot be written ({e.strerror}); choose another") from None
        stored = read_config(workdir) if has_checkpoints(workdir) else None
        if stored is not None:
            compared = stored.copy_and_resolve_references()
            compared.progressive = config.progressive
            check_same_config(compared, config, workdir)
        if jax.process_index() == 0 and (stored is None or not (workdir / "config.json").exists()):
            write_json(workdir / "config.json", to_json(config))
        yield stored


@contextlib.contextmanager
def keeping_compiled(workdir: AnyPath) -> Iterator[None]:
    """Keep compiled programs in workdir/compiled, unless JAX_COMPILATION_CACHE_DIR is set.

    Only the first process of a job writes the cache, and all read it, also those that replace a
    preempted one: so it lies in the workdir. JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. JAX has
    one cache a process: trainings in threads share that of the first, until the last of them ends.
    """
    with _sharing:
        if not _sharers:
            _cache.enter_context(_cache_in(workdir))
        _sharers.append(workdir)
    try:
        yield
    finally:
        with _sharing:
            _sharers.remove(workdir)
            if not _sharers:
                _cache.close()


@contextlib.contextmanager
def _cache_in(workdir: AnyPath) -> Iterator[None]:
    if jax.config.values["jax_compilation_cache_dir"]:
        yield
        return
    previous = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    try:
        compilation_cache.set_cache_dir(str(absolute(workdir) / "compiled"))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
        yield
    finally:
        compilation_cache.set_cache_dir(None)
        # JAX would otherwise go on using this folder.
        compilation_cache.reset_cache()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", previous)


def check_same_config(stored: ConfigDict, config: ConfigDict, workdir: AnyPath, group: str = "") -> None:
    """Raise UserError naming every key in `group` by which two configs compute other things."""
    if different := [text for text in differences(stored, config) if text.startswith(group)]:
        hint = ""
        if different[0].startswith("batch_size:"):
            hint = (
                f"; to change it from some share of the training on, give --config.batch_size={stored.batch_size} and "
                f"--config.progressive='((0, SIZE, {stored.batch_size}), (SHARE, SIZE, {config.batch_size}))'"
            )
        raise UserError(
            f"--workdir={workdir}: holds a run of another config ({'; '.join(different)}); "
            f"choose another workdir, or delete this one{hint}"
        )
