"""Convolutions and maxima computed otherwise than XLA does by itself: the same numbers, but for rounding."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jax_resnet.models.layers import blurred_conv
from jax_resnet.models.resnet import StemPool

CACHE = 4 * 2**20  # bytes that a core finds close by


def for_cpu(model: nnx.Module, mesh: Mesh) -> nnx.Module:
    """Have `model` compute otherwise what XLA is slow at on CPUs, convolutions and gradients of maxima; return it.

    Of several devices in `mesh` each has its share of the rows of a batch.
    """
    product = partial(as_product, mesh=mesh if mesh.size > 1 else None)
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Conv):
            blurs = module.conv_general_dilated is blurred_conv
            module.conv_general_dilated = partial(blurred_conv, conv=product) if blurs else product
        if isinstance(module, StemPool):
            module.max_pool = max_pool_by_comparing
    return model


def _with_gradient(forward: Callable[..., jax.Array], for_kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`forward` of x and a kernel, whose gradient is `for_kernel` of both and the gradient for what `forward` gives."""

    def backward(given: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, kernel = given
        (for_x,) = jax.vjp(lambda x: forward(x, kernel), x)[1](grad)
        return for_x, for_kernel(x, kernel, grad)

    with_gradient = jax.custom_vjp(forward)
    with_gradient.defvjp(lambda *given: (forward(*given), given), backward)
    return with_gradient


def as_product(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, *, mesh: Mesh | None = None, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for x [N, H, W, C] and a kernel HWIO; a product of matrices where that is faster.

    That is where the kernel sees one pixel, and where it is larger than the image that it gives: XLA:CPU then leaves
    its fast path, forward or for the image's gradient, and takes 20 to 50 times as long. Elsewhere only the gradient
    for the kernel is one, by parts of the batch: XLA:CPU transposes what it is computed from and, where channels are
    few, uses one core (benchmarks/convolutions.py). The devices of `mesh` each go through the parts of their rows.
    """

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    dilated = any(by not in (None, 1, (1, 1)) for by in (options.get("lhs_dilation"), options.get("rhs_dilation")))
    if x.ndim != 4 or options.get("feature_group_count", 1) > 1 or isinstance(padding, str) or dilated:
        return forward(x, kernel)
    window, precision = kernel.shape[:2], options.get("precision")
    spans = zip(x.shape[1:3], window, strides, padding, strict=True)
    if window == (1, 1) or any((size + sum(pads) - of) // by + 1 < of for size, of, by, pads in spans):
        seen = patches(x, window, strides, padding)
        rows = seen.reshape(-1, seen.shape[-1])  # of more dimensions XLA:CPU transposes all for the kernel's gradient
        found = jnp.matmul(rows, kernel.reshape(-1, kernel.shape[-1]), precision=precision)
        return found.reshape(*seen.shape[:-1], -1)
    for_kernel: Callable[..., jax.Array] = partial(_for_kernel, strides=strides, padding=padding, precision=precision)
    if mesh:
        for_kernel = _summed_over(mesh, for_kernel)
    return _with_gradient(forward, for_kernel)(x, kernel)


def patches(x: jax.Array, window: Any, strides: Any, padding: Any) -> jax.Array:
    """What each pixel of a convolution's result is computed from: of x [N, H, W, C] [N, H', W', rows · columns · C]."""
    return jnp.concatenate(_moved(jnp.pad(x, ((0, 0), *padding, (0, 0))), window, strides), -1)


def _moved(x: jax.Array, window: Any, strides: Any) -> list[jax.Array]:
    """For each place in a window, row by row, what of x [N, H, W, C] lies there, in all windows: [N, H', W', C]."""
    down, right = strides
    height, width = ((size - of) // by + 1 for size, of, by in zip(x.shape[1:3], window, strides, strict=True))
    return [
        x[:, i : i + down * (height - 1) + 1 : down, j : j + right * (width - 1) + 1 : right]
        for i in range(window[0])
        for j in range(window[1])
    ]


def max_pool_by_comparing(x: jax.Array, *, stride: int = 2, zero_padded: bool = False) -> jax.Array:
    """`layers.max_pool`, whose gradient is found by comparing: it goes to the first of the largest in a window.

    XLA:CPU finds that place anew, along with four arrays of integers that number all places.
    """
    border = 0 if zero_padded else -jnp.inf
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=border)

    def forward(padded: jax.Array) -> jax.Array:
        return nnx.max_pool(padded, (3, 3), strides=(stride, stride))

    def backward(given: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array]:
        padded, largest = given
        seen, back = jax.vjp(partial(_moved, window=(3, 3), strides=(stride, stride)), padded)
        found, grads = jnp.zeros(largest.shape, bool), []
        for of in seen:
            grads.append(jnp.where((of == largest) & ~found, grad, 0))
            found |= of == largest
        return back(grads)

    compared = jax.custom_vjp(forward)
    compared.defvjp(lambda padded: (largest := forward(padded), (padded, largest)), backward)
    return compared(padded)


def _summed_over(mesh: Mesh, for_kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The sum of what each device finds for its rows. Left to XLA, the devices would add up part after part."""
    whole, rows = PartitionSpec(), PartitionSpec("data")
    return jax.shard_map(
        lambda *given: jax.lax.psum(for_kernel(*given), "data"),
        mesh=mesh,
        in_specs=(rows, whole, rows),
        out_specs=whole,
        check_vma=False,  # a scan's first total would have to be marked as each device's own
    )


def _for_kernel(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, strides: Any, padding: Any, precision: Any
) -> jax.Array:
    """The gradient for a kernel, from that for the result: a product of copies of both, whichever take less memory.

    A kernel of k×k takes each pixel of `grad` beside k² of x. These can be laid side by side or, with stride 1, k
    copies of each, of x moved down and of `grad` moved right. Copies of a part of the batch stay in a core's cache.
    """
    (rows, columns, channels, features), width = kernel.shape, x.shape[2]
    seen, moved = rows * columns * channels * grad.size // features, rows * x.size + columns * grad.size
    moves = max(strides) == 1 and moved < seen

    def of_part(x: jax.Array, grad: jax.Array) -> jax.Array:
        if moves:
            height, ((top, bottom), (left, right)) = grad.shape[1], padding
            none, zero = (0, 0, 0), jnp.zeros((), x.dtype)
            x = jax.lax.pad(x, zero, (none, (top, bottom, 0), none, none))
            grad = jax.lax.pad(grad, zero, (none, none, (columns - 1 - left, columns - 1 - right, 0), none))
            x = jnp.concatenate([x[:, i : i + height] for i in range(rows)], -1)
            grad = jnp.concatenate([grad[:, :, j : j + width] for j in reversed(range(columns))], -1)
        else:
            x = patches(x, (rows, columns), strides, padding)
        x, grad = (of.reshape(-1, of.shape[-1]) for of in (x, grad))
        dtype = jnp.promote_types(x.dtype, jnp.float32)  # of a sum
        return jax.lax.dot_general(x, grad, (((0,), (0,)), ((), ())), precision, dtype)

    size, batch = x.dtype.itemsize * (moved if moves else seen), len(x)
    parts = next(n for n in range(1, batch + 1) if batch % n == 0 and (size <= n * CACHE or n == batch))
    if parts > 1:
        cut = [of.reshape(parts, -1, *of.shape[1:]) for of in (x, grad)]
        nothing = jnp.zeros_like(jax.eval_shape(of_part, cut[0][0], cut[1][0]))
        found, _ = jax.lax.scan(lambda total, part: (total + of_part(*part), None), nothing, cut)
    else:
        found = of_part(x, grad)
    found = found.astype(kernel.dtype)
    if not moves:
        return found.reshape(kernel.shape)
    return found.reshape(rows, channels, columns, features).transpose(0, 2, 1, 3)
