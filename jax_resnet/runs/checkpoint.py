"""Save and restore checkpoints in a workdir: the one module that knows Orbax.

    jax-resnet checkpoints verify runs/mine      # or inspect, which does not read the arrays

Orbax writes a step atomically, in the background, but keeps no checksums: flipped bits load silently.
Each step therefore has a record with digests, and no array is used that disagrees with it.
"""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from jax_resnet.errors import TransientError, UserError, first_line
from jax_resnet.runs import s3
from jax_resnet.runs.digests import Record, check_digests, check_record, check_same_tree, make_record
from jax_resnet.runs.metrics_reader import evaluations
from jax_resnet.runs.paths import COMMITTED, AnyPath, absolute, is_remote, make_folder, move, names
from jax_resnet.runs.retention import Keep, score
from jax_resnet.runtime.distributed import all_agree, of_first_process

# Tensorstore's errors where nothing is damaged, but the file system or the network denies access.
REFUSED = re.compile("PERMISSION_DENIED|UNAUTHENTICATED")
UNAVAILABLE = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|CANCELLED")
# While Orbax starts a save, it takes the newest of the process for its own, even one that another
# thread has started meanwhile: saves start in turn.
_STARTING = threading.Lock()

Fields = dict[str, Any]  # replicated "step", trees of arrays


class Damaged(UserError):
    """A checkpoint whose files differ from what was saved."""


class Checkpoints:
    """Save and restore under workdir/checkpoints. On exit it waits until all saves are on disk.

    Without `keep` it only reads, which is safe beside a process that saves.
    """

    def __init__(self, workdir: AnyPath, keep: Keep | None = None):
        self.directory = absolute(workdir) / "checkpoints"
        self._workdir = workdir
        self._keep = keep
        self._evaluations: dict[int, Mapping[str, Mapping[str, Any]]] = dict(evaluations(workdir))
        self._writer: Any = None
        if str(workdir).startswith("s3://"):
            s3.teach_orbax()
        self.blocked = 0.0  # seconds that callers waited for saving

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            with self._one_line("written"):
                self._writer.close()

    # -- listing

    def steps(self) -> list[int]:
        """List the completely saved steps, ascending."""
        steps = [name for name in names(self.directory) if name.isdigit()]
        # Orbax renames a local folder once it is complete; an object store cannot rename.
        if is_remote(self.directory):
            steps = [name for name in steps if (self.directory / name / COMMITTED).exists()]
        return sorted(map(int, steps))

    def latest_step(self) -> int | None:
        """Return the newest step, None if there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Return the step with the best evaluation in metrics.jsonl, None if it has none."""
        scores = self._scores()
        return max(scores.keys() & self.steps(), key=lambda step: (scores[step], step), default=None)

    def find(self, which: str) -> int:
        """Resolve "best" (the latest without evaluations), "latest" or a step. Raises UserError."""
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
        """Start saving; return when the arrays have been copied. A saved step is left as it is.

        Raises UserError if an earlier save has failed, or the folder is gone.
        """
        if step in self.steps():
            return
        began = time.monotonic()
        self._check_workdir()
        # Orbax makes implicit transfers.
        with jax.transfer_guard("allow"), self._one_line("written"):
            record = make_record(fields, config)
            items = {"state": ocp.args.StandardSave(fields), "record": ocp.args.JsonSave(record)}
            writer = self._manager()
            # Orbax would wait while it holds the lock: one training would wait for another's disk.
            writer.wait_until_finished()
            with _STARTING:
                writer.save(step, args=ocp.args.Composite(**items), force=True)
        self.blocked += time.monotonic() - began

    def evaluated(self, step: int, splits: Mapping[str, Mapping[str, Any]]) -> None:
        """Note the metrics of `step` by split, from which the best checkpoints are chosen."""
        self._evaluations[step] = splits

    def check(self) -> None:
        """Raise UserError if a save has failed. Does not wait."""
        if self._writer:
            with self._one_line("written"):
                self._writer.check_for_errors()

    def wait(self) -> None:
        """Wait until all saves are on disk. Raises UserError if one has failed."""
        if self._writer:
            began = time.monotonic()
            with self._one_line("written"):
                self._writer.wait_until_finished()
                self._writer.check_for_errors()
            self.blocked += time.monotonic() - began

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Tell Orbax which of `checkpoints` to keep."""
        del context
        assert self._keep
        kept = self._keep.of([info.step for info in checkpoints], self._scores())
        return [info.step in kept for info in checkpoints]

    def _manager(self) -> Any:
        if not self._writer:
            atomicity = None
            if is_remote(self._workdir):
                # An object store renames a folder by copying it, which may be cut short.
                atomicity = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)
            options = ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True, preservation_policy=self, atomicity_options=atomicity
            )
            handlers = {"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
            self._writer = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        return self._writer

    def _scores(self) -> dict[int, float]:
        metric = Keep.metric
        if self._keep:
            metric = self._keep.metric
        else:
            with contextlib.suppress(UserError, KeyError, ValueError):
                metric = self.config(max(self.steps()))["checkpoint"]["best_by"]
        return score(self._evaluations, metric)

    def _check_workdir(self) -> None:
        if not self._workdir.is_dir():
            raise UserError(f"--workdir={self._workdir}: is no longer there; it was moved or deleted during the run")

    @contextlib.contextmanager
    def _one_line(self, done: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        # Orbax, tensorstore and the file system have no error type in common.
        except Exception as e:
            saved = ""
            if done == "written":
                self._check_workdir()
                newest = self.latest_step()
                saved = "; no step is saved" if newest is None else f"; the newest whole one is of step {newest:,}"
            kind = UserError if isinstance(e, PermissionError) else TransientError
            raise kind(f"{self.directory}: a checkpoint could not be {done} ({first_line(e)}){saved}") from e

    # -- reading

    def config(self, step: int) -> dict[str, Any]:
        """Read the config that was saved at `step`. Raises Damaged."""
        return self.record(step)["config"]

    def record(self, step: int) -> Record:
        """Read the record of `step`: its config and the shape, dtype and digest of each array.

        Raises Damaged if the record disagrees with its own digest.
        """
        with self._reading(step):
            folder = epath.Path(self.directory) / str(step) / "record"
            record = ocp.JsonCheckpointHandler().restore(folder, ocp.args.JsonRestore())
            check_record(record)
            return record

    def restore(self, step: int, like: Fields, *, as_saved: Collection[str] = ()) -> Fields:
        """Restore the fields of `step`, replicated, with the shapes of the abstract arrays `like`.

        Fields named in `as_saved`, flat dicts, are restored completely, whatever `like` holds for them.
        Raises UserError naming the arrays that differ for another network, and Damaged.
        """
        record = self.record(step)
        replicated = like["step"].sharding
        fields = {name: value for name, value in like.items() if name not in as_saved}
        for name, array in record["arrays"].items():
            field, _, rest = name.partition("/")
            if field in as_saved:
                abstract = jax.ShapeDtypeStruct(array["shape"], array["dtype"], sharding=replicated)
                fields.setdefault(field, {})[rest] = abstract
        check_same_tree(record, fields, f"{self.directory}/{step}")
        with self._reading(step), jax.transfer_guard("allow"):
            # Orbax's manager would make processes wait for each other, even for one that failed.
            folder = epath.Path(self.directory) / str(step) / "state"
            restored = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(fields))
            check_digests(restored, record)
            return restored

    def restore_newest(
        self, like: Fields, say: Callable[[str], None], *, as_saved: Collection[str] = ()
    ) -> tuple[int, Fields] | None:
        """Restore the newest sound checkpoint as `restore` does.

        Returns its step and fields, None if nothing has been saved. Moves newer, damaged checkpoints
        to workdir/damaged, and calls `say` with a line about each. All processes choose the same one.
        Raises Damaged, and moves nothing, if none is sound.
        """
        reasons: dict[int, str] = {}
        for step in reversed(of_first_process(self.steps())):
            try:
                fields = self.restore(step, like, as_saved=as_saved)
            except Damaged as e:
                fields = {}
                reasons[step] = str(e)
            if all_agree(bool(fields)):
                break
            reasons.setdefault(step, f"{self.directory}/{step}: another process finds it damaged")
        else:
            if reasons:
                first = next(iter(reasons.values()))
                advice = f"none of the {len(reasons)} saved is sound: choose another workdir to begin anew"
                raise Damaged(f"{first}; {advice}")
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
        """Read the fields of `step`, of any network: numpy arrays in dicts. Raises Damaged."""
        record = self.record(step)
        with self._reading(step), jax.transfer_guard("allow"):
            folder = epath.Path(self.directory) / str(step) / "state"
            handler = ocp.StandardCheckpointHandler()
            metadata = handler.metadata(folder)
            tree = getattr(metadata, "tree", metadata)
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
            arrays = jax.device_get(handler.restore(folder, args=ocp.args.StandardRestore(like)))
            check_digests(arrays, record)
            return arrays

    def weights(self, step: int, *, averaged: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the parameters and batch statistics of `step`, numpy arrays in nested dicts.

        They are the running average where one was kept, unless `averaged` is False. Raises Damaged.
        """
        fields = self.arrays(step)
        weights = (averaged and fields.get("ema")) or fields
        return weights["params"], weights["batch_stats"]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        # Orbax raises errors of any type for damaged files.
        except Exception as e:
            where = f"{self.directory}/{step}"
            if isinstance(e, PermissionError) or REFUSED.search(str(e)):
                raise UserError(f"{where}: may not be read ({first_line(e)})") from None
            if isinstance(e, MemoryError | ConnectionError | TimeoutError) or UNAVAILABLE.search(str(e)):
                raise TransientError(f"{where}: cannot be read now ({first_line(e)}); this may pass") from e
            raise Damaged(f"{where}: this checkpoint is damaged ({first_line(e)})") from None
