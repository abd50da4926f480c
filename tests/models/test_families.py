"""A small member of every family of the table learns."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_resnet.config import default
from jax_resnet.data.image.device import ImageInputs
from jax_resnet.models.zoo import create_model
from jax_resnet.runtime.mesh import data_mesh, parts_sharding
from jax_resnet.training.optimizers import parameter_kinds
from jax_resnet.training.state import TrainState
from jax_resnet.training.step import Problem, make_train_step
from jax_resnet.training.tasks import OneLabel

SMALL = {"depths": (1, 1), "widths": (8, 16), "stem_width": 8}
IN_GROUPS = SMALL | {"groups": 4}
PRUNED = SMALL | {"block_widths": (((6, 4, 10),), ((9, 7, 18),))}
FAMILIES = {  # name → what makes it small, and leaves it what the name says
    "resnet18": SMALL,
    "resnet50": SMALL,
    "resnet50_v1": SMALL,
    "resnet50c": SMALL,
    "resnet50d": SMALL,
    "resnet50s": SMALL | {"stem_width": 16},
    "resnet50t": SMALL,
    "resnet50_gn": SMALL,
    "test_resnet": SMALL | {"block": ("basic", "bottleneck")},
    "cifar_resnet8": SMALL,
    "wrn_10_1": SMALL,
    "wide_resnet50_2": SMALL,
    "resnext50_32x4d": IN_GROUPS,
    "seresnet18": SMALL,
    "seresnext26d_32x4d": IN_GROUPS,
    "senet154": IN_GROUPS,
    "ecaresnet50t": SMALL,
    "ecaresnet50d_pruned": PRUNED,
    "resnetaa34d": SMALL,
    "resnetaa50": SMALL,
    "resnetblur18": SMALL,
    "resnetblur50d": SMALL,
    "resnetrs50": SMALL,
    "resnetv2_18": SMALL,
    "resnetv2_50d": SMALL,
    "resnetv2_50t": SMALL,
    "resnetv2_50d_evos": SMALL,
    "resnetv2_50d_frn": SMALL,
    "resnetv2_50x1_bit": SMALL,
}
# Every kind of convolution, norm, pool and shortcut; the others combine these.
FAST = ("cifar_resnet8", "ecaresnet50t", "resnetblur50d", "resnetv2_50d_evos", "resnetv2_50d_frn")
SOAK = ("resnet18", "resnet50_v1", "resnet50s", "resnet50_gn", "test_resnet", "wrn_10_1", "senet154",
        "ecaresnet50d_pruned", "resnetaa34d", "resnetrs50", "resnetv2_50d", "resnetv2_50x1_bit")  # fmt: skip
# XLA compiles its options away: at this size that takes longer than to run without.
UNOPTIMISED = {"xla_backend_optimization_level": 0}


class Keys:
    """In place of nnx.Rngs, whose counting takes time quadratic in the depth, where only shapes are made."""

    def params(self):
        return jax.random.key(0)


def started(name, **options):
    """The new model, its kernels drawn by numpy: to compile their draws takes longer than the step."""
    model = nnx.eval_shape(lambda: create_model(name, num_classes=10, rngs=Keys(), **options))
    r = np.random.RandomState(0)

    def start(path, leaf):
        if path[-1] == "kernel":
            return np.float32(r.randn(*leaf.shape) * (2 / (math.prod(leaf.shape) // leaf.shape[-2])) ** 0.5)
        return np.full(leaf.shape, path[-1] in ("scale", "v", "var"), np.float32)

    arrays = {path: start(path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    arrays["head", "kernel"] /= 10
    nnx.update(model, nnx.traversals.unflatten_mapping(arrays))
    return model


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in FAST]
    + [pytest.param(name, "float32", marks=pytest.mark.soak) for name in SOAK]
    + [pytest.param(name, "bfloat16", marks=pytest.mark.soak) for name in FAST + SOAK[-5:]],
)
def test_ten_steps_learn_ten_images(name, dtype):
    model = started(name, **FAMILIES[name], dtype=jnp.dtype(dtype), drop_path=0.1)
    optimizer = optax.adam(0.01)
    graph, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, statistics = map(nnx.to_pure_dict, states)
    assert set(jax.tree.leaves(parameter_kinds(params))) == {"kernel", "norm", "bias"}

    r = np.random.RandomState(0)
    blobs = r.randint(0, 256, (10, 4, 4, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    batch = {"image": blobs, "label": np.arange(10)}  # of each class one: its frequency tells nothing
    c = default()
    c.data.image.update(mean=(0.5,) * 3, std=(0.25,) * 3, flip=False)
    problem = Problem(graph, ImageInputs(c.data), OneLabel(c.loss, 10))
    step = make_train_step(problem, lambda step: optimizer, c, parts=parts_sharding(data_mesh()))
    step = jax.jit(step, compiler_options=UNOPTIMISED)
    state, losses = TrainState(jnp.int32(0), params, statistics, jax.jit(optimizer.init)(params)), []
    for _ in range(10):
        state, sums = step(state, batch)
        losses.append(float(sums["loss"]) / 10)

    assert losses[0] == pytest.approx(np.log(10), abs=0.1)
    assert losses[-1] < losses[0] - 0.2
    after = jax.device_get((state.params, state.batch_stats))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), (params, statistics), after)
    assert all(jax.tree.leaves(moved)), moved
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after)} == {"float32"}
