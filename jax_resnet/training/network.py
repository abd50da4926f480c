"""The network of a config on a mesh: its graph, and the state that is trained."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_resnet.config import model_overrides
from jax_resnet.data.inputs import Inputs
from jax_resnet.errors import UserError, choose
from jax_resnet.models.cost import cost
from jax_resnet.models.cpu import for_cpu
from jax_resnet.models.spec import ResNetSpec
from jax_resnet.models.torch_names import Arrays
from jax_resnet.models.zoo import create_model, model_spec
from jax_resnet.runtime.mesh import replicated
from jax_resnet.training.pretrained import fitting
from jax_resnet.training.state import TrainState, make_state
from jax_resnet.training.step import Problem
from jax_resnet.training.tasks import Task


@dataclass(frozen=True)
class Network:
    """A network and the shapes and shardings of its training state; nothing of it is computed yet."""

    mesh: Mesh
    spec: ResNetSpec
    problem: Problem
    abstract_state: TrainState
    fresh_state: Callable[[], TrainState]  # computes the state of step 0 on the devices

    def flops(self, *shape: int) -> int:
        """Count the floating-point operations of one forward pass, of an input of that shape, from its trace."""
        state, image = self.abstract_state, jax.ShapeDtypeStruct((1, *shape), jnp.float32)

        def forward(params: Any, stats: Any, image: Any) -> Any:
            model: Any = nnx.merge(self.problem.graph, params, stats)
            model.eval()
            return model(image)

        return 2 * cost(forward, state.params, state.batch_stats, image).multiply_adds


def spec_of(config: ConfigDict) -> ResNetSpec:
    """Return the spec that `config.model` names. Raises UserError for an unknown name."""
    return model_spec(config.model.name, **model_overrides(config))


def build_network(
    config: ConfigDict, mesh: Mesh, inputs: Inputs, task: Task, optimizer: optax.GradientTransformation
) -> Network:
    """Build the network of `config.model` for `task` and the devices of `mesh`, with the state that `optimizer` needs.

    Raises UserError where `config.freeze` names something that is not a part of it, or names every part.
    """
    graph, abstract_state, fresh_state = make_state(
        _model_maker(config, mesh, task.outputs),
        optimizer,
        config.seed,
        replicated(mesh),
        ema=bool(config.ema.decay),
        guard=bool(config.guard.max_skipped),
    )
    for part in config.freeze:
        choose("config.freeze", part, abstract_state.params)
    if set(config.freeze) >= abstract_state.params.keys():
        raise UserError(f"config.freeze={config.freeze}: nothing is left to be trained")
    return Network(mesh, spec_of(config), Problem(graph, inputs, task), abstract_state, fresh_state)


def _model_maker(config: ConfigDict, mesh: Mesh, outputs: int) -> Callable[[Any], nnx.Module]:
    """Return what makes the module from its rngs, with convolutions computed as suits the devices."""
    make_model = partial(
        create_model,
        config.model.name,
        num_classes=outputs,
        in_channels=config.data.image.channels,
        dtype=jnp.dtype(config.dtype),
        **model_overrides(config),
    )
    if mesh.devices.flat[0].platform == "cpu":
        return lambda rngs: for_cpu(make_model(rngs=rngs), mesh=mesh)
    return lambda rngs: make_model(rngs=rngs)


def initial_weights(config: ConfigDict, network: Network) -> tuple[Arrays, dict[str, str]]:
    """Read the arrays of `config.init_from` by name, and what to print about them, by heading.

    Both are empty if it names nothing. Raises UserError if it cannot be read or does not fit.
    """
    if not config.init_from:
        return {}, {}
    arrays, report, weights = fitting(config.init_from, network.abstract_state, network.spec)
    rows = {"weights": config.init_from, **report.lines()}
    normalised_by, ours = weights.mean + weights.std, (*config.data.image.mean, *config.data.image.std)
    if len(normalised_by) == len(ours) and not np.allclose(normalised_by, ours, atol=1e-3):
        rows["note"] = (
            f"the weights were trained with another normalisation; give --config.data.image.mean={weights.mean} "
            f"--config.data.image.std={weights.std}"
        )
    return arrays, rows
