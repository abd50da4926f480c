"""The one place that knows Orbax: checkpoints of (state, config) in a workdir, saved while training goes on.

    jax-resnet checkpoints verify runs/mine      # or inspect, which does not read the arrays

Orbax writes a step whole or not at all, but keeps no checksums: flipped bits load in silence. Here each step has a
record with a digest of every array and of itself, and nothing is used that does not agree with it.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from jax_resnet.errors import TransientError, UserError, first_line
from jax_resnet.runs import s3
from jax_resnet.runs.metrics_log import evaluations
from jax_resnet.runs.paths import COMMITTED, AnyPath, absolute, is_remote, make_folder, move, names
from jax_resnet.runtime.distributed import all_agree, of_first_process

BEST_BY = {"accuracy_top1": 1, "accuracy_top5": 1, "loss": -1}  # times what is largest for the best
FORMAT = 1  # of the record
# What tensorstore says where nothing is damaged, but the file system or the network does not give it.
REFUSED = re.compile("PERMISSION_DENIED|UNAUTHENTICATED")
UNAVAILABLE = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|CANCELLED")
# Orbax numbers the saves of a process and, while it starts one, looks up the newest number time and again to tell whose
# folders to wait for. A save that another thread starts meanwhile would be taken for it, so they start in turn.
_STARTING = threading.Lock()

Fields = dict[str, Any]  # what is saved, by name: "step", a replicated array, and trees of arrays


class Damaged(UserError):
    """A checkpoint whose files are not what was saved."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `latest`, the `best` by `metric` of those evaluated, and those that `always` says."""

    latest: int = 2
    best: int = 1
    metric: str = "accuracy_top1"
    always: Callable[[int], bool] = lambda step: False

    def of(self, steps: Sequence[int], scores: Mapping[int, float]) -> set[int]:
        """Those of `steps` that stay, where the evaluated ones have those scores, the larger the better."""
        evaluated = sorted((step for step in steps if step in scores), key=lambda step: (scores[step], step))
        kept = {*sorted(steps)[-self.latest :], *(step for step in steps if self.always(step))}
        return kept | (set(evaluated[-self.best :]) if self.best else set())


class Checkpoints:
    """The checkpoints under workdir/checkpoints. Without `keep` they are only read, also beside a process that saves.

    A context manager: leaving it waits until what was saved is on disk.
    """

    def __init__(self, workdir: AnyPath, keep: Keep | None = None):
        self.directory = absolute(workdir) / "checkpoints"
        self._workdir, self._keep = workdir, keep
        self._evaluations: dict[int, Mapping[str, Mapping[str, Any]]] = dict(evaluations(workdir))
        self._writer: Any = None
        if str(workdir).startswith("s3://"):
            s3.teach_orbax()
        self.blocked = 0.0  # seconds for which saving has held up its caller

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            with self._one_line("written"):
                self._writer.close()

    # -- what there is

    def steps(self) -> list[int]:
        """All steps saved whole, ascending."""
        found = [name for name in names(self.directory) if name.isdigit()]
        if is_remote(self.directory):  # where folders are not renamed when they are whole
            found = [name for name in found if (self.directory / name / COMMITTED).exists()]
        return sorted(map(int, found))

    def latest_step(self) -> int | None:
        """The newest step saved whole, None if there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best evaluation that metrics.jsonl knows of, None if it knows none."""
        scores, steps = self._scores(), self.steps()
        return max((step for step in steps if step in scores), key=lambda step: (scores[step], step), default=None)

    def find(self, which: str) -> int:
        """The step meant by "best" (the latest if none was evaluated), "latest" or a number; UserError if not there."""
        named = {"best": self.best_step() or self.latest_step(), "latest": self.latest_step()}
        if which not in named and not which.isdigit():
            raise UserError(f"checkpoint {which!r}: must be best, latest or a step")
        step = named[which] if which in named else int(which)
        if step is None or step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.directory.parent}: no checkpoint at step {which}; saved: {known}")
        return step

    # -- saving

    def save(self, step: int, fields: Fields, config: dict[str, Any]) -> None:
        """Start saving; return when the arrays have been copied. A step that is saved already is left.

        Raises UserError if an earlier save has failed, or the folder has gone.
        """
        if step not in self.steps():
            began = time.monotonic()
            self._check_there()
            with jax.transfer_guard("allow"), self._one_line("written"):  # Orbax copies to the host as it sees fit
                items = {
                    "state": ocp.args.StandardSave(fields),
                    "record": ocp.args.JsonSave(_record(fields, config)),
                }
                writer = self._manager()
                # Orbax would do this itself, but then under the lock: one training would wait for another's disk.
                writer.wait_until_finished()
                with _STARTING:
                    writer.save(step, args=ocp.args.Composite(**items), force=True)
            self.blocked += time.monotonic() - began

    def evaluated(self, step: int, splits: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes note of how good the state at `step` is: what is best stays."""
        self._evaluations[step] = splits

    def check(self) -> None:
        """Raises UserError if what is being saved could not be written. Takes no time."""
        if self._writer:
            with self._one_line("written"):
                self._writer.check_for_errors()

    def wait(self) -> None:
        """Returns when everything is on disk; raises UserError if it could not be written."""
        if self._writer:
            began = time.monotonic()
            with self._one_line("written"):
                self._writer.wait_until_finished()
                self._writer.check_for_errors()
            self.blocked += time.monotonic() - began

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question which of `checkpoints` to keep."""
        del context
        assert self._keep
        kept = self._keep.of([found.step for found in checkpoints], self._scores())
        return [found.step in kept for found in checkpoints]

    def _manager(self) -> Any:
        if not self._writer:
            # To rename a folder of an object store takes as long as to copy it, and may be cut short.
            atomicity = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE) if is_remote(self._workdir) else None
            options = ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True, preservation_policy=self, atomicity_options=atomicity
            )
            handlers = {"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
            self._writer = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        return self._writer

    def _scores(self) -> dict[int, float]:
        """Of each evaluated step, larger for better."""
        metric = Keep.metric
        if self._keep:
            metric = self._keep.metric
        else:
            with contextlib.suppress(UserError, KeyError, ValueError):  # as the run says
                metric = self.record(max(self.steps()))["config"]["checkpoint"]["best_by"]
        # Of the weights and their running average the latter is what a run is good for: it comes last.
        last = {step: list(splits.values())[-1] for step, splits in self._evaluations.items()}
        return {step: BEST_BY[metric] * metrics[metric] for step, metrics in last.items() if metric in metrics}

    def _check_there(self) -> None:
        if not self._workdir.is_dir():
            raise UserError(f"--workdir={self._workdir}: is no longer there; it was moved or deleted during the run")

    @contextlib.contextmanager
    def _one_line(self, done: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as e:  # Orbax, tensorstore and the file system have no error in common
            whole = ""
            if done == "written":
                self._check_there()
                newest = self.latest_step()
                whole = "; no step is saved" if newest is None else f"; the newest whole one is of step {newest:,}"
            kind = UserError if isinstance(e, PermissionError) else TransientError
            raise kind(f"{self.directory}: a checkpoint could not be {done} ({first_line(e)}){whole}") from e

    # -- reading

    def config(self, step: int) -> dict[str, Any]:
        """The config that was saved with the state at `step`. Raises Damaged."""
        return self.record(step)["config"]

    def record(self, step: int) -> dict[str, Any]:
        """{"config", "arrays": {name: {"shape", "dtype", "sha256"}}, "sha256"}: what is known of `step`.

        Raises Damaged if the record does not agree with itself.
        """
        with self._reading(step):
            folder = epath.Path(self.directory) / str(step) / "record"
            found = ocp.JsonCheckpointHandler().restore(folder, ocp.args.JsonRestore())
            if found["format"] != FORMAT or found["sha256"] != _digest_of_record(found):
                raise ValueError("its record does not agree with its own digest")
            return found

    def restore(self, step: int, like: Fields, *, as_saved: Collection[str] = ()) -> Fields:
        """Restore what was saved at `step`, on the devices and in the shardings of the abstract arrays `like`.

        Of the fields `as_saved`, flat dicts, all is restored that was saved, replicated, whatever `like` has of them.
        Raises UserError naming the parameters that differ when the network is another one, and Damaged when the files
        are not what was saved.
        """
        record = self.record(step)
        saved = {name: tuple(array["shape"]) for name, array in record["arrays"].items()}
        replicated = like["step"].sharding
        fields = {name: value for name, value in like.items() if name not in as_saved}
        for name, array in record["arrays"].items():
            field, _, rest = name.partition("/")
            if field in as_saved:
                abstract = jax.ShapeDtypeStruct(array["shape"], array["dtype"], sharding=replicated)
                fields.setdefault(field, {})[rest] = abstract
        _check_same_tree(saved, _shapes(fields), f"{self.directory}/{step}")
        with self._reading(step), jax.transfer_guard("allow"):
            # Not by Orbax's manager: there the processes wait for each other, also for one that has met an error.
            folder = epath.Path(self.directory) / str(step) / "state"
            # Restore replicated, verify the digests, then reshard: to gather parts for their digests, all processes
            # would have to come as far.
            shardings = jax.tree.map(lambda x: x.sharding, fields)
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), fields)
            restored = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(target))
            _check_digests(restored, record["arrays"])
            return jax.device_put(restored, shardings)

    def restore_newest(
        self, like: Fields, say: Callable[[str], None], *, as_saved: Collection[str] = ()
    ) -> tuple[int, Fields] | None:
        """Restore the newest sound checkpoint, as `restore`: its step and fields. None if nothing has been saved.

        Damaged ones that are newer are moved to workdir/damaged, and `say` gets a line about each. Processes agree.
        Raises Damaged, with everything left where it is, when none is sound.
        """
        reasons: dict[int, str] = {}
        for step in reversed(of_first_process(self.steps())):
            try:
                fields = self.restore(step, like, as_saved=as_saved)
            except Damaged as e:
                fields, reasons[step] = {}, str(e)
            if all_agree(bool(fields)):
                break
            reasons.setdefault(step, f"{self.directory}/{step}: another process finds it damaged")
        else:
            if reasons:
                first, count = next(iter(reasons.values())), len(reasons)
                raise Damaged(f"{first}; none of the {count} saved is sound: choose another workdir to begin anew")
            return None
        for damaged, reason in reasons.items():
            aside = self._workdir / "damaged" / f"{damaged}-{time.strftime('%Y%m%d-%H%M%S')}"
            if jax.process_index() == 0:
                with self._one_line("set aside"):
                    make_folder(aside.parent)
                    move(self.directory / str(damaged), aside)
            say(f"damaged  {reason}; set aside as {aside}")
        if reasons:
            say(f"damaged  going on from step {step:,}, the newest that is sound")
            all_agree(True)
        return step, fields

    def arrays(self, step: int) -> Any:
        """The state at `step` as numpy arrays in nested dicts, of whatever network. Raises Damaged."""
        record = self.record(step)
        with self._reading(step), jax.transfer_guard("allow"):
            folder, handler = epath.Path(self.directory) / str(step) / "state", ocp.StandardCheckpointHandler()
            metadata = handler.metadata(folder)
            tree = metadata.tree if hasattr(metadata, "tree") else metadata
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
            found = jax.device_get(handler.restore(folder, args=ocp.args.StandardRestore(like)))
            _check_digests(found, record["arrays"])
            return found

    def weights(self, step: int, *, averaged: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters and batch statistics at `step`, numpy arrays in nested dicts, of whatever network.

        Where a running average was kept, they are that, unless `averaged` is False. Raises Damaged.
        """
        state = self.arrays(step)
        found = (averaged and state.get("ema")) or state
        return found["params"], found["batch_stats"]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as e:  # whatever Orbax meets in damaged files
            where = f"{self.directory}/{step}"
            if isinstance(e, PermissionError) or REFUSED.search(str(e)):
                raise UserError(f"{where}: may not be read ({first_line(e)})") from None
            if isinstance(e, MemoryError | ConnectionError | TimeoutError) or UNAVAILABLE.search(str(e)):
                raise TransientError(f"{where}: cannot be read now ({first_line(e)}); this may pass") from e
            raise Damaged(f"{where}: this checkpoint is damaged ({first_line(e)})") from None


def _named(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by name: params/stage1/block0/conv1/kernel."""
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if hasattr(leaf, "shape")}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _named(tree).items()}


def _record(fields: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    record = {"format": FORMAT, "config": config, "arrays": _digests(fields)}
    return record | {"sha256": _digest_of_record(record)}


def _digest_of_record(record: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _digests(tree: Any) -> dict[str, dict[str, Any]]:
    """Shape, dtype and SHA-256 of the bytes (in C order) of each array, whole, wherever its parts are."""

    def digest(array: Any) -> dict[str, Any]:
        sha256 = hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
        return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": sha256}

    named = _named(tree)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets go of Python's lock
        return dict(zip(named, pool.map(digest, map(_whole, named.values())), strict=True))


def _whole(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _check_digests(tree: Any, saved: Mapping[str, Mapping[str, Any]]) -> None:
    found = _digests(tree)
    for name in found.keys() | saved.keys():
        if found.get(name) != saved.get(name):
            raise ValueError(f"the digest of {name} does not agree")


def _check_same_tree(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], where: str) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            there, here = (tree.get(name, "absent") for tree in (found, wanted))
            count = sum(found.get(n) != wanted.get(n) for n in found.keys() | wanted.keys())
            raise UserError(
                f"{where}: of another network: {name} is {there} there, {here} here "
                f"({count} arrays differ); choose another workdir or the config it was made with"
            )


def inspect(workdir: AnyPath, *, verify: bool) -> list[dict[str, Any]]:
    """A row for each step saved in `workdir`: step, bytes, saved (its time), metrics, sha256, sound, fault.

    `sound` is None where only the record was looked at, and agrees with itself. With `verify` the arrays are read too.
    """
    with Checkpoints(workdir) as checkpoints:
        found = evaluations(workdir)
        rows = []
        for step in checkpoints.steps():
            walk = epath.Path(checkpoints.directory / str(step)).walk()
            files = [(folder / name).stat() for folder, _, within in walk for name in within]
            row: dict[str, Any] = {"step": step, "bytes": sum(file.length for file in files)}
            row |= {
                "saved": max((file.mtime for file in files), default=None),
                "metrics": found.get(step, {}),
            }
            row |= {"sha256": None, "sound": None, "fault": None}
            try:
                row["sha256"] = checkpoints.record(step)["sha256"]
                if verify:
                    checkpoints.arrays(step)
                    row["sound"] = True
            except Damaged as e:
                row |= {"sound": False, "fault": str(e)}
            rows.append(row)
    return rows
