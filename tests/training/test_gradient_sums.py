"""config.gradient_sums: what devices send each other of a kernel's gradient, and that float32 is not rounded before."""

import os
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from conftest import LIBTPU, ROOT, main_env, needs_libtpu
from flax import nnx
from ml_collections import ConfigDict

from jax_resnet.models.cpu import sum_gradients_in_float32
from jax_resnet.models.layers import conv
from jax_resnet.training.experiment import build


def of_kernel(model: nnx.Conv, x: jax.Array, weights: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The layer's output, and the gradients of its sum with `weights` for x and for the kernel."""
    graph, kernel = nnx.split(model)

    def loss(x: jax.Array, kernel: Any) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(graph, kernel)(x)
        return (y.astype(jnp.float32) * weights).sum(), y

    (_, y), (of_x, of_k) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, kernel)
    return tuple(np.asarray(v, np.float32) for v in (y, of_x, jax.tree.leaves(of_k)[0]))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "stride": 2, "groups": 4},
        {"kernel_size": 7, "stride": 2},
        {"kernel_size": 1, "stride": 2, "blur": True},
        {"kernel_size": 3, "stride": 2, "blur": True},
        {"kernel_size": 3, "standardise": True},
    ],
)
def test_a_kernels_gradient_is_that_of_the_same_rounded_numbers_in_float32(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)

    def layer(dtype: Any) -> nnx.Conv:
        return conv(16, 32, dtype=dtype, rngs=nnx.Rngs(0), **options)

    stride = options.get("stride", 1)
    x = jnp.asarray(rng.normal(size=(4, 8, 8, 16)), jnp.bfloat16)
    weights = jnp.asarray(rng.normal(size=(4, 8 // stride, 8 // stride, 32)), jnp.bfloat16).astype(jnp.float32)
    plain, summed = (
        of_kernel(layer(jnp.bfloat16), x, weights),
        of_kernel(sum_gradients_in_float32(layer(jnp.bfloat16)), x, weights),
    )
    exact = of_kernel(layer(jnp.float32), x.astype(jnp.float32), weights)
    for before, after in zip(plain[:2], summed[:2], strict=True):
        np.testing.assert_array_equal(before, after)  # the forward pass, and what goes on to the layer below
    scale = np.abs(exact[2]).max()
    # A standardised kernel's gradient goes on through kernels that are rounded in one and not in the other.
    near = 4e-3 if "standardise" in options or "blur" in options else 1e-6
    np.testing.assert_allclose(summed[2] / scale, exact[2] / scale, atol=near)
    assert np.abs(plain[2] - summed[2]).max() > 1e-4 * scale
    if "standardise" not in options:
        np.testing.assert_array_equal(plain[2], plain[2].astype(jnp.bfloat16).astype(np.float32))
        assert (summed[2] != summed[2].astype(jnp.bfloat16).astype(np.float32)).mean() > 0.9


def test_float32_activations_give_the_same_gradients(tiny_config: ConfigDict) -> None:
    found = []
    for sums in ("auto", "float32"):
        tiny_config.gradient_sums = sums
        experiment = build(tiny_config)
        rng = np.random.default_rng(0)
        batch = {"image": rng.integers(0, 256, (16, 12, 12, 1), np.uint8), "label": np.arange(16, dtype=np.int32) % 4}
        grads, _, _ = experiment.steps.gradients(
            experiment.network.fresh_state(), jax.device_put(batch, experiment.sharding)
        )
        found.append(jax.device_get(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *found)


ON_TPU = """
import sys
import jax, jax.numpy as jnp, optax
from jax_resnet.runtime.mesh import batch_sharding, parts_sharding, replicated
from jax_resnet.config import default
from jax_resnet.models.cpu import sum_gradients_in_float32
from jax_resnet.models.zoo import create_model
from jax_resnet.commands.program import topology_mesh
from jax_resnet.training.state import make_state
from jax_resnet.training.step import Problem, make_train_step
from jax_resnet.training.tasks import OneLabel
from jax_resnet.data.image.device import ImageInputs
mesh = topology_mesh("v5e:2x2")
rows, whole, optimizer = batch_sharding(mesh), replicated(mesh), optax.sgd(0.1)
as_summed = sum_gradients_in_float32 if sys.argv[1] == "float32" else lambda model: model
options = {"num_classes": 4, "dtype": jnp.bfloat16, "bn_group_size": 4}
make = lambda rngs: as_summed(create_model("cifar_resnet8", rngs=rngs, **options))
graph, state, _ = make_state(make, optimizer, 0, whole)
config = default()
config.data.image.crop = "none"
batch = {"image": jax.ShapeDtypeStruct((16, 16, 16, 3), jnp.uint8, sharding=rows),
         "label": jax.ShapeDtypeStruct((16,), jnp.int32, sharding=rows)}
problem = Problem(graph, ImageInputs(config.data), OneLabel(config.loss, 4))
step = make_train_step(problem, optimizer, config, parts=parts_sharding(mesh))
print(jax.jit(step, in_shardings=(whole, rows), out_shardings=whole).lower(state, batch).compile().as_text())
"""


@pytest.mark.soak
@pytest.mark.usefixtures("turn")
@needs_libtpu
@pytest.mark.parametrize(("sums", "dtype"), [("auto", "bf16"), ("float32", "f32")])
def test_what_a_tpu_sends_of_the_kernels(sums: str, dtype: str) -> None:
    """In the program that its compiler makes for four chips every 3×3 kernel is in an all-reduce of that dtype."""
    env = main_env() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(LIBTPU)])}
    done = programs.run([sys.executable, "-c", ON_TPU, sums], env=env)
    assert done.returncode == 0, done.stderr
    reduced = " ".join(re.findall(r"= (.*?) all-reduce(?:-start)?\(", done.stdout))
    assert re.findall(r"(\w+)\[3,3,\d+,\d+\]", reduced) == [dtype] * 7
