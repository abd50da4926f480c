"""The residual network: stem, stages of blocks, head, from one description of its shape."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

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


@dataclass(frozen=True)
class ResNetSpec:
    """What tells one network of the family from another. The defaults are ResNet-50's (v1.5)."""

    block: Literal["basic", "bottleneck"] = "bottleneck"
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks of each stage; every stage but the first halves the image
    widths: tuple[int, ...] = (64, 128, 256, 512)  # channels of each stage's 3×3 convolutions; output ×4 in bottlenecks
    stem: Literal["imagenet", "cifar"] = "imagenet"
    stem_width: int = 64
    shortcut: Literal["A", "B", "D"] = "B"
    preactivation: bool = False  # v2
    stride_in_1x1: bool = False  # the stride of the first paper (v1) rather than v1.5
    inner_factor: float = 1.0  # width of a bottleneck's inside over `widths`: 2 in wide_resnet50_2
    pool: Literal["avg", "max"] = "avg"
    dropout: float = 0.0
    zero_init_last: bool = True  # Goyal et al. 2017, section 5.1; pre-activation blocks do not end in a norm
    bn_group_size: int | None = None
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name, known in (
            ("block", ("basic", "bottleneck")),
            ("stem", ("imagenet", "cifar")),
            ("shortcut", ("A", "B", "D")),
            ("pool", ("avg", "max")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {' or '.join(known)}")
        for name in ("depths", "widths"):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or not values or not all(type(v) is int and v > 0 for v in values):
                raise ValueError(f"{name}={values}: must be whole numbers, at least 1, one for each stage")
            object.__setattr__(self, name, tuple(values))
        for name in ("stem_width", "bn_group_size"):
            value = getattr(self, name)
            if not (type(value) is int and value > 0) and not (name == "bn_group_size" and value is None):
                raise ValueError(f"{name}={value}: must be a whole number, at least 1")
        for name in ("dropout", "bn_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and less than 1")
        if self.inner_factor != 1 and self.block != "bottleneck":
            raise ValueError("inner_factor: only bottlenecks have an inside")
        if min(self.widths) * self.inner_factor < 1 or not self.bn_epsilon > 0:
            raise ValueError(f"inner_factor={self.inner_factor}, bn_epsilon={self.bn_epsilon}: too small")
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths={self.depths} and widths={self.widths}: one of each for every stage")
        expansion = BLOCKS[self.block, self.preactivation].expansion
        outputs = [self.stem_width, *(width * expansion for width in self.widths)]
        if self.shortcut == "A" and outputs != sorted(outputs):
            raise ValueError(f"shortcut A cannot take channels away, and widths={self.widths} would have it do so")
        if self.stride_in_1x1 and (self.block != "bottleneck" or self.preactivation):
            raise ValueError("stride_in_1x1: only post-activation bottlenecks have the choice")

    @property
    def total_stride(self) -> int:
        """Pixels of the image to one of the last feature map, along one side."""
        return (4 if self.stem == "imagenet" else 1) * 2 ** (len(self.depths) - 1)


class Stem(nnx.Module):
    """ "imagenet": 7×7 convolution and 3×3 max pool, each stride 2. "cifar": one 3×3 convolution, stride 1.

    Pre-activation networks have no norm here: their first block begins with one.
    """

    def __init__(self, in_channels: int, spec: ResNetSpec, *, conv: blocks.ConvFactory, norm: blocks.NormFactory):
        self.halving = spec.stem == "imagenet"
        self.conv1 = conv(in_channels, spec.stem_width, 7 if self.halving else 3, stride=2 if self.halving else 1)
        if not spec.preactivation:
            self.bn1 = norm(spec.stem_width)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv1(x)
        if hasattr(self, "bn1"):
            x = nnx.relu(self.bn1(x))
        return layers.max_pool(x) if self.halving else x


class Stage(nnx.Module):
    """`depth` blocks of one width, block0, block1, …; the first has the stride."""

    def __init__(self, in_features: int, planes: int, depth: int, stride: int, make_block: Callable[..., Any]):
        self.depth = depth
        for i in range(depth):
            block = make_block(in_features, planes, stride if i == 0 else 1)
            setattr(self, f"block{i}", block)
            in_features = planes * block.expansion

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            x = getattr(self, f"block{i}")(x)
        return x


class ResNet(nnx.Module):
    """A residual network.

    Parameters have stable names, such as `stem/conv1/kernel`, `stage1/block0/bn1/scale`, `head/bias`.
    Activations have `dtype`; parameters, batch statistics, pooled features and logits are float32.
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
        conv = partial(layers.conv, dtype=dtype, rngs=rngs)
        norm = partial(
            layers.BatchNorm, group_size=spec.bn_group_size, momentum=spec.bn_momentum, epsilon=spec.bn_epsilon
        )
        self.spec, self.num_classes, self.in_channels, self.dtype = spec, num_classes, in_channels, dtype
        self.stem = Stem(in_channels, spec, conv=conv, norm=norm)
        block = BLOCKS[spec.block, spec.preactivation]
        options: dict[str, Any] = {"shortcut": spec.shortcut, "conv": conv, "norm": norm}
        if not spec.preactivation:
            options["zero_init_last"] = spec.zero_init_last
        if spec.stride_in_1x1:
            options["stride_in_1x1"] = True
        features = spec.stem_width
        for i, (depth, width) in enumerate(zip(spec.depths, spec.widths, strict=True)):
            if spec.block == "bottleneck":
                options["inner"] = round(width * spec.inner_factor)
            stage = Stage(features, width, depth, 1 if i == 0 else 2, partial(block, **options))
            setattr(self, f"stage{i + 1}", stage)
            features = width * block.expansion
        if spec.preactivation:
            self.norm = norm(features)
        self.dropout = nnx.Dropout(spec.dropout)
        self.head = nnx.Linear(features, num_classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)

    def __call__(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Normalised images [N, H, W, in_channels] → float32 logits [N, num_classes].

        `rngs` needs a `dropout` stream when the network is in training and drops features.
        """
        x = self.stem(images.astype(self.dtype))
        for i in range(len(self.spec.depths)):
            x = getattr(self, f"stage{i + 1}")(x)
        if self.spec.preactivation:
            x = nnx.relu(self.norm(x))
        x = x.astype(jnp.float32)
        x = x.mean((1, 2)) if self.spec.pool == "avg" else x.max((1, 2))
        return self.head(self.dropout(x, rngs=rngs))
