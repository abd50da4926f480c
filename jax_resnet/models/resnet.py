"""The residual network: stem, stages of blocks, head, from one description of its shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jax_resnet.models import blocks, layers

BLOCKS: dict[tuple[str, bool], Any] = {  # block, preactivation
    ("basic", False): blocks.BasicBlock,
    ("basic", True): blocks.PreActBasicBlock,
    ("bottleneck", False): blocks.Bottleneck,
    ("bottleneck", True): blocks.PreActBottleneck,
}
NORMS = {
    "batch": layers.BatchNorm,
    "group": layers.GroupNorm,
    "evonorm": layers.EvoNorm,
    "frn": layers.FilterResponseNorm,
}
ANTIALIAS = {"avg": layers.avg_pool, "blur": layers.blur_pool}  # in place of strides

Block = Literal["basic", "bottleneck"]


@dataclass(frozen=True)
class ResNetSpec:
    """What tells one network of the family from another. The defaults are ResNet-50's (v1.5)."""

    block: Block | tuple[Block, ...] = "bottleneck"  # or one for each stage
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks of each stage; every stage but the first halves the image
    widths: tuple[int, ...] = (64, 128, 256, 512)  # channels of each stage's 3×3 convolutions; output ×4 in bottlenecks
    stem: Literal["imagenet", "cifar", "deep", "tiered"] = "imagenet"
    stem_width: int = 64  # channels that the stem gives
    stem_pool: Literal["max", "zero_max", "blur_max", "conv"] = "max"  # after every stem but "cifar"
    shortcut: Literal["A", "B", "D"] = "B"
    shortcut_kernel: Literal[1, 3] = 1  # of projections with a stride
    preactivation: bool = False  # v2
    stride_in_1x1: bool = False  # the stride of the first paper (v1) rather than v1.5
    inner_factor: float = 1.0  # width of a bottleneck's inside over `widths`: 2 in wide_resnet50_2
    first_factor: float = 1.0  # width of a block's first convolution over that of its second: 1/2 in SENet-154
    groups: int = 1  # of a bottleneck's 3×3 convolution: 32 in ResNeXt-50 32×4d, with inner_factor 32 · 4 / 64
    block_widths: tuple[tuple[tuple[int, ...], ...], ...] | None = None  # of each block's convolutions, after pruning
    attention: Literal["se", "eca"] | None = None
    se_ratio: float = 1 / 16
    # What halves the image, in place of strides and of max pooling; blur_conv: blurred before convolutions with one.
    antialias: Literal["avg", "blur", "blur_conv"] | None = None
    norm: Literal["batch", "group", "evonorm", "frn"] = "batch"
    standardise: bool = False  # the kernels of convolutions (weight standardisation)
    pool: Literal["avg", "max"] = "avg"
    dropout: float = 0.0
    drop_path: float = 0.0  # share of residuals that an example goes without in the last block; grows linearly from 0
    drop_block: float = 0.0  # share of every residual of the last two stages left out, in squares of 7 pixels a side
    init: Literal["fan_out", "fan_in"] = "fan_out"  # of convolutions: 2 over it is their kernels' variance
    head_std: float = 0.01  # deviation of the head's kernel at the start
    head_prior: bool = False  # the head's biases start at −log(classes), where sigmoids give near 1 / classes
    zero_init_last: bool = True  # Goyal et al. 2017, section 5.1; pre-activation blocks do not end in a norm
    bn_group_size: int | None = None
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5  # of the other norms too

    def __post_init__(self) -> None:
        known = {
            "stem": ("imagenet", "cifar", "deep", "tiered"),
            "stem_pool": ("max", "zero_max", "blur_max", "conv"),
            "shortcut": ("A", "B", "D"),
            "shortcut_kernel": (1, 3),
            "attention": (None, "se", "eca"),
            "antialias": (None, *ANTIALIAS, "blur_conv"),
            "norm": tuple(NORMS),
            "pool": ("avg", "max"),
            "init": ("fan_out", "fan_in"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {' or '.join(map(str, values))}")
        for name in ("depths", "widths"):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or not values or not all(type(v) is int and v > 0 for v in values):
                raise ValueError(f"{name}={values}: must be whole numbers, at least 1, one for each stage")
            object.__setattr__(self, name, tuple(values))
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths={self.depths} and widths={self.widths}: one of each for every stage")
        for name in ("stem_width", "groups", "bn_group_size"):
            value = getattr(self, name)
            if not (type(value) is int and value > 0) and not (name == "bn_group_size" and value is None):
                raise ValueError(f"{name}={value}: must be a whole number, at least 1")
        for name in ("dropout", "drop_path", "drop_block", "bn_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and less than 1")
        for name in ("inner_factor", "first_factor", "se_ratio", "bn_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be more than 0")
        if not self.head_std >= 0:
            raise ValueError(f"head_std={self.head_std}: must be at least 0")
        self._check_blocks()

    def _check_blocks(self) -> None:
        """Raises ValueError for choices that do not go together."""
        kinds = self.stage_blocks
        if len(kinds) != len(self.depths) or not set(kinds) <= set(get_args(Block)):
            raise ValueError(f"block={self.block!r}: must be basic or bottleneck, or one of them for each stage")
        if "basic" in kinds and (self.inner_factor != 1 or self.groups != 1):
            raise ValueError("inner_factor and groups: only bottlenecks have an inside")
        if self.stride_in_1x1 and ("basic" in kinds or self.preactivation or self.antialias in ANTIALIAS):
            raise ValueError(
                "stride_in_1x1: only post-activation bottlenecks, not anti-aliased by avg or blur, have the choice"
            )
        if self.preactivation and (self.attention or self.antialias in ANTIALIAS or self.stem_pool == "conv"):
            raise ValueError("attention, antialias=avg or blur, and stem_pool=conv: only for post-activation networks")
        if self.antialias in ANTIALIAS and self.stem_pool in ("zero_max", "blur_max"):
            raise ValueError(f"stem_pool={self.stem_pool}: antialias={self.antialias} has a pool of its own there")
        if self.stem == "cifar" and self.stem_pool != "max":
            raise ValueError(f"stem_pool={self.stem_pool}: the cifar stem does not pool")
        if self.stem in ("deep", "tiered") and self.stem_width % 8:
            raise ValueError(f"stem_width={self.stem_width}: must be a multiple of 8 for a {self.stem} stem")
        if self.norm != "batch" and self.bn_group_size is not None:
            raise ValueError(f"bn_group_size={self.bn_group_size}: {self.norm} norm knows no groups of examples")
        self._check_block_widths()
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                widths = self.conv_widths(stage, block)
                if min(widths) < 1 or any(width % self.groups for width in widths[:-1]):
                    raise ValueError(
                        f"widths={self.widths}: block {block} of stage {stage + 1} would have convolutions of {widths} "
                        f"channels in {self.groups} groups"
                    )
        outputs = [self.stem_width, *self.channels]
        if self.shortcut == "A" and outputs != sorted(outputs):
            raise ValueError(f"shortcut A cannot take channels away, and widths={self.widths} would have it do so")

    def _check_block_widths(self) -> None:
        stages = self.block_widths or ()
        if stages and tuple(map(len, stages)) != self.depths:
            raise ValueError(f"block_widths: must be of {self.depths} blocks, as depths says")
        for stage, kind in zip(stages, self.stage_blocks, strict=False):
            convs = 2 if kind == "basic" else 3
            whole = all(len(block) == convs and all(type(w) is int for w in block) for block in stage)
            if not whole or len({block[-1] for block in stage}) > 1:
                raise ValueError(
                    f"block_widths: {stage} must be {convs} whole numbers a block, the last alike in a stage"
                )

    @property
    def stage_blocks(self) -> tuple[str, ...]:
        """The kind of block of each stage."""
        return (self.block,) * len(self.depths) if isinstance(self.block, str) else tuple(self.block)

    def conv_widths(self, stage: int, block: int) -> tuple[int, ...]:
        """Channels that the convolutions of a block give, the last those of the stage."""
        if self.block_widths:
            return self.block_widths[stage][block]
        width = self.widths[stage]
        if self.stage_blocks[stage] == "basic":
            return int(width * self.first_factor), width
        inner = round(width * self.inner_factor)
        return int(inner * self.first_factor), inner, self.nominal_channels(stage)

    def nominal_channels(self, stage: int) -> int:
        """Channels of a stage's output before pruning."""
        return self.widths[stage] * BLOCKS[self.stage_blocks[stage], self.preactivation].expansion

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage's output."""
        return tuple(self.conv_widths(stage, 0)[-1] for stage in range(len(self.depths)))

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image to one of each stage's output, along one side."""
        return tuple((1 if self.stem == "cifar" else 4) * 2**stage for stage in range(len(self.depths)))

    @property
    def total_stride(self) -> int:
        """Pixels of the image to one of the last feature map, along one side."""
        return self.strides[-1]


class Stem(nnx.Module):
    """From the image to the first stage: conv1, norm1, …, then a pool of stride 2 unless it is "cifar".

    "imagenet": a 7×7 convolution of stride 2. "cifar": a 3×3 convolution. "deep": three 3×3 convolutions, the first of
    stride 2, the first two of half the width (He et al. 2018, "Bag of tricks", section 4.2, ResNet-C). "tiered": the
    same with 3/8 and 1/2 of the width.

    Pre-activation networks have no last norm: their first block begins with one.
    """

    def __init__(self, in_channels: int, spec: ResNetSpec, parts: blocks.Parts):
        width = spec.stem_width
        kernel_size, stride = (3, 1) if spec.stem == "cifar" else (7 if spec.stem == "imagenet" else 3, 2)
        inside = {"deep": (width // 2, width // 2), "tiered": (3 * width // 8, width // 2)}.get(spec.stem, ())
        self.depth = len(inside) + 1
        for i, out in enumerate((*inside, width), 1):
            setattr(self, f"conv{i}", parts.conv(in_channels, out, kernel_size, stride=stride))
            if i < self.depth or not spec.preactivation:
                setattr(self, f"norm{i}", parts.norm(out, activation=True))
            in_channels, stride = out, 1
        self.pool = None if spec.stem == "cifar" else StemPool(width, spec, parts)

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(1, self.depth + 1):
            x = getattr(self, f"conv{i}")(x)
            x = getattr(self, f"norm{i}")(x) if hasattr(self, f"norm{i}") else x
        return self.pool(x) if self.pool else x


class StemPool(nnx.Module):
    """Halves the image after the stem's convolutions.

    "max": a 3×3 maximum. "zero_max": the same over a border of zeros, as BiT has it. "blur_max": of stride 1, then
    blurred with zeros beyond the border, as Composer has it. "conv": a 3×3 convolution, norm and activation (ResNet-RS:
    Bello et al. 2021, section 4.2). Anti-aliasing in place of strides blurs after the maximum or convolution, which
    then have stride 1, or takes the mean in place of the maximum.
    """

    def __init__(self, width: int, spec: ResNetSpec, parts: blocks.Parts):
        self.kind, self.antialias = spec.stem_pool, spec.antialias if parts.antialias else None
        self.max_pool = layers.max_pool
        if self.kind == "conv":
            self.conv = parts.conv(width, width, 3, stride=1 if self.antialias else 2)
            self.norm = parts.norm(width, activation=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == "conv":
            x = self.conv(x)
            return self.norm(ANTIALIAS[self.antialias](x) if self.antialias else x)
        if self.antialias == "avg":  # without the border that ⌈H/2⌉ would add: so the published networks have it here
            return nnx.avg_pool(x, (2, 2), strides=(2, 2))
        if self.antialias == "blur":
            return layers.blur_pool(self.max_pool(x, stride=1))
        if self.kind == "blur_max":
            return layers.blur_pool(self.max_pool(x, stride=1), zero_padded=True)
        return self.max_pool(x, zero_padded=self.kind == "zero_max")


class Stage(nnx.Module):
    """The blocks of one size, block0, block1, …; the first has the stride."""

    def __init__(self, in_features: int, spec: ResNetSpec, stage: int, parts: blocks.Parts):
        make_block = BLOCKS[spec.stage_blocks[stage], spec.preactivation]
        self.depth, self.channels, self.stride = spec.depths[stage], spec.channels[stage], 2 if stage > 0 else 1
        for i in range(self.depth):
            widths, stride = spec.conv_widths(stage, i), self.stride if i == 0 else 1
            setattr(self, f"block{i}", make_block(in_features, widths, stride, parts))
            in_features = widths[-1]
        dropping = spec.drop_block and stage >= len(spec.depths) - 2
        self.drop_block = layers.DropBlock(spec.drop_block) if dropping else None

    def __call__(self, x: jax.Array, scales: jax.Array | None = None, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        n, h, w, _ = x.shape
        shape = (n, -(-h // self.stride), -(-w // self.stride), self.channels)
        for i in range(self.depth):
            scale = None if scales is None else scales[i]
            if self.drop_block and not self.drop_block.deterministic:
                if rngs is None:
                    raise ValueError("drop_block in training needs keys: model(images, rngs=nnx.Rngs(dropout=0))")
                kept = self.drop_block(shape, rngs.dropout())
                scale = kept if scale is None else scale * kept
            x = getattr(self, f"block{i}")(x, scale)
        return x


class ResNet(nnx.Module):
    """A residual network.

    Parameters have stable names, such as `stem/conv1/kernel`, `stage1/block0/norm1/scale`, `head/bias`.
    Activations have `dtype`; parameters, batch statistics, pooled features and logits are float32.

    Images are normalised [N, H, W, in_channels]. Where a method takes `rngs`, a network in training that drops features
    or residuals needs its `dropout` stream.
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
        self.spec, self.num_classes, self.in_channels, self.dtype = spec, num_classes, in_channels, dtype
        norm_options: dict[str, Any] = {"epsilon": spec.bn_epsilon}
        if spec.norm == "batch":
            norm_options |= {"group_size": spec.bn_group_size, "momentum": spec.bn_momentum}
        parts = blocks.Parts(
            conv=partial(
                layers.conv,
                standardise=spec.standardise,
                blur=spec.antialias == "blur_conv",
                init=spec.init,
                dtype=dtype,
                rngs=rngs,
            ),
            norm=partial(NORMS[spec.norm], **norm_options),
            shortcut=spec.shortcut,
            shortcut_kernel=spec.shortcut_kernel,
            groups=spec.groups,
            antialias=ANTIALIAS.get(spec.antialias or ""),
            zero_init_last=spec.zero_init_last,
            stride_in_1x1=spec.stride_in_1x1,
        )
        self.stem = Stem(in_channels, spec, parts)
        features = spec.stem_width
        for i, channels in enumerate(spec.channels):
            attention: Any = None
            if spec.attention == "se":
                attention = partial(layers.SqueezeExcite, ratio=spec.se_ratio, rngs=rngs)
            elif spec.attention == "eca":
                attention = partial(layers.EfficientChannelAttention, nominal=spec.nominal_channels(i), rngs=rngs)
            setattr(self, f"stage{i + 1}", Stage(features, spec, i, replace(parts, attention=attention)))
            features = channels
        if spec.preactivation:
            self.norm = parts.norm(features, activation=True)
        self.drop_path = layers.DropPath(spec.drop_path, sum(spec.depths)) if spec.drop_path else None
        self.dropout = nnx.Dropout(spec.dropout)
        self.head = nnx.Linear(
            features,
            num_classes,
            kernel_init=nnx.initializers.normal(spec.head_std),
            # Composer's linear_log_constant_bias
            bias_init=nnx.initializers.constant(-math.log(num_classes) if spec.head_prior else 0.0),
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """The float32 logits [N, num_classes]."""
        return self.head(self.dropout(self.pooled(images, rngs=rngs), rngs=rngs))

    def pooled(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """What the head sees: float32 [N, spec.channels[-1]]."""
        x = self.features(images, rngs=rngs).astype(jnp.float32)
        return x.mean((1, 2)) if self.spec.pool == "avg" else x.max((1, 2))

    def features(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """The last feature map, [N, H/s, W/s, spec.channels[-1]] with s = spec.total_stride, rounded as in `pyramid`.

        In pre-activation networks it has gone through the last norm.
        """
        x = self.pyramid(images, rngs=rngs)[-1]
        return self.norm(x) if self.spec.preactivation else x

    def pyramid(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> list[jax.Array]:
        """What each stage gives: for stage i, [N, ⌈H/s⌉, ⌈W/s⌉, spec.channels[i]] with s = spec.strides[i].

        Where the stem averages (antialias="avg"), what it makes of an odd side is rounded down.
        A pre-activation network's blocks end in a sum; the norm and activation that follow are the next block's.
        """
        x = self.stem(images.astype(self.dtype))
        scales = None
        if self.drop_path and not self.drop_path.deterministic:
            if rngs is None:
                raise ValueError("drop_path in training needs keys: model(images, rngs=nnx.Rngs(dropout=0))")
            scales = self.drop_path(len(images), rngs.dropout())
        maps, done = [], 0
        for i, depth in enumerate(self.spec.depths, 1):
            x = getattr(self, f"stage{i}")(x, None if scales is None else scales[done : done + depth], rngs=rngs)
            maps.append(x)
            done += depth
        return maps
