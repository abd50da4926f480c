"""Layers other than norms that Flax does not have in the form residual networks need."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

# He et al. 2015, "Delving deep into rectifiers", section 2.2: the normal is not truncated.
# fan_out is the paper's backward form.
kaiming_normal = partial(nnx.initializers.variance_scaling, 2.0, distribution="normal")


def conv(
    in_features: int,
    out_features: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    standardise: bool = False,
    blur: bool = False,
    init: Literal["fan_out", "fan_in"] = "fan_out",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Make a square convolution without bias, padded by kernel_size // 2 on every side.

    XLA's SAME pads a stride-2 convolution on the right and bottom only, which gives other numbers
    than the networks published in torch: on ResNet-50 by 7 % of the largest logit. With `blur`, a
    convolution with a stride and at least 16 input channels blurs them first (FFCV's and Composer's
    BlurPool): `blurred_conv`.
    """
    pad = kernel_size // 2
    kind = StandardisedConv if standardise else nnx.Conv
    blurs = blur and stride > 1 and in_features >= 16
    return kind(
        in_features,
        out_features,
        (kernel_size, kernel_size),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        feature_group_count=groups,
        use_bias=False,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=kaiming_normal(init),
        conv_general_dilated=blurred_conv if blurs else jax.lax.conv_general_dilated,
        rngs=rngs,
    )


class StandardisedConv(nnx.Conv):
    """A convolution whose kernel has mean 0 and variance 1 for each output channel.

    Qiao et al. 2019, "Micro-batch training with batch-channel normalization and weight
    standardization"; the epsilon is that of BiT (Kolesnikov et al. 2019). The kernel is
    standardised in float32, then cast.
    """

    EPSILON = 1e-8

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """Convolve: [N, H, W, in_features] → [N, H', W', out_features]."""
        kernel = self.kernel[...]
        strides: Any = (self.strides, self.strides)
        padding: Any = self.padding
        centred = kernel - kernel.mean((0, 1, 2))
        kernel = centred * jax.lax.rsqrt(jnp.square(centred).mean((0, 1, 2)) + self.EPSILON)
        x, kernel = self.promote_dtype((x, kernel), dtype=self.dtype)
        return self.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.feature_group_count,
        )


class SqueezeExcite(nnx.Module):
    """A gate on each channel, computed from all channels' means by two linear layers, in float32.

    Hu et al. 2017, section 3. The hidden layer has `ratio` times the channels, rounded to a
    multiple of 8, at least 8.
    """

    def __init__(self, features: int, *, ratio: float = 1 / 16, rngs: nnx.Rngs):
        hidden = max(8, int(features * ratio + 4) // 8 * 8)
        self.fc1 = nnx.Linear(features, hidden, kernel_init=kaiming_normal("fan_out"), rngs=rngs)
        self.fc2 = nnx.Linear(hidden, features, kernel_init=kaiming_normal("fan_out"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Weight the channels: x [N, H, W, C] → the same shape and dtype."""
        gate = jax.nn.sigmoid(self.fc2(nnx.relu(self.fc1(_means(x)))))
        return x * gate[:, None, None].astype(x.dtype)


class EfficientChannelAttention(nnx.Module):
    """A gate on each channel, computed from its neighbours' means by a convolution, in float32.

    Wang et al. 2019, section 3.2. The kernel grows with the logarithm of the number of channels:
    `nominal`, which is that before pruning, or `features`.
    """

    def __init__(self, features: int, *, nominal: int | None = None, rngs: nnx.Rngs):
        size = int((math.log2(nominal or features) + 1) / 2)
        size = max(3, size + 1 - size % 2)
        self.conv = nnx.Conv(1, 1, (size,), padding=size // 2, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Weight the channels: x [N, H, W, C] → the same shape and dtype."""
        gate = jax.nn.sigmoid(self.conv(_means(x)[..., None]))[..., 0]
        return x * gate[:, None, None].astype(x.dtype)


def _means(x: jax.Array) -> jax.Array:
    return x.mean((1, 2), dtype=jnp.float32)


class DropPath(nnx.Module):
    """The schedule and draws of stochastic depth, which drops residuals of examples in training.

    Huang et al. 2016. The share dropped grows linearly from 0 in the first block to `rate` in the
    last (section 3, "linear decay").
    """

    def __init__(self, rate: float, blocks: int):
        self.keep = tuple(1 - rate * i / max(blocks - 1, 1) for i in range(blocks))
        self.deterministic = False  # model.eval() sets it

    def __call__(self, examples: int, key: jax.Array) -> jax.Array:
        """Draw the residuals' factors, 0 or 1 / share kept: float32 [blocks, examples, 1, 1, 1]."""
        keep = jnp.array(self.keep)[:, None]
        kept = jax.random.bernoulli(key, keep, (len(self.keep), examples))
        return (kept / keep)[:, :, None, None, None]


def max_pool(x: jax.Array, *, stride: int = 2, zero_padded: bool = False) -> jax.Array:
    """Take the 3×3 maximum, padded by one pixel of −∞ or of zeros on every side.

    [N, H, W, C] → [N, ⌈H/stride⌉, ⌈W/stride⌉, C].
    """
    pad = ((1, 1), (1, 1))
    if zero_padded:
        return nnx.max_pool(jnp.pad(x, ((0, 0), *pad, (0, 0))), (3, 3), strides=(stride, stride))
    return nnx.max_pool(x, (3, 3), strides=(stride, stride), padding=pad)


def avg_pool(x: jax.Array) -> jax.Array:
    """Take the 2×2 mean at stride 2, at an odd border that of the pixels inside.

    [N, H, W, C] → [N, ⌈H/2⌉, ⌈W/2⌉, C].
    """
    pad = tuple((0, size % 2) for size in x.shape[1:3])
    return nnx.avg_pool(x, (2, 2), strides=(2, 2), padding=pad, count_include_pad=False)


def blur_pool(x: jax.Array, *, stride: int = 2, zero_padded: bool = False) -> jax.Array:
    """Blur by a binomial 3×3 filter, the image mirrored at the border or continued by zeros.

    [N, H, W, C] → [N, ⌈H/stride⌉, ⌈W/stride⌉, C]. Zhang 2019, "Making convolutional networks
    shift-invariant again". An image to be mirrored must be at least 2 pixels high and wide.
    """
    mode = "constant" if zero_padded else "reflect"
    y = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=mode).astype(jnp.float32)
    # The filter is the outer product of (1, 2, 1) / 4 with itself.
    for axis in (1, 2):
        last = (y.shape[axis] - 3) // stride * stride
        a, b, c = (jax.lax.slice_in_dim(y, i, i + last + 1, stride, axis) for i in range(3))
        y = (a + 2 * b + c) / 4
    return y.astype(x.dtype)


def blurred_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Any,
    padding: Any,
    *,
    conv: Callable[..., jax.Array] = jax.lax.conv_general_dilated,
    **options: Any,
) -> jax.Array:
    """Blur x [N, H, W, C] with zeros beyond the border, then convolve it with a kernel HWIO.

    The arguments are those of `jax.lax.conv_general_dilated`.
    """
    if kernel.shape[:2] == (1, 1):
        # A 1×1 kernel reads one pixel a stride, so that only those need to be blurred.
        x = blur_pool(x, stride=strides[0], zero_padded=True)
        strides = (1, 1)
    else:
        x = blur_pool(x, stride=1, zero_padded=True)
    return conv(x, kernel, strides, padding, **options)
