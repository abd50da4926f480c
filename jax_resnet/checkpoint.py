"""The one place that knows Orbax: checkpoints of (state, config) in a workdir, saved while training goes on."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from jax_resnet import s3
from jax_resnet.errors import UserError, first_line
from jax_resnet.paths import AnyPath, absolute, is_remote
from jax_resnet.state import TrainState

BEST_BY = "accuracy_top1"


def _best(metrics: Mapping[str, float]) -> float:
    return metrics[BEST_BY]


class Checkpoints:
    """The checkpoints under workdir/checkpoints: the latest `keep_latest`, and the best by evaluated accuracy.

    Without `keep_latest` they are only read, also beside a process that is still saving. A context manager: leaving it
    waits until what was saved is on disk.
    """

    def __init__(self, workdir: AnyPath, keep_latest: int | None = None):
        self.directory = absolute(workdir) / "checkpoints"
        # best_fn makes Orbax write the metrics, without which the best step is forgotten at a restart.
        options: dict[str, Any] = {"best_fn": _best, "best_mode": "max"}
        if keep_latest is None:
            options["read_only"] = True
        else:
            options["cleanup_tmp_directories"] = True
            options["preservation_policy"] = keep.AnyPreservationPolicy(
                [
                    keep.LatestN(keep_latest),
                    keep.BestN(get_metric_fn=_best, n=1, keep_checkpoints_without_metrics=False),
                ]
            )
        if is_remote(workdir):  # to rename a folder takes as long as to copy it, and may be cut short
            options["atomicity_options"] = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)
        if str(workdir).startswith("s3://"):
            s3.teach_orbax()
        handlers = {"state": ocp.StandardCheckpointHandler(), "config": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(**options), item_handlers=handlers
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with self._one_line("written"):
            self._manager.close()

    def latest_step(self) -> int | None:
        """The newest step saved whole, None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All steps saved whole, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the highest accuracy of those that were evaluated, None if none was."""
        return self._manager.best_step()

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

    def save(self, step: int, state: TrainState, config: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Starts saving; returns when the state's values have been copied. A step that is saved already is left."""
        if step not in self._manager.all_steps():
            items = ocp.args.Composite(state=ocp.args.StandardSave(_fields(state)), config=ocp.args.JsonSave(config))
            with jax.transfer_guard("allow"), self._one_line("written"):  # Orbax copies to the host as it sees fit
                self._manager.save(step, args=items, metrics=metrics, force=True)

    def wait(self) -> None:
        """Returns when everything is on disk; raises UserError if it could not be written."""
        with self._one_line("written"):
            self._manager.wait_until_finished()

    def config(self, step: int) -> dict[str, Any]:
        """The config that was saved with the state at `step`."""
        with self._one_line("read"):
            return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

    @contextlib.contextmanager
    def _one_line(self, done: str) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # Orbax, tensorstore and the file system have no error in common
            raise UserError(f"{self.directory}: a checkpoint could not be {done} ({first_line(e)})") from None

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state at `step`, on the devices and in the shardings of the abstract state `like`.

        Raises UserError naming the parameters that differ when the network is another one, or the step when its files
        are damaged.
        """
        try:
            found = self._manager.item_metadata(step)["state"]
        except Exception as e:  # whatever Orbax meets in damaged files
            raise self._damaged(step, e) from None
        if found is not None:
            _check_same_tree(_shapes(found), _shapes(like), f"{self.directory}/{step}")
        try:
            with jax.transfer_guard("allow"):
                args = ocp.args.Composite(state=ocp.args.StandardRestore(_fields(like)))
                return TrainState(**self._manager.restore(step, args=args)["state"])
        except Exception as e:
            raise self._damaged(step, e) from None

    def weights(self, step: int, *, averaged: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters and batch statistics at `step`, numpy arrays in nested dicts, of whatever network.

        Where a running average was kept, they are that, unless `averaged` is False.
        Raises UserError if the files are damaged.
        """
        try:
            found = self._manager.item_metadata(step)["state"]
            tree = found.tree if hasattr(found, "tree") else found
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
            with jax.transfer_guard("allow"):
                args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
                state = self._manager.restore(step, args=args)["state"]
                found = (averaged and state.get("ema")) or state
                return jax.device_get((found["params"], found["batch_stats"]))
        except Exception as e:
            raise self._damaged(step, e) from None

    def _damaged(self, step: int, error: Exception) -> UserError:
        steps = [s for s in self._manager.all_steps() if s != step]
        rest = f"to go on from step {max(steps)}, move that folder away" if steps else "no other step is saved"
        return UserError(f"{self.directory}/{step}: this checkpoint cannot be read ({first_line(error)}); {rest}")


def _fields(state: TrainState) -> dict[str, Any]:
    """The state by the names of its fields, without a running average where none is kept."""
    return {name: value for name, value in vars(state).items() if name != "ema" or value}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    def name(path: Any) -> str:
        return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)

    tree = tree.tree if hasattr(tree, "tree") else tree
    return {
        name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }


def _check_same_tree(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], where: str) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            there, here = (tree.get(name, "absent") for tree in (found, wanted))
            count = sum(found.get(n) != wanted.get(n) for n in found.keys() | wanted.keys())
            raise UserError(
                f"{where}: of another network: {name} is {there} there, {here} here "
                f"({count} arrays differ); choose another workdir or the config it was made with"
            )
