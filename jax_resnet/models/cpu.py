"""Convolutions and maxima in forms that are fast on CPUs: XLA's numbers, apart from rounding."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jax_resnet.models.layers import blurred_conv
from jax_resnet.models.resnet import StemPool

CACHE = 4 * 2**20  # bytes, of one core


def for_cpu(model: nnx.Module, mesh: Mesh) -> nnx.Module:
    """Replace the convolutions and maxima of `model` by forms that are fast on CPUs; return it.

    Batches are sharded by rows over the devices of `mesh`.
    """
    product = partial(as_product, mesh=mesh if mesh.size > 1 else None)
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Conv):
            if module.conv_general_dilated is blurred_conv:
                module.conv_general_dilated = partial(blurred_conv, conv=product)
            else:
                module.conv_general_dilated = product
        if isinstance(module, StemPool):
            module.max_pool = max_pool_by_comparing
    return model


def _with_gradient(forward: Callable[..., jax.Array], for_kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return forward(x, kernel) with the kernel's gradient computed by for_kernel(x, kernel, grad).

    `grad` is the gradient of the output.
    """

    def backward(inputs: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, kernel = inputs
        (for_x,) = jax.vjp(lambda x: forward(x, kernel), x)[1](grad)
        return for_x, for_kernel(x, kernel, grad)

    with_gradient = jax.custom_vjp(forward)
    with_gradient.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)
    return with_gradient


def as_product(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, *, mesh: Mesh | None = None, **options: Any
) -> jax.Array:
    """Convolve x [N, H, W, C] with a kernel HWIO, by a matrix product where that is faster.

    The arguments are those of `jax.lax.conv_general_dilated`, and `mesh`. The product is faster for
    1×1 kernels, and for kernels larger than the output: XLA:CPU then leaves its fast path, forward
    or for the image's gradient, and takes 20 to 50 times as long. For all others only the kernel's
    gradient is a product, over parts of the batch: XLA:CPU transposes its operands and, where
    channels are few, uses one core (benchmarks/convolutions.py). Each device of `mesh` computes the
    parts of its own rows.
    """

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    dilations = (options.get("lhs_dilation"), options.get("rhs_dilation"))
    dilated = any(dilation not in (None, 1, (1, 1)) for dilation in dilations)
    grouped = options.get("feature_group_count", 1) > 1
    if x.ndim != 4 or grouped or isinstance(padding, str) or dilated:
        return forward(x, kernel)
    window = kernel.shape[:2]
    precision = options.get("precision")
    sides = zip(x.shape[1:3], window, strides, padding, strict=True)
    small = any((size + sum(pads) - k) // step + 1 < k for size, k, step, pads in sides)
    if window == (1, 1) or small:
        columns = patches(x, window, strides, padding)
        # XLA:CPU transposes arrays of more dimensions for the kernel's gradient.
        matrix = columns.reshape(-1, columns.shape[-1])
        product = jnp.matmul(matrix, kernel.reshape(-1, kernel.shape[-1]), precision=precision)
        return product.reshape(*columns.shape[:-1], -1)
    for_kernel: Callable[..., jax.Array] = partial(_for_kernel, strides=strides, padding=padding, precision=precision)
    if mesh:
        for_kernel = _summed_over(mesh, for_kernel)
    return _with_gradient(forward, for_kernel)(x, kernel)


def patches(x: jax.Array, window: Any, strides: Any, padding: Any) -> jax.Array:
    """Gather the inputs of each output pixel of a convolution (im2col).

    x [N, H, W, C] → [N, H', W', rows · columns · C], for a `window` of rows × columns.
    """
    return jnp.concatenate(_moved(jnp.pad(x, ((0, 0), *padding, (0, 0))), window, strides), -1)


def _moved(x: jax.Array, window: Any, strides: Any) -> list[jax.Array]:
    """List for each position in a window, row by row, the pixels of x at it in all windows.

    x [N, H, W, C] → rows · columns arrays [N, H', W', C].
    """
    down, right = strides
    height = (x.shape[1] - window[0]) // down + 1
    width = (x.shape[2] - window[1]) // right + 1
    return [
        x[:, i : i + down * (height - 1) + 1 : down, j : j + right * (width - 1) + 1 : right]
        for i in range(window[0])
        for j in range(window[1])
    ]


def max_pool_by_comparing(x: jax.Array, *, stride: int = 2, zero_padded: bool = False) -> jax.Array:
    """Compute `layers.max_pool` with a gradient by comparison, to the first maximum in each window.

    XLA:CPU searches for the maximum again, with four arrays of integers that number all pixels.
    """
    border = 0 if zero_padded else -jnp.inf
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=border)

    def forward(padded: jax.Array) -> jax.Array:
        return nnx.max_pool(padded, (3, 3), strides=(stride, stride))

    def backward(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array]:
        padded, largest = residuals
        shifted, back = jax.vjp(partial(_moved, window=(3, 3), strides=(stride, stride)), padded)
        assigned = jnp.zeros(largest.shape, bool)
        grads = []
        for pixels in shifted:
            grads.append(jnp.where((pixels == largest) & ~assigned, grad, 0))
            assigned |= pixels == largest
        return back(grads)

    compared = jax.custom_vjp(forward)
    compared.defvjp(lambda padded: (largest := forward(padded), (padded, largest)), backward)
    return compared(padded)


def _summed_over(mesh: Mesh, for_kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Compute the kernel's gradient on each device's rows, then sum over devices once.

    XLA by itself would sum over devices after each part of the batch.
    """
    replicated = PartitionSpec()
    by_rows = PartitionSpec("data")
    return jax.shard_map(
        lambda *operands: jax.lax.psum(for_kernel(*operands), "data"),
        mesh=mesh,
        in_specs=(by_rows, replicated, by_rows),
        out_specs=replicated,
        # With the check, the scan's first total would have to be marked as varying over devices.
        check_vma=False,
    )


def _for_kernel(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, strides: Any, padding: Any, precision: Any
) -> jax.Array:
    """Compute a kernel's gradient from that of the output, by a product of copies of x and `grad`.

    A kernel of k×k takes each pixel of `grad` beside k² of x. Either these k² are copied (patches)
    or, with stride 1, k copies of each are made, of x shifted down and of `grad` shifted right:
    whichever takes less memory. Copies of a part of the batch stay in a core's cache.
    """
    rows, columns, channels, features = kernel.shape
    width = x.shape[2]
    patches_size = rows * columns * channels * grad.size // features
    shifted_size = rows * x.size + columns * grad.size
    shifts = max(strides) == 1 and shifted_size < patches_size

    def part_gradient(x: jax.Array, grad: jax.Array) -> jax.Array:
        if shifts:
            height = grad.shape[1]
            (top, bottom), (left, right) = padding
            none = (0, 0, 0)
            zero = jnp.zeros((), x.dtype)
            x = jax.lax.pad(x, zero, (none, (top, bottom, 0), none, none))
            sides = (columns - 1 - left, columns - 1 - right, 0)
            grad = jax.lax.pad(grad, zero, (none, none, sides, none))
            x = jnp.concatenate([x[:, i : i + height] for i in range(rows)], -1)
            shifted = [grad[:, :, j : j + width] for j in reversed(range(columns))]
            grad = jnp.concatenate(shifted, -1)
        else:
            x = patches(x, (rows, columns), strides, padding)
        x = x.reshape(-1, x.shape[-1])
        grad = grad.reshape(-1, grad.shape[-1])
        sum_dtype = jnp.promote_types(x.dtype, jnp.float32)
        return jax.lax.dot_general(x, grad, (((0,), (0,)), ((), ())), precision, sum_dtype)

    copied = shifted_size if shifts else patches_size
    parts = _count_parts(len(x), x.dtype.itemsize * copied)
    if parts > 1:
        cut = [array.reshape(parts, -1, *array.shape[1:]) for array in (x, grad)]
        zeros = jnp.zeros_like(jax.eval_shape(part_gradient, cut[0][0], cut[1][0]))
        total, _ = jax.lax.scan(lambda sums, part: (sums + part_gradient(*part), None), zeros, cut)
    else:
        total = part_gradient(x, grad)
    total = total.astype(kernel.dtype)
    if not shifts:
        return total.reshape(kernel.shape)
    return total.reshape(rows, channels, columns, features).transpose(0, 2, 1, 3)


def _count_parts(batch_size: int, copied_bytes: int) -> int:
    """Return the fewest equal parts of a batch whose copies fit a core's cache, or its size."""
    for parts in range(1, batch_size):
        if batch_size % parts == 0 and copied_bytes <= parts * CACHE:
            return parts
    return batch_size
