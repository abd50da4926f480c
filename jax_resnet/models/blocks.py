"""Residual blocks (He et al. 2015, 2016) and their shortcuts.

A block maps [N, H, W, in_features] to [N, ⌈H/stride⌉, ⌈W/stride⌉, widths[-1]], where `widths` are
the channels that its convolutions give. `scale`, [N, 1, 1, 1], multiplies the residual if it is not
None: stochastic depth, whose schedule over the blocks is made by `layers.DropPath`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jax_resnet.models.layers import avg_pool

Layer = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Parts:
    """The layers and choices of the network that the blocks of a stage are built from."""

    # They are called as conv(in_features, out_features, kernel_size, stride=, groups=) and
    # norm(features, activation=, zero_scale=).
    conv: Callable[..., nnx.Conv]
    norm: Callable[..., nnx.Module]
    shortcut: str  # A, B or D
    shortcut_kernel: int = 1
    groups: int = 1  # of the bottleneck's 3×3 convolution
    attention: Callable[[int], nnx.Module] | None = None  # (features), over the residual
    # It halves the image in place of a convolution's stride.
    antialias: Layer | None = None
    zero_init_last: bool = False
    stride_in_1x1: bool = False


class Shortcut(nnx.Module):
    """The path beside the residual in a block that changes size or width.

    kind "A": every stride-th pixel, zeros for the new channels, half on either side (He et al.
    2015, section 3.3; the usual CIFAR code places the zeros so). "B": strided 1×1 convolution and
    norm. "D": 2×2 average pool, then 1×1 convolution and norm, so that no pixel is dropped (He et
    al. 2018, "Bag of tricks", section 4.2). Pre-activation blocks leave out the norm. A kernel
    wider than 1×1 is used only with a stride.
    """

    def __init__(self, in_features: int, out_features: int, stride: int, parts: Parts, *, norm: bool):
        self.kind = parts.shortcut
        self.stride = stride
        self.new_channels = out_features - in_features
        if self.kind not in ("A", "B", "D"):
            raise ValueError(f"shortcut {self.kind!r}: must be A, B or D")
        if self.kind != "A":
            kernel_size = parts.shortcut_kernel if stride > 1 else 1
            conv_stride = 1 if self.kind == "D" else stride
            self.conv = parts.conv(in_features, out_features, kernel_size, stride=conv_stride)
            if norm:
                self.norm = parts.norm(out_features)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == "A":
            before = self.new_channels // 2
            x = x[:, :: self.stride, :: self.stride]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, self.new_channels - before)))
        if self.kind == "D" and self.stride > 1:
            x = avg_pool(x)
        return _apply(getattr(self, "norm", None), self.conv(x))


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions (He et al. 2015, figure 5 left)."""

    def __init__(self, in_features: int, widths: tuple[int, int], stride: int, parts: Parts):
        inner, out = widths
        self.antialias, conv_stride = _antialias(stride, parts)
        self.conv1 = parts.conv(in_features, inner, 3, stride=conv_stride)
        self.norm1 = parts.norm(inner, activation=True)
        self.conv2 = parts.conv(inner, out, 3)
        self.norm2 = parts.norm(out, zero_scale=parts.zero_init_last)
        self.attention = parts.attention and parts.attention(out)
        self.shortcut = _shortcut(in_features, out, stride, parts, norm=True)

    def __call__(self, x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        y = self.norm1(self.conv1(x))
        y = _apply(self.antialias, y)
        y = self.norm2(self.conv2(y))
        y = _apply(self.attention, y)
        return nnx.relu(_scaled(y, scale) + _apply(self.shortcut, x))


class Bottleneck(nnx.Module):
    """1×1 reduce, 3×3, 1×1 expand by 4 (He et al. 2015, figure 5 right).

    The stride sits on the 3×3 convolution ("v1.5", as in torchvision), or on the first 1×1 with
    `stride_in_1x1` (the paper's v1).
    """

    def __init__(self, in_features: int, widths: tuple[int, int, int], stride: int, parts: Parts):
        first, inner, out = widths
        self.antialias, stride2 = _antialias(stride, parts)
        stride1 = 1
        if parts.stride_in_1x1:
            stride1, stride2 = stride, 1
        self.conv1 = parts.conv(in_features, first, 1, stride=stride1)
        self.norm1 = parts.norm(first, activation=True)
        self.conv2 = parts.conv(first, inner, 3, stride=stride2, groups=parts.groups)
        self.norm2 = parts.norm(inner, activation=True)
        self.conv3 = parts.conv(inner, out, 1)
        self.norm3 = parts.norm(out, zero_scale=parts.zero_init_last)
        self.attention = parts.attention and parts.attention(out)
        self.shortcut = _shortcut(in_features, out, stride, parts, norm=True)

    def __call__(self, x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        y = self.norm1(self.conv1(x))
        y = self.norm2(self.conv2(y))
        y = _apply(self.antialias, y)
        y = self.norm3(self.conv3(y))
        y = _apply(self.attention, y)
        return nnx.relu(_scaled(y, scale) + _apply(self.shortcut, x))


class PreActBasicBlock(nnx.Module):
    """Two 3×3 convolutions, norm and activation before each; also the block of wide ResNets.

    He et al. 2016, "Identity mappings in deep residual networks", figure 4e.
    """

    def __init__(self, in_features: int, widths: tuple[int, int], stride: int, parts: Parts):
        inner, out = widths
        self.norm1 = parts.norm(in_features, activation=True)
        self.conv1 = parts.conv(in_features, inner, 3, stride=stride)
        self.norm2 = parts.norm(inner, activation=True)
        self.conv2 = parts.conv(inner, out, 3)
        self.shortcut = _shortcut(in_features, out, stride, parts, norm=False)

    def __call__(self, x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        active = self.norm1(x)
        y = self.conv1(active)
        y = self.conv2(self.norm2(y))
        y = _scaled(y, scale)
        if self.shortcut:
            x = self.shortcut(active)
        return y + x


class PreActBottleneck(nnx.Module):
    """The bottleneck with norm and activation before each convolution, the stride on the 3×3."""

    def __init__(self, in_features: int, widths: tuple[int, int, int], stride: int, parts: Parts):
        first, inner, out = widths
        self.norm1 = parts.norm(in_features, activation=True)
        self.conv1 = parts.conv(in_features, first, 1)
        self.norm2 = parts.norm(first, activation=True)
        self.conv2 = parts.conv(first, inner, 3, stride=stride, groups=parts.groups)
        self.norm3 = parts.norm(inner, activation=True)
        self.conv3 = parts.conv(inner, out, 1)
        self.shortcut = _shortcut(in_features, out, stride, parts, norm=False)

    def __call__(self, x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        active = self.norm1(x)
        y = self.conv1(active)
        y = self.conv2(self.norm2(y))
        y = self.conv3(self.norm3(y))
        y = _scaled(y, scale)
        if self.shortcut:
            x = self.shortcut(active)
        return y + x


def _shortcut(in_features: int, out_features: int, stride: int, parts: Parts, *, norm: bool) -> Shortcut | None:
    if stride == 1 and in_features == out_features:
        return None
    return Shortcut(in_features, out_features, stride, parts, norm=norm)


def _antialias(stride: int, parts: Parts) -> tuple[Layer | None, int]:
    """Choose what halves the image after a convolution, if anything, and the stride of that."""
    if stride > 1 and parts.antialias:
        return parts.antialias, 1
    return None, stride


def _apply(layer: Layer | None, x: jax.Array) -> jax.Array:
    """Apply a layer that a block may lack."""
    return layer(x) if layer else x


def _scaled(residual: jax.Array, scale: jax.Array | None) -> jax.Array:
    return residual if scale is None else residual * scale.astype(residual.dtype)
