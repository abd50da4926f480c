"""What a step changes, made by shape first and then in place on the devices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Sharding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a checkpoint holds. Pure nested dicts: a jitted call over them costs an eighth of one over modules."""

    step: jax.Array  # int32, updates done
    params: Any  # {"stage1": {"block0": {"conv1": {"kernel": float32 …}}}}
    batch_stats: Any  # running mean and var, in the same places
    opt_state: Any


def make_state(
    make_model: Callable[[nnx.Rngs], nnx.Module], optimizer: optax.GradientTransformation, seed: int, sharding: Sharding
) -> tuple[nnx.GraphDef, TrainState, Callable[[], TrainState]]:
    """The model's graph, the abstract state (shapes with shardings), and what makes the state on the devices.

    Nothing is computed here: a restored run never makes the parameters it would throw away.
    """
    graphs: list[nnx.GraphDef] = []

    def init(key: jax.Array) -> TrainState:
        graph, *states = nnx.split(make_model(nnx.Rngs(params=key)), nnx.Param, nnx.BatchStat, ...)
        params, stats, rest = states
        if jax.tree.leaves(rest):
            raise ValueError("the model holds state that is neither a parameter nor a batch statistic")
        graphs.append(graph)
        pure = nnx.to_pure_dict(params)
        return TrainState(jnp.zeros((), jnp.int32), pure, nnx.to_pure_dict(stats), optimizer.init(pure))

    def fresh() -> TrainState:
        return jax.jit(lambda: init(jax.random.key(seed)), out_shardings=sharding)()

    shapes = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(seed)))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    return graphs[0], abstract, fresh
