"""The layers that Flax does not have in the form residual networks need."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

# He et al. 2015, "Delving deep into rectifiers", section 2.2: untruncated normal. fan_out is the backward form.
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
    """A square convolution without bias, padded by kernel_size // 2 on every side.

    XLA's SAME pads a stride-2 convolution on the right and bottom only, which gives other numbers than the networks
    published in torch: on ResNet-50 by 7 % of the largest logit. With `blur`, one with a stride and 16 channels or more
    blurs them first (FFCV's and Composer's BlurPool): `blurred_conv`.
    """
    pad = kernel_size // 2
    return (StandardisedConv if standardise else nnx.Conv)(
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
        conv_general_dilated=blurred_conv
        if blur and stride > 1 and in_features >= 16
        else jax.lax.conv_general_dilated,
        rngs=rngs,
    )


class StandardisedConv(nnx.Conv):
    """A convolution whose kernel is shifted and scaled, for each output channel, to mean 0 and variance 1.

    Qiao et al. 2019, "Micro-batch training with batch-channel normalization and weight standardization"; the epsilon is
    that of BiT (Kolesnikov et al. 2019). The kernel is standardised in float32, then cast.
    """

    EPSILON = 1e-8

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """[N, H, W, in_features] → [N, H', W', out_features]."""
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


class _Norm(nnx.Module):
    """Scale and bias for each channel, float32, and whether the activation is part of it.

    What a norm computes is float32 whatever the input's dtype; the result is cast to it once.
    """

    def __init__(self, features: int, *, activation: bool = False, zero_scale: bool = False, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.zeros(features) if zero_scale else jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.activation = activation
        self.epsilon = epsilon

    def _activate(self, x: jax.Array) -> jax.Array:
        return nnx.relu(x) if self.activation else x


class BatchNorm(_Norm):
    """Batch normalisation (Ioffe and Szegedy 2015) over stated groups of examples, then ReLU if `activation`.

    The batch is cut into runs of `group_size` consecutive examples, each normalised by its own statistics; None means
    one group, the whole batch over all devices. What is computed therefore does not depend on how many devices hold the
    batch; when each device holds whole groups, no statistics travel between them. Running statistics follow the mean
    over groups, with the unbiased variance, as torch keeps it.
    """

    def __init__(self, features: int, *, group_size: int | None = None, momentum: float = 0.9, **options: Any):
        super().__init__(features, **options)
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.group_size = group_size
        self.momentum = momentum
        self.use_running_average = False  # model.eval() sets it

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [N, H, W, C] → the same shape and dtype. Raises ValueError if the groups do not divide N in training."""
        if self.use_running_average:
            return self._activate(self._normalise(x.astype(jnp.float32), self.mean[...], self.var[...]).astype(x.dtype))
        n, h, w, c = x.shape
        size = n if self.group_size is None else self.group_size
        if n % size:
            raise ValueError(f"a batch of {n} examples cannot be cut into batch-norm groups of {size}")
        grouped = x.reshape(n // size, size, h, w, c).astype(jnp.float32)
        # One pass: XLA computes both sums where the convolution's output is produced. A second pass over centred values
        # costs 40 % of the step on a TPU.
        mean = grouped.mean((1, 2, 3))
        var = jnp.maximum(jnp.square(grouped).mean((1, 2, 3)) - jnp.square(mean), 0.0)
        count = size * h * w
        keep = self.momentum
        # Not `self.mean[...] = …`: Flax then compares shardings, which takes a walk over all that is traced so far.
        self.mean.set_value(keep * self.mean[...] + (1 - keep) * mean.mean(0))
        self.var.set_value(keep * self.var[...] + (1 - keep) * var.mean(0) * (count / max(count - 1, 1)))
        spread = (slice(None), None, None, None)
        y = self._normalise(grouped, mean[spread], var[spread]).astype(x.dtype).reshape(x.shape)
        return self._activate(y)

    def _normalise(self, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
        return (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * self.scale[...]) + self.bias[...]


def _grouped(x: jax.Array, groups: int = 32) -> jax.Array:
    """[N, H, W, C] → float32 [N, H, W, groups, C / groups]; of 32 groups, as many as divide C."""
    *shape, c = x.shape
    groups = math.gcd(groups, c)
    return x.astype(jnp.float32).reshape(*shape, groups, c // groups)


class GroupNorm(_Norm):
    """Each example normalised over space and each of 32 groups of channels (Wu and He 2018), then ReLU."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [N, H, W, C] → the same shape and dtype."""
        y = _grouped(x)
        mean = y.mean((1, 2, 4), keepdims=True)
        var = jnp.maximum(jnp.square(y).mean((1, 2, 4), keepdims=True) - jnp.square(mean), 0.0)
        y = ((y - mean) * jax.lax.rsqrt(var + self.epsilon)).reshape(x.shape)
        return self._activate((y * self.scale[...] + self.bias[...]).astype(x.dtype))


class EvoNorm(_Norm):
    """EvoNorm-S0 (Liu et al. 2020, table 2): x · sigmoid(v · x) / std of the channel's group.

    Norm and activation in one. Without `activation` it only scales and shifts, as timm has it.
    """

    def __init__(self, features: int, **options: Any):
        super().__init__(features, **options)
        if self.activation:
            self.v = nnx.Param(jnp.ones(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [N, H, W, C] → the same shape and dtype."""
        y = x.astype(jnp.float32)
        if self.activation:
            grouped = _grouped(x)
            std = jnp.sqrt(grouped.var((1, 2, 4), keepdims=True) + self.epsilon)
            y = ((y * jax.nn.sigmoid(y * self.v[...])).reshape(grouped.shape) / std).reshape(x.shape)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class FilterResponseNorm(_Norm):
    """Each channel over its root mean square, then max(·, τ) with a learnt τ (Singh and Krishnan 2019)."""

    def __init__(self, features: int, **options: Any):
        super().__init__(features, **options)
        if self.activation:
            self.tau = nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [N, H, W, C] → the same shape and dtype."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean((1, 2), keepdims=True) + self.epsilon)
        y = y * self.scale[...] + self.bias[...]
        return (jnp.maximum(y, self.tau[...]) if self.activation else y).astype(x.dtype)


class SqueezeExcite(nnx.Module):
    """Channels weighted by a small network of their means (Hu et al. 2017, section 3). All of it in float32.

    The inside has `ratio` times the channels, rounded to a multiple of 8, at least 8.
    """

    def __init__(self, features: int, *, ratio: float = 1 / 16, rngs: nnx.Rngs):
        inside = max(8, int(features * ratio + 4) // 8 * 8)
        self.fc1 = nnx.Linear(features, inside, kernel_init=kaiming_normal("fan_out"), rngs=rngs)
        self.fc2 = nnx.Linear(inside, features, kernel_init=kaiming_normal("fan_out"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [N, H, W, C] → the same shape and dtype."""
        gate = jax.nn.sigmoid(self.fc2(nnx.relu(self.fc1(_means(x)))))
        return x * gate[:, None, None].astype(x.dtype)


class EfficientChannelAttention(nnx.Module):
    """Channels weighted by a convolution along their means (Wang et al. 2019, section 3.2). All of it in float32.

    The kernel grows with the logarithm of the width: of `features`, or of `nominal`, the width before pruning.
    """

    def __init__(self, features: int, *, nominal: int | None = None, rngs: nnx.Rngs):
        size = int((math.log2(nominal or features) + 1) / 2)
        size = max(3, size + 1 - size % 2)
        self.conv = nnx.Conv(1, 1, (size,), padding=size // 2, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [N, H, W, C] → the same shape and dtype."""
        gate = jax.nn.sigmoid(self.conv(_means(x)[..., None]))[..., 0]
        return x * gate[:, None, None].astype(x.dtype)


def _means(x: jax.Array) -> jax.Array:
    return x.mean((1, 2), dtype=jnp.float32)


class DropPath(nnx.Module):
    """Which residuals an example goes without in training: stochastic depth (Huang et al. 2016).

    The share dropped grows linearly from 0 in the first block to `rate` in the last (section 3, "linear decay").
    """

    def __init__(self, rate: float, blocks: int):
        self.keep = tuple(1 - rate * i / max(blocks - 1, 1) for i in range(blocks))
        self.deterministic = False  # model.eval() sets it

    def __call__(self, examples: int, key: jax.Array) -> jax.Array:
        """float32 [blocks, examples, 1, 1, 1], by which the residuals are multiplied: 0 or 1 / the share kept."""
        keep = jnp.array(self.keep)[:, None]
        kept = jax.random.bernoulli(key, keep, (len(self.keep), examples))
        return (kept / keep)[:, :, None, None, None]


class DropBlock(nnx.Module):
    """Which squares of its channels a residual goes without in training (Ghiasi et al. 2018, algorithm 1).

    The squares have `SIDE` pixels a side, or as many as the map's shorter side has, and lie within it. A share of
    `rate` would be dropped if they did not overlap. What an example keeps is divided by the share that it keeps.
    """

    SIDE = 7  # section 4.1

    def __init__(self, rate: float):
        self.rate = rate
        self.deterministic = False  # model.eval() sets it

    def __call__(self, shape: tuple[int, int, int, int], key: jax.Array) -> jax.Array:
        """float32 [N, H, W, C], by which a residual of that shape is multiplied: 0 or 1 / the share kept."""
        n, h, w, c = shape
        side = min(self.SIDE, h, w)
        corners = (h - side + 1, w - side + 1)  # where a square may begin
        gamma = self.rate / side**2 * (h * w) / math.prod(corners)
        begins = jax.random.bernoulli(key, gamma, (n, *corners, c)).astype(jnp.float32)
        kept = 1 - nnx.max_pool(begins, (side, side), padding=((side - 1, side - 1),) * 2)
        # Of an example, not of the batch as in the paper: a batch may lie on many devices.
        return kept / jnp.maximum(kept.mean((1, 2, 3), keepdims=True), 1 / (h * w * c))


def max_pool(x: jax.Array, *, stride: int = 2, zero_padded: bool = False) -> jax.Array:
    """3×3 maximum, padded by one pixel of −∞ (or of zeros) on every side. [N, H, W, C] → [N, ⌈H/stride⌉, …, C]."""
    pad = ((1, 1), (1, 1))
    if zero_padded:
        return nnx.max_pool(jnp.pad(x, ((0, 0), *pad, (0, 0))), (3, 3), strides=(stride, stride))
    return nnx.max_pool(x, (3, 3), strides=(stride, stride), padding=pad)


def avg_pool(x: jax.Array) -> jax.Array:
    """2×2 mean at stride 2; at an odd border, the mean of what is there. [N, H, W, C] → [N, ⌈H/2⌉, ⌈W/2⌉, C]."""
    pad = tuple((0, size % 2) for size in x.shape[1:3])
    return nnx.avg_pool(x, (2, 2), strides=(2, 2), padding=pad, count_include_pad=False)


def blur_pool(x: jax.Array, *, stride: int = 2, zero_padded: bool = False) -> jax.Array:
    """Binomial 3×3 filter, mirrored at the border (or zeros beyond it). [N, H, W, C] → [N, ⌈H/stride⌉, …, C].

    Zhang 2019, "Making convolutional networks shift-invariant again". To be mirrored, both sides must be at least 2.
    """
    mode = "constant" if zero_padded else "reflect"
    y = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=mode).astype(jnp.float32)
    for axis in (1, 2):  # the filter is the outer product of (1, 2, 1) / 4 with itself
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
    """`jax.lax.conv_general_dilated` of x blurred, with zeros beyond the border. x: [N, H, W, C]; kernel: HWIO."""
    if kernel.shape[:2] == (1, 1):  # sees one pixel a stride: the others need not be made
        x, strides = blur_pool(x, stride=strides[0], zero_padded=True), (1, 1)
    else:
        x = blur_pool(x, stride=1, zero_padded=True)
    return conv(x, kernel, strides, padding, **options)
