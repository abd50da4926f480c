"""Convolutions computed otherwise than XLA does by itself: the same numbers, but for rounding."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_resnet.models.layers import blurred_conv


def sum_gradients_in_float32(model: nnx.Module) -> nnx.Module:
    """The same model, of which the gradients of kernels are float32 already where devices add theirs up.

    A convolution in bfloat16 gives its kernel's gradient in bfloat16, and that is what is then sent and summed.
    """
    for module in _convolutions(model):
        module.promote_dtype = _all_but_kernel
        blurs = module.conv_general_dilated is blurred_conv
        module.conv_general_dilated = _blurred_rounding_no_gradient if blurs else _rounding_no_gradient
    return model


def for_cpu(model: nnx.Module) -> nnx.Module:
    """The same model, of which those convolutions are products of matrices at which XLA is slow on CPUs."""
    for module in _convolutions(model):
        blurs = module.conv_general_dilated is blurred_conv
        module.conv_general_dilated = _blurred_as_product if blurs else as_product
    return model


def _convolutions(model: nnx.Module) -> list[nnx.Conv]:
    return [module for _, module in nnx.iter_graph(model) if isinstance(module, nnx.Conv)]


def _all_but_kernel(arrays: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    del inexact
    x, kernel, *bias = arrays
    return x.astype(dtype), kernel, *bias


def _rounding_no_gradient(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated` in the dtype of x; the gradient for the float32 kernel is not rounded to that."""

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), *args, **options)

    def backward(given: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, kernel = given
        (of_x,) = jax.vjp(lambda x: forward(x, kernel), x)[1](grad)
        (of_kernel,) = jax.vjp(partial(forward, x.astype(kernel.dtype)), kernel)[1](grad.astype(kernel.dtype))
        return of_x, of_kernel

    of_both = jax.custom_vjp(forward)
    of_both.defvjp(lambda *given: (forward(*given), given), backward)
    return of_both(x, kernel)


def as_product(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated` for x [N, H, W, C] and a kernel HWIO; a product of matrices where that is faster.

    That is where the kernel sees one pixel, and where it is larger than the image that it gives: XLA:CPU then leaves
    its fast path, forward or for the image's gradient, and takes 30 to 50 times as long (benchmarks/convolutions.py).
    """
    dilated = any(by not in (None, 1, (1, 1)) for by in (options.get("lhs_dilation"), options.get("rhs_dilation")))
    if x.ndim != 4 or options.get("feature_group_count", 1) > 1 or isinstance(padding, str) or dilated:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    *window, _, features = kernel.shape
    spans = zip(x.shape[1:3], window, strides, padding, strict=True)
    out = [(size + sum(pads) - of) // stride + 1 for size, of, stride, pads in spans]
    if window != [1, 1] and all(size >= of for size, of in zip(out, window, strict=True)):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    (down, right), (height, width) = strides, out
    seen = [
        x[:, i : i + down * (height - 1) + 1 : down, j : j + right * (width - 1) + 1 : right]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return jnp.matmul(jnp.concatenate(seen, -1), kernel.reshape(-1, features), precision=options.get("precision"))


_blurred_rounding_no_gradient = partial(blurred_conv, conv=_rounding_no_gradient)
_blurred_as_product = partial(blurred_conv, conv=as_product)
