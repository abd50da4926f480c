"""The residual network: stem, stages of blocks, head, from one description of its shape."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jax_resnet.models import blocks, layers, norms
from jax_resnet.models.spec import ResNetSpec

BLOCKS: dict[tuple[str, bool], Any] = {  # (block, preactivation): class
    ("basic", False): blocks.BasicBlock,
    ("basic", True): blocks.PreActBasicBlock,
    ("bottleneck", False): blocks.Bottleneck,
    ("bottleneck", True): blocks.PreActBottleneck,
}
NORMS = {
    "batch": norms.BatchNorm,
    "group": norms.GroupNorm,
    "evonorm": norms.EvoNorm,
    "frn": norms.FilterResponseNorm,
}
ANTIALIAS = {"avg": layers.avg_pool, "blur": layers.blur_pool}  # in place of strides


class Stem(nnx.Module):
    """The layers before the first stage: conv1, norm1, …, then a pool of stride 2 unless "cifar".

    "imagenet": a 7×7 convolution of stride 2. "cifar": a 3×3 convolution. "deep": three 3×3
    convolutions, the first of stride 2, the first two of half the width (He et al. 2018, "Bag of
    tricks", section 4.2, ResNet-C). "tiered": the same with 3/8 and 1/2 of the width.

    Pre-activation networks have no last norm: their first block begins with one.
    """

    def __init__(self, in_channels: int, spec: ResNetSpec, parts: blocks.Parts):
        width = spec.stem_width
        kernel_size, stride, *inner = {
            "imagenet": (7, 2),
            "cifar": (3, 1),
            "deep": (3, 2, width // 2, width // 2),
            "tiered": (3, 2, 3 * width // 8, width // 2),
        }[spec.stem]
        self.depth = len(inner) + 1
        for i, out in enumerate((*inner, width), 1):
            setattr(self, f"conv{i}", parts.conv(in_channels, out, kernel_size, stride=stride))
            if i < self.depth or not spec.preactivation:
                setattr(self, f"norm{i}", parts.norm(out, activation=True))
            in_channels = out
            stride = 1
        self.pool = None if spec.stem == "cifar" else StemPool(width, spec, parts)

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(1, self.depth + 1):
            x = getattr(self, f"conv{i}")(x)
            if hasattr(self, f"norm{i}"):
                x = getattr(self, f"norm{i}")(x)
        return self.pool(x) if self.pool else x


class StemPool(nnx.Module):
    """The layer that halves the image after the stem's convolutions.

    "max": a 3×3 maximum. "zero_max": the same over a border of zeros, as in BiT. "blur_max": a 3×3
    maximum of stride 1, then a blur with zeros beyond the border, as in Composer. "conv": a 3×3
    convolution, norm and activation (ResNet-RS: Bello et al. 2021, section 4.2). Anti-aliasing in
    place of strides blurs after the maximum or convolution, which then have stride 1, or takes the
    mean in place of the maximum.
    """

    def __init__(self, width: int, spec: ResNetSpec, parts: blocks.Parts):
        self.kind = spec.stem_pool
        self.antialias = spec.antialias if parts.antialias else None
        self.max_pool = layers.max_pool
        if self.kind == "conv":
            self.conv = parts.conv(width, width, 3, stride=1 if self.antialias else 2)
            self.norm = parts.norm(width, activation=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == "conv":
            x = self.conv(x)
            if self.antialias:
                x = ANTIALIAS[self.antialias](x)
            return self.norm(x)
        if self.antialias == "avg":
            # Unlike layers.avg_pool, the published networks round an odd side down in this place.
            return nnx.avg_pool(x, (2, 2), strides=(2, 2))
        if self.antialias == "blur":
            return layers.blur_pool(self.max_pool(x, stride=1))
        if self.kind == "blur_max":
            return layers.blur_pool(self.max_pool(x, stride=1), zero_padded=True)
        return self.max_pool(x, zero_padded=self.kind == "zero_max")


class Stage(nnx.Module):
    """The blocks of one size, block0, block1, …, in sequence; the first has the stride."""

    def __init__(self, in_features: int, spec: ResNetSpec, stage: int, parts: blocks.Parts):
        make_block = BLOCKS[spec.stage_blocks[stage], spec.preactivation]
        self.depth = spec.depths[stage]
        for i in range(self.depth):
            widths = spec.conv_widths(stage, i)
            stride = 2 if stage > 0 and i == 0 else 1
            setattr(self, f"block{i}", make_block(in_features, widths, stride, parts))
            in_features = widths[-1]

    def __call__(self, x: jax.Array, scales: jax.Array | list[None] | None = None) -> jax.Array:
        if scales is None:
            scales = [None] * self.depth
        for i in range(self.depth):
            x = getattr(self, f"block{i}")(x, scales[i])
        return x


class ResNet(nnx.Module):
    """A residual network, which maps images to logits.

    Parameters have stable names, such as `stem/conv1/kernel`, `stage1/block0/norm1/scale`,
    `head/bias`. Activations have `dtype`; parameters, batch statistics, pooled features and logits
    are float32.

    Images are normalised [N, H, W, in_channels]. Where a method takes `rngs`, a network in training
    that drops features or residuals needs its `dropout` stream.
    """

    def __init__(
        self,
        spec: ResNetSpec,
        *,
        num_classes: int,
        in_channels: int = 3,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.spec = spec
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.dtype = dtype
        parts = _parts(spec, dtype, rngs)
        self.stem = Stem(in_channels, spec, parts)
        features = spec.stem_width
        for i, channels in enumerate(spec.channels):
            stage_parts = replace(parts, attention=_attention(spec, i, rngs))
            setattr(self, f"stage{i + 1}", Stage(features, spec, i, stage_parts))
            features = channels
        if spec.preactivation:
            self.norm = parts.norm(features, activation=True)
        total = sum(spec.depths)
        self.drop_path = layers.DropPath(spec.drop_path, total) if spec.drop_path else None
        self.dropout = nnx.Dropout(spec.dropout)
        kernel_init = nnx.initializers.normal(spec.head_std)
        # The prior is Composer's linear_log_constant_bias.
        bias = -math.log(num_classes) if spec.head_prior else 0.0
        bias_init = nnx.initializers.constant(bias)
        self.head = nnx.Linear(features, num_classes, kernel_init=kernel_init, bias_init=bias_init, rngs=rngs)

    def __call__(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Compute the float32 logits [N, num_classes]."""
        return self.head(self.dropout(self.pooled(images, rngs=rngs), rngs=rngs))

    def pooled(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Compute the input of the head: float32 [N, spec.channels[-1]]."""
        x = self.features(images, rngs=rngs).astype(jnp.float32)
        return x.mean((1, 2)) if self.spec.pool == "avg" else x.max((1, 2))

    def features(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Compute the last feature map, [N, H/s, W/s, spec.channels[-1]] with s = spec.total_stride.

        Its sides are rounded as in `pyramid`. In pre-activation networks the last norm is applied.
        """
        x = self.pyramid(images, rngs=rngs)[-1]
        return self.norm(x) if self.spec.preactivation else x

    def pyramid(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> list[jax.Array]:
        """Compute the output of each stage.

        Stage i returns [N, ⌈H/s⌉, ⌈W/s⌉, spec.channels[i]] with s = spec.strides[i]; a stem that
        averages (antialias="avg") rounds odd sides down instead. A pre-activation network's blocks
        end in a sum; the norm and activation that follow belong to the next block.
        """
        x = self.stem(images.astype(self.dtype))
        scales: jax.Array | list[None] = [None] * sum(self.spec.depths)
        if self.drop_path and not self.drop_path.deterministic:
            if rngs is None:
                raise ValueError("drop_path in training needs keys: model(images, rngs=nnx.Rngs(dropout=0))")
            scales = self.drop_path(len(images), rngs.dropout())
        maps = []
        done = 0
        for i, depth in enumerate(self.spec.depths, 1):
            x = getattr(self, f"stage{i}")(x, scales[done : done + depth])
            maps.append(x)
            done += depth
        return maps


def _attention(spec: ResNetSpec, stage: int, rngs: nnx.Rngs) -> Callable[[int], nnx.Module] | None:
    """Choose the layer that weights the channels of a stage's residuals."""
    if spec.attention == "se":
        return partial(layers.SqueezeExcite, ratio=spec.se_ratio, rngs=rngs)
    if spec.attention == "eca":
        nominal = spec.nominal_channels(stage)
        return partial(layers.EfficientChannelAttention, nominal=nominal, rngs=rngs)
    return None


def _parts(spec: ResNetSpec, dtype: DTypeLike, rngs: nnx.Rngs) -> blocks.Parts:
    """Choose the layers of the blocks, except attention, which depends on the stage."""
    norm_options: dict[str, Any] = {"epsilon": spec.bn_epsilon}
    if spec.norm == "batch":
        norm_options |= {"group_size": spec.bn_group_size, "momentum": spec.bn_momentum}
    blur = spec.antialias == "blur_conv"
    return blocks.Parts(
        conv=partial(layers.conv, standardise=spec.standardise, blur=blur, init=spec.init, dtype=dtype, rngs=rngs),
        norm=partial(NORMS[spec.norm], **norm_options),
        shortcut=spec.shortcut,
        shortcut_kernel=spec.shortcut_kernel,
        groups=spec.groups,
        antialias=ANTIALIAS.get(spec.antialias or ""),
        zero_init_last=spec.zero_init_last,
        stride_in_1x1=spec.stride_in_1x1,
    )
