"""The one place that knows Orbax: checkpoints of arrays with a config in a workdir, saved while training goes on.

    jax-resnet checkpoints verify runs/mine      # or inspect, which does not read the arrays

Orbax writes a step completely or not at all, but keeps no checksums: flipped bits load silently. Here each step has a
record with digests, and nothing is used that does not agree with it.
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

# What tensorstore says where nothing is damaged, but the file system or the network does not give it.
REFUSED = re.compile("PERMISSION_DENIED|UNAUTHENTICATED")
UNAVAILABLE = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|CANCELLED")
# Orbax numbers the saves of a process and, while it starts one, looks up the newest number time and again to tell whose
# folders to wait for. A save that another thread starts meanwhile would be taken for it, so they start in turn.
_STARTING = threading.Lock()

Fields = dict[str, Any]  # what is saved, by name: "step", a replicated array, and trees of arrays


class Damaged(UserError):
    """A checkpoint whose files are not what was saved."""


class Checkpoints:
    """Saves and restores under workdir/checkpoints. Without `keep` it only reads, also beside a process that saves.

    A context manager: leaving it waits until what was saved is on disk.
    """

    def __init__(self, workdir: AnyPath, keep: Keep | None = None):
        self.directory = absolute(workdir) / "checkpoints"
        self._workdir, self._keep = workdir, keep
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
        """List the steps that are saved completely, ascending."""
        steps = [name for name in names(self.directory) if name.isdigit()]
        # A local folder gets its name when it is complete; in an object store none is renamed.
        if is_remote(self.directory):
            steps = [name for name in steps if (self.directory / name / COMMITTED).exists()]
        return sorted(map(int, steps))

    def latest_step(self) -> int | None:
        """Return the newest step, None if there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Return the step with the best evaluation in metrics.jsonl, None if it has none."""
        scores, steps = self._scores(), self.steps()
        return max((step for step in steps if step in scores), key=lambda step: (scores[step], step), default=None)

    def find(self, which: str) -> int:
        """Resolve "best" (the latest if none was evaluated), "latest" or a number. Raises UserError if not saved."""
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
            # Orbax copies to the host as it sees fit.
            with jax.transfer_guard("allow"), self._one_line("written"):
                record = make_record(fields, config)
                items = {"state": ocp.args.StandardSave(fields), "record": ocp.args.JsonSave(record)}
                writer = self._manager()
                # Orbax would do this itself, but then under the lock: one training would wait for another's disk.
                writer.wait_until_finished()
                with _STARTING:
                    writer.save(step, args=ocp.args.Composite(**items), force=True)
            self.blocked += time.monotonic() - began

    def evaluated(self, step: int, splits: Mapping[str, Mapping[str, Any]]) -> None:
        """Note the metrics of `step`, by split: the best checkpoints stay."""
        self._evaluations[step] = splits

    def check(self) -> None:
        """Raise UserError if what is being saved could not be written. Does not wait."""
        if self._writer:
            with self._one_line("written"):
                self._writer.check_for_errors()

    def wait(self) -> None:
        """Wait until everything is on disk. Raises UserError if it could not be written."""
        if self._writer:
            began = time.monotonic()
            with self._one_line("written"):
                self._writer.wait_until_finished()
                self._writer.check_for_errors()
            self.blocked += time.monotonic() - began

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Answer Orbax which of `checkpoints` to keep."""
        del context
        assert self._keep
        kept = self._keep.of([info.step for info in checkpoints], self._scores())
        return [info.step in kept for info in checkpoints]

    def _manager(self) -> Any:
        if not self._writer:
            # Renaming a folder of an object store takes as long as copying it, and may be cut short.
            atomicity = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE) if is_remote(self._workdir) else None
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

    def _check_there(self) -> None:
        if not self._workdir.is_dir():
            raise UserError(f"--workdir={self._workdir}: is no longer there; it was moved or deleted during the run")

    @contextlib.contextmanager
    def _one_line(self, done: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        # Orbax, tensorstore and the file system have no error in common.
        except Exception as e:
            saved = ""
            if done == "written":
                self._check_there()
                newest = self.latest_step()
                saved = "; no step is saved" if newest is None else f"; the newest whole one is of step {newest:,}"
            kind = UserError if isinstance(e, PermissionError) else TransientError
            raise kind(f"{self.directory}: a checkpoint could not be {done} ({first_line(e)}){saved}") from e

    # -- reading

    def config(self, step: int) -> dict[str, Any]:
        """Read the config that was saved at `step`. Raises Damaged."""
        return self.record(step)["config"]

    def record(self, step: int) -> Record:
        """Read what is known of `step`: its config and the shape, dtype and digest of each array.

        Raises Damaged if the record does not agree with itself.
        """
        with self._reading(step):
            folder = epath.Path(self.directory) / str(step) / "record"
            record = ocp.JsonCheckpointHandler().restore(folder, ocp.args.JsonRestore())
            check_record(record)
            return record

    def restore(self, step: int, like: Fields, *, as_saved: Collection[str] = ()) -> Fields:
        """Restore what was saved at `step`, like the abstract arrays `like`, which are replicated.

        Of the fields `as_saved`, flat dicts, all is restored that was saved, whatever `like` has of them.
        Raises UserError naming the parameters that differ when the network is another one, and Damaged when the files
        are not what was saved.
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
            # Orbax's manager would have the processes wait for each other, also for one that has met an error.
            folder = epath.Path(self.directory) / str(step) / "state"
            restored = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(fields))
            check_digests(restored, record)
            return restored

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
        """Read the fields at `step` as numpy arrays in nested dicts, of whatever network. Raises Damaged."""
        record = self.record(step)
        with self._reading(step), jax.transfer_guard("allow"):
            folder, handler = epath.Path(self.directory) / str(step) / "state", ocp.StandardCheckpointHandler()
            metadata = handler.metadata(folder)
            tree = metadata.tree if hasattr(metadata, "tree") else metadata
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
            arrays = jax.device_get(handler.restore(folder, args=ocp.args.StandardRestore(like)))
            check_digests(arrays, record)
            return arrays

    def weights(self, step: int, *, averaged: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the parameters and batch statistics at `step`, numpy arrays in nested dicts, of whatever network.

        Where a running average was kept, they are that, unless `averaged` is False. Raises Damaged.
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
        # In damaged files Orbax meets errors of any type.
        except Exception as e:
            where = f"{self.directory}/{step}"
            if isinstance(e, PermissionError) or REFUSED.search(str(e)):
                raise UserError(f"{where}: may not be read ({first_line(e)})") from None
            if isinstance(e, MemoryError | ConnectionError | TimeoutError) or UNAVAILABLE.search(str(e)):
                raise TransientError(f"{where}: cannot be read now ({first_line(e)}); this may pass") from e
            raise Damaged(f"{where}: this checkpoint is damaged ({first_line(e)})") from None
