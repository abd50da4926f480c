"""The folder of one run: who writes it, and the config it was begun with."""

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

WORTH_KEEPING = 0.1  # seconds of compiling: of a run's programs about four take more
_sharing = threading.Lock()  # held while the two below change
_sharers: list[AnyPath] = []  # workdirs of the trainings under way
_cache = contextlib.ExitStack()  # leaves JAX's cache as it was


def write_json(file: AnyPath, content: dict[str, Any]) -> None:
    """Writes all of it or nothing. Raises ValueError for a number that JSON does not have (nan, infinity)."""
    write(file, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def has_checkpoints(workdir: AnyPath) -> bool:
    """Whether something has been saved whole."""
    folder = workdir / "checkpoints"
    steps = [folder / name for name in names(folder) if name.isdigit()]
    return any((step / COMMITTED).exists() for step in steps) if is_remote(workdir) else bool(steps)


def read_config(workdir: AnyPath) -> ConfigDict | None:
    """The config a workdir was begun with, from config.json or else the newest checkpoint; None if there is neither.

    Raises UserError if what is there is damaged.
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
    """Makes the folder and keeps other runs out of it; writes config.json, or checks that the run there is the same.

    Gives the config of the run that is there, None if nothing has been saved yet: then the folder takes the new one.
    Its `progressive` may differ, see loop.check_same_past. An object store has no locks: nothing keeps another run
    out of one. Raises UserError if the folder cannot be written, is in use, or names what differs.
    """
    with contextlib.ExitStack() as stack:
        try:
            make_folder(workdir)
            local = [] if is_remote(workdir) else [workdir, workdir / "checkpoints"]
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
    """Keep in workdir/compiled what JAX compiles, unless it has a place already (JAX_COMPILATION_CACHE_DIR).

    Of a job's processes the first alone writes it, and all read: it has to be where they all, and those that take the
    place of a preempted one, find it, and that the workdir is. JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
    JAX has one place a process. Trainings in threads share that of the first, until the last of them ends.
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
    least = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    try:
        compilation_cache.set_cache_dir(str(absolute(workdir) / "compiled"))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
        yield
    finally:
        compilation_cache.set_cache_dir(None)
        compilation_cache.reset_cache()  # it would stay with this folder
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def check_same_config(stored: ConfigDict, config: ConfigDict, workdir: AnyPath, group: str = "") -> None:
    """Raises UserError naming every key, of those that begin with `group`, that makes the two compute other things."""
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
