"""Convolutions as products of matrices, maxima by comparing: XLA's numbers, and what is left to XLA."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_resnet.models import cpu as convolution
from jax_resnet.models.cpu import as_product, for_cpu, max_pool_by_comparing
from jax_resnet.models.layers import conv, max_pool
from jax_resnet.models.zoo import create_model
from jax_resnet.runtime.mesh import mesh_over

ONE = mesh_over(jax.devices()[:1])
NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def convolutions(function: Callable[..., Any], *args: Any) -> int:
    """How many there are in the program, gradients not counted."""
    return str(jax.make_jaxpr(function)(*args)).count("conv_general_dilated[")


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 2), (4, 4), (5, 9)])
def test_product_is_the_convolution(shape: tuple[int, int], stride: int, kernel_size: int) -> None:
    """Its values, and the gradients for image and kernel."""
    random, pad = np.random.default_rng(0), ((kernel_size // 2,) * 2,) * 2
    x = random.normal(size=(3, *shape, 4)).astype(np.float32)
    kernel = random.normal(size=(kernel_size, kernel_size, 4, 6)).astype(np.float32)

    def expected(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pad, **NHWC)

    def found(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return as_product(x, kernel, (stride, stride), pad, **NHWC)

    y = expected(x, kernel)
    of_expected, of_found = (jax.jit(lambda x, k, f=f: jax.vjp(f, x, k)[1](y))(x, kernel) for f in (expected, found))
    np.testing.assert_allclose(jax.jit(found)(x, kernel), y, rtol=1e-5, atol=1e-5)
    for a, b in zip(of_found, of_expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    small = min(y.shape[1:3]) < kernel_size or kernel_size == 1
    assert convolutions(found, x, kernel) == (0 if small else 1)


@pytest.mark.parametrize("on_a_mesh", [True, False])
@pytest.mark.parametrize("cache", [1, 1000, 10**9])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [((1, 1), (0, 1)), ((0, 2), (1, 0)), ((4, 3), (0, 5))])
@pytest.mark.parametrize("channels", [(1, 6), (4, 6), (6, 2)])
def test_gradient_for_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
    channels: tuple[int, int],
    padding: tuple[tuple[int, int], ...],
    stride: int,
    cache: int,
    on_a_mesh: bool,
) -> None:
    """As XLA's, whichever copies it is made of, of all the batch or of parts. Of several devices: test_devices.py."""
    monkeypatch.setattr(convolution, "CACHE", cache)
    random, strides = np.random.default_rng(0), (stride, stride)
    mesh = mesh_over(jax.devices()[:1]) if on_a_mesh else None
    x = random.normal(size=(6, 8, 9, channels[0])).astype(np.float32)
    kernel = random.normal(size=(3, 2, *channels)).astype(np.float32)
    y = jax.lax.conv_general_dilated(x, kernel, strides, padding, **NHWC)
    grad = random.normal(size=y.shape).astype(np.float32)

    def expected(kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **NHWC)

    def found(kernel: jax.Array) -> jax.Array:
        return as_product(x, kernel, strides, padding, mesh=mesh, **NHWC)

    of_expected, of_found = (jax.jit(lambda k, f=f: jax.vjp(f, k)[1](grad)[0]) for f in (expected, found))
    np.testing.assert_allclose(of_found(kernel), of_expected(kernel), rtol=1e-4, atol=1e-4)
    program = str(jax.make_jaxpr(of_found)(kernel))
    assert "conv_general_dilated" in program  # of which the value is
    assert program.count("dot_general") == 1
    assert ("scan[" in program) == (cache < 10**9)
    assert program.count("psum") == (1 if on_a_mesh else 0)  # of all parts together


@pytest.mark.parametrize("zero_padded", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (6, 7), (8, 8)])
def test_gradient_of_a_maximum(shape: tuple[int, int], stride: int, zero_padded: bool) -> None:
    """Exactly XLA's, also where several of a window are the largest, or what lies beyond the border is."""
    random = np.random.default_rng(0)
    x = random.integers(-3, 2, size=(3, *shape, 4)).astype(np.float32)  # small integers: ties, and exact sums
    y, of_max = jax.vjp(lambda x: max_pool(x, stride=stride, zero_padded=zero_padded), x)
    found, of_found = jax.vjp(lambda x: max_pool_by_comparing(x, stride=stride, zero_padded=zero_padded), x)
    grad = random.integers(-9, 10, size=y.shape).astype(np.float32)
    np.testing.assert_array_equal(found, y)
    np.testing.assert_array_equal(of_found(grad)[0], of_max(grad)[0])
    assert "select_and_scatter" not in str(jax.make_jaxpr(of_found)(grad))


def test_parts_of_a_gradient_are_added_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """225 ones in each of 255 parts: bfloat16 has eight bits of a sum."""
    monkeypatch.setattr(convolution, "CACHE", 1)
    x, kernel = jnp.ones((255, 15, 15, 1), jnp.bfloat16), jnp.ones((2, 2, 1, 1), jnp.bfloat16)
    y, back = jax.vjp(lambda k: as_product(x, k, (1, 1), ((0, 1), (0, 1)), **NHWC), kernel)
    grad = back(jnp.ones_like(y))[0]
    assert grad.dtype == jnp.bfloat16
    assert grad[0, 0, 0, 0] == jnp.bfloat16(225 * 255)


def test_dilated_ones_are_left_to_xla() -> None:
    x, kernel = jnp.ones((1, 3, 3, 2)), jnp.ones((1, 1, 2, 2))
    for dilation in ("lhs_dilation", "rhs_dilation"):
        options = NHWC | {dilation: (2, 2)}
        expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), ((0, 0), (0, 0)), **options)
        np.testing.assert_array_equal(as_product(x, kernel, (1, 1), ((0, 0), (0, 0)), **options), expected)


def test_groups_and_bfloat16() -> None:
    x, grouped = jnp.ones((2, 2, 2, 8)), conv(8, 8, 3, groups=4, rngs=nnx.Rngs(0))
    expected = grouped(x)
    assert convolutions(for_cpu(grouped, ONE), x) == 1
    np.testing.assert_array_equal(grouped(x), expected)
    assert for_cpu(conv(8, 8, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), ONE)(x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"antialias": "blur_conv"}),
        pytest.param("ecaresnet26t", {}, marks=pytest.mark.soak),
        pytest.param("resnetv2_50x1_bit", {}, marks=pytest.mark.soak),
    ],
)
def test_networks_keep_their_logits(name: str, options: dict[str, Any]) -> None:
    """Among them those with blurred, one-dimensional and standardised convolutions."""
    model = jax.jit(
        lambda: create_model(
            name, num_classes=7, depths=(1, 1, 1, 1), zero_init_last=False, rngs=nnx.Rngs(0), **options
        )
    )()
    model.eval()
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    expected = jax.jit(lambda x: model(x))(x)
    before = convolutions(lambda x: model(x), x)
    model = for_cpu(model, ONE)
    assert convolutions(lambda x: model(x), x) <= before - 3
    assert "select_and_scatter" not in str(jax.make_jaxpr(jax.grad(lambda x: model(x).sum()))(x))  # of no maximum
    found = jax.jit(lambda x: model(x))(x)
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(np.abs(expected).max()))
