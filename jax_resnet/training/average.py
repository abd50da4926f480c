"""Weights averaged over checkpoints, with batch statistics of their own: `jax-resnet average --workdir DIR`.

Izmailov et al. 2018, "Averaging weights leads to wider optima". The mean of several networks' batch statistics is not
what their mean network has: the statistics are estimated anew, as means over training batches (Ioffe and Szegedy 2015,
section 3.1). Of one checkpoint, only they change.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jax_resnet.config import from_json
from jax_resnet.errors import UserError
from jax_resnet.models.torch_names import flatten
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.paths import AnyPath
from jax_resnet.runs.workdir import has_checkpoints, read_config
from jax_resnet.training.evaluate import evaluate, to_stderr
from jax_resnet.training.experiment import Experiment, build
from jax_resnet.training.pretrained import place
from jax_resnet.training.state import TrainState

BATCHES = 100


@dataclass(frozen=True)
class Averaged:
    """The mean of some checkpoints."""

    steps: tuple[int, ...]  # those that it is of
    config: ConfigDict
    params: Any  # numpy arrays in nested dicts
    batch_stats: Any
    text: str  # the split that it was evaluated on, and the headline of its metrics
    metrics: dict[str, Any]  # as `evaluate` gives them


def average_checkpoints(workdir: AnyPath, *, checkpoints: Sequence[str] = (), batches: int = BATCHES) -> Averaged:
    """Average the weights of `checkpoints` ("best", "latest" or steps; none: all that are saved), and evaluate them.

    Batch statistics are estimated over `batches` training batches that follow the run's; 0: the mean of the saved ones.
    Raises UserError for a workdir without those checkpoints.
    """
    if read_config(workdir) is None or not has_checkpoints(workdir):
        raise UserError(f"{workdir}: no checkpoint has been saved here")
    with Checkpoints(workdir) as saved:
        steps = sorted({saved.find(which) for which in checkpoints} or saved.steps())
        config = from_json(saved.config(steps[-1]))
        wide = (jax.tree.map(np.float64, saved.weights(step, averaged=False)) for step in steps)
        mean = jax.tree.map(lambda total: np.float32(total / len(steps)), reduce(partial(jax.tree.map, np.add), wide))
    config.model.bn_momentum = 0.0  # statistics of one batch, nothing of those before
    config.distill.teacher = config.distill.model = None
    experiment = build(config)
    arrays, abstract = flatten(*mean), experiment.network.abstract_state
    state = TrainState(
        abstract.step, place(abstract.params, arrays), place(abstract.batch_stats, arrays), opt_state=None
    )
    if batches and jax.tree.leaves(state.batch_stats):
        state = replace(state, batch_stats=estimate_statistics(experiment, state, batches))
    metrics = evaluate(experiment, state)
    assert metrics
    params, batch_stats = jax.device_get((state.params, state.batch_stats))
    text = f"{experiment.data.eval.name} {experiment.task.text(metrics)}"
    return Averaged(tuple(steps), config, params, batch_stats, text, metrics)


def estimate_statistics(experiment: Experiment, state: TrainState, batches: int) -> Any:
    """Estimate the batch statistics of `state.params` as means over the first `batches` batches after the run's last.

    `experiment` must be of a config with bn_momentum 0.
    """
    first = experiment.plan.steps
    whole = jax.tree.leaves(state.params)[0].sharding
    statistics = jax.jit(
        lambda *of: experiment.steps.compute_gradients(*of)[1],
        in_shardings=(whole, experiment.sharding),
        out_shardings=whole,
    )
    add = jax.jit(partial(jax.tree.map, lambda total, one: total + one / batches), donate_argnums=0)
    total = jax.tree.map(np.zeros_like, jax.device_get(state.batch_stats))
    with closing(experiment.train_batches(first, first + batches, to_stderr)) as feed:
        for number, batch in enumerate(feed, first):
            total = add(total, statistics(replace(state, step=jnp.int32(number)), batch))
            jax.block_until_ready(total)  # or the host would run ahead, with a batch on the devices for each
    return total
