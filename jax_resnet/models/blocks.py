"""Residual blocks (He et al. 2015, 2016) and their shortcuts.

A block maps [N, H, W, in_features] to [N, ⌈H/stride⌉, ⌈W/stride⌉, planes · expansion].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jax_resnet.models.layers import BatchNorm, avg_pool

ConvFactory = Callable[..., nnx.Conv]  # layers.conv with the dtype and rngs filled in
NormFactory = Callable[..., BatchNorm]  # layers.BatchNorm with grouping, momentum and epsilon filled in


class Shortcut(nnx.Module):
    """What the residual is added to when a block changes size or width.

    kind "A": every stride-th pixel, zeros for the new channels, half on either side (He et al. 2015, section 3.3; the
    placing of the zeros is that of the usual CIFAR code). "B": strided 1×1 convolution and norm. "D": 2×2 average pool,
    then 1×1 convolution and norm, so that no pixel is dropped (He et al. 2018, "Bag of tricks", section 4.2).
    Pre-activation blocks leave out the norm.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        kind: str,
        *,
        conv: ConvFactory,
        norm: NormFactory | None,
    ):
        self.kind, self.stride, self.new_channels = kind, stride, out_features - in_features
        if kind not in ("A", "B", "D"):
            raise ValueError(f"shortcut {kind!r}: must be A, B or D")
        if kind != "A":
            self.conv = conv(in_features, out_features, 1, stride=1 if kind == "D" else stride)
            if norm is not None:
                self.bn = norm(out_features)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == "A":
            before = self.new_channels // 2
            x = x[:, :: self.stride, :: self.stride]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, self.new_channels - before)))
        if self.kind == "D" and self.stride > 1:
            x = avg_pool(x)
        x = self.conv(x)
        return self.bn(x) if hasattr(self, "bn") else x


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions (He et al. 2015, figure 5 left)."""

    expansion = 1

    def __init__(
        self,
        in_features: int,
        planes: int,
        stride: int,
        *,
        shortcut: str,
        zero_init_last: bool,
        conv: ConvFactory,
        norm: NormFactory,
    ):
        self.conv1, self.bn1 = conv(in_features, planes, 3, stride=stride), norm(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), norm(planes, zero_scale=zero_init_last)
        self.shortcut = _shortcut(in_features, planes, stride, shortcut, conv=conv, norm=norm)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Bottleneck(nnx.Module):
    """1×1 reduce, 3×3, 1×1 expand by 4 (He et al. 2015, figure 5 right).

    `inner` is the width of the 3×3 convolution, `planes` unless the network is wide. The stride sits on the 3×3
    convolution ("v1.5", as in torchvision), or on the first 1×1 with `stride_in_1x1` (the paper's v1).
    """

    expansion = 4

    def __init__(
        self,
        in_features: int,
        planes: int,
        stride: int,
        *,
        shortcut: str,
        zero_init_last: bool,
        conv: ConvFactory,
        norm: NormFactory,
        inner: int | None = None,
        stride_in_1x1: bool = False,
    ):
        inner, out = inner or planes, planes * self.expansion
        self.conv1, self.bn1 = conv(in_features, inner, 1, stride=stride if stride_in_1x1 else 1), norm(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride=1 if stride_in_1x1 else stride), norm(inner)
        self.conv3, self.bn3 = conv(inner, out, 1), norm(out, zero_scale=zero_init_last)
        self.shortcut = _shortcut(in_features, out, stride, shortcut, conv=conv, norm=norm)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class PreActBasicBlock(nnx.Module):
    """Norm and ReLU before each convolution (He et al. 2016, "Identity mappings", figure 4e); the block of WRN too."""

    expansion = 1

    def __init__(
        self, in_features: int, planes: int, stride: int, *, shortcut: str, conv: ConvFactory, norm: NormFactory
    ):
        self.bn1, self.conv1 = norm(in_features), conv(in_features, planes, 3, stride=stride)
        self.bn2, self.conv2 = norm(planes), conv(planes, planes, 3)
        self.shortcut = _shortcut(in_features, planes, stride, shortcut, conv=conv, norm=None)

    def __call__(self, x: jax.Array) -> jax.Array:
        active = nnx.relu(self.bn1(x))
        y = self.conv1(active)
        y = self.conv2(nnx.relu(self.bn2(y)))
        return y + (x if self.shortcut is None else self.shortcut(active))


class PreActBottleneck(nnx.Module):
    """The bottleneck with norm and ReLU before each convolution, the stride on the 3×3."""

    expansion = 4

    def __init__(
        self,
        in_features: int,
        planes: int,
        stride: int,
        *,
        shortcut: str,
        conv: ConvFactory,
        norm: NormFactory,
        inner: int | None = None,
    ):
        inner, out = inner or planes, planes * self.expansion
        self.bn1, self.conv1 = norm(in_features), conv(in_features, inner, 1)
        self.bn2, self.conv2 = norm(inner), conv(inner, inner, 3, stride=stride)
        self.bn3, self.conv3 = norm(inner), conv(inner, out, 1)
        self.shortcut = _shortcut(in_features, out, stride, shortcut, conv=conv, norm=None)

    def __call__(self, x: jax.Array) -> jax.Array:
        active = nnx.relu(self.bn1(x))
        y = self.conv1(active)
        y = self.conv2(nnx.relu(self.bn2(y)))
        y = self.conv3(nnx.relu(self.bn3(y)))
        return y + (x if self.shortcut is None else self.shortcut(active))


def _shortcut(
    in_features: int, out_features: int, stride: int, kind: str, *, conv: ConvFactory, norm: NormFactory | None
) -> Shortcut | None:
    if stride == 1 and in_features == out_features:
        return None
    return Shortcut(in_features, out_features, stride, kind, conv=conv, norm=norm)
