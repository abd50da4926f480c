"""Where a run begins: from its newest sound checkpoint, or from fresh weights."""

from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from jax_resnet.config import to_json
from jax_resnet.errors import UserError
from jax_resnet.models.torch_names import Arrays
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.paths import AnyPath
from jax_resnet.runs.workdir import write_json
from jax_resnet.training.experiment import Experiment
from jax_resnet.training.plan import Plan
from jax_resnet.training.pretrained import placed
from jax_resnet.training.state import AS_SAVED, TrainState, from_fields, to_fields


def restore_or_begin(
    experiment: Experiment, checkpoints: Checkpoints, weights: Arrays, say: Callable[[str], None]
) -> tuple[int, TrainState]:
    """Restore the newest sound checkpoint: its step and state. Without one begin at step 0, with `weights` if any.

    `say` gets a line about each damaged checkpoint. Raises as Checkpoints.restore_newest.
    """
    network = experiment.network
    restored = checkpoints.restore_newest(to_fields(network.abstract_state), say, as_saved=AS_SAVED)
    if restored is None:
        return 0, placed(network.fresh_state(), weights)
    step, fields = restored
    return step, from_fields(fields, network.abstract_state)


def check_same_past(stored: ConfigDict | None, experiment: Experiment, start: int, workdir: AnyPath) -> None:
    """Allow config.progressive to differ in phases that are still to come, and write it to config.json.

    Raises UserError if the phases of the `start` steps that are done are not those they were done in.
    """
    if stored is None or stored.progressive == experiment.config.progressive:
        return
    data, side = experiment.data, min(experiment.data.input_shape[:2])
    then = _phases_before(start, Plan.of(stored, len(data.train)), side)
    now = _phases_before(start, experiment.plan, side)
    if then != now:
        raise UserError(
            f"config.progressive: the {start:,} steps that are done were not in these phases; only those to come may "
            f"change: {', '.join(f'steps to {end:,} at {size} px × {batch:,}' for _, end, size, batch in then)}"
        )
    if jax.process_index() == 0:
        write_json(workdir / "config.json", to_json(experiment.config))


def _phases_before(step: int, plan: Plan, side: int) -> list[tuple[int, int, int, int]]:
    """Return first step, end, image size and batch size of each phase of the first `step` updates."""
    return [(p.first_step, min(p.end, step), p.image_size or side, p.batch_size) for p in plan.between(0, step)]
