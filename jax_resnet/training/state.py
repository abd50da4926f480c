"""The training state: its shapes and shardings first, then its arrays in place on the devices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Sharding

AS_SAVED = ("guard",)  # the fields that `from_fields` makes fit, whatever was saved of them


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a checkpoint holds. Pure nested dicts: a jitted call over them costs an eighth of one over modules."""

    step: jax.Array  # int32, updates done
    params: Any  # {"stage1": {"block0": {"conv1": {"kernel": float32 …}}}}
    batch_stats: Any  # running mean and var, in the same places
    opt_state: Any
    ema: Any = field(default_factory=dict)  # running average of `weights`, {} where none is kept
    # row: int32, updates skipped since the last that was not. {} where there is no guard
    guard: Any = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Any]:
        """The parameters and the batch statistics."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def averaged(self) -> "TrainState":
        """Return the state with the running average in place of the weights."""
        return replace(self, **self.ema)


def to_fields(state: TrainState) -> dict[str, Any]:
    """Name the fields of a state as checkpoints hold them: no running average and no guard where there is none."""
    return {name: value for name, value in vars(state).items() if name not in ("ema", "guard") or value}


def from_fields(fields: Mapping[str, Any], like: TrainState) -> TrainState:
    """Make the state of restored fields, with a guard like that of the abstract state `like`.

    A run may go on with or without a guard: what was not saved of it begins at 0, and what earlier versions saved of it
    besides is left out.
    """
    saved = fields.get("guard", {})
    zeros = {name: np.zeros(x.shape, x.dtype) for name, x in like.guard.items() if name not in saved}
    guard = saved | jax.device_put(zeros, like.step.sharding)
    return TrainState(**{**fields, "guard": {name: guard[name] for name in like.guard}})


class _Keys:
    """Gives the keys of nnx.Rngs(params=key), counted in Python: in a trace that is quadratic in the depth."""

    def __init__(self, key: jax.Array):
        self._key, self._count = key, 0

    def params(self) -> jax.Array:
        """Return the next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count - 1)


def make_state(
    make_model: Callable[[Any], nnx.Module],
    optimizer: optax.GradientTransformation,
    seed: int,
    sharding: Sharding,
    *,
    ema: bool = False,
    guard: bool = False,
) -> tuple[nnx.GraphDef, TrainState, Callable[[], TrainState]]:
    """Return the model's graph, the abstract state (shapes with shardings), and what makes the state on the devices.

    With `ema` the state has a running average, at first a copy of the weights, and with `guard` what that keeps.
    Nothing is computed here: a restored run never makes the parameters it would throw away.
    """
    graphs: list[nnx.GraphDef] = []

    def init(key: jax.Array) -> TrainState:
        graph, *states = nnx.split(make_model(_Keys(key)), nnx.Param, nnx.BatchStat, ...)
        params, stats, rest = states
        if jax.tree.leaves(rest):
            raise ValueError("the model holds state that is neither a parameter nor a batch statistic")
        graphs.append(graph)
        pure = nnx.to_pure_dict(params)
        state = TrainState(jnp.zeros((), jnp.int32), pure, nnx.to_pure_dict(stats), optimizer.init(pure))
        count = {"row": jnp.zeros((), jnp.int32)} if guard else {}
        return replace(state, ema=state.weights if ema else {}, guard=count)

    shapes = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(seed)))

    def fresh() -> TrainState:
        device: Any = next(iter(sharding.device_set))
        # It runs once: for a CPU it is compiled in half the time, to the same numbers.
        quickly = {"xla_backend_optimization_level": "1"} if device.platform == "cpu" else None
        return jax.jit(lambda: init(jax.random.key(seed)), out_shardings=sharding, compiler_options=quickly)()

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    return graphs[0], abstract, fresh


def all_finite(tree: Any) -> jax.Array:
    """Tell whether every floating-point number in the tree is finite, bool []. False too where a sum overflows.

    By sums, as XLA for CPUs takes 0.2 s for each array to compile whether all of its numbers are finite. Of magnitudes:
    the sum of a gradient that is a sum itself, a bias's, XLA merges with that, and reads the activations once more.
    """
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.isfinite(jnp.stack([jnp.abs(x).sum(dtype=jnp.float32) for x in floats])).all()
