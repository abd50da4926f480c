"""The table of named networks, and `create_model`."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jax_resnet.errors import UserError, did_you_mean
from jax_resnet.models.resnet import ResNet, ResNetSpec

# Depth → block and blocks of each stage: He et al. 2015, table 1; 200: He et al. 2016, section 4.2.
IMAGENET_DEPTHS: dict[int, dict[str, Any]] = {
    18: {"block": "basic", "depths": (2, 2, 2, 2)},
    34: {"block": "basic", "depths": (3, 4, 6, 3)},
    50: {"block": "bottleneck", "depths": (3, 4, 6, 3)},
    101: {"block": "bottleneck", "depths": (3, 4, 23, 3)},
    152: {"block": "bottleneck", "depths": (3, 8, 36, 3)},
    200: {"block": "bottleneck", "depths": (3, 24, 36, 3)},
}
CIFAR: dict[str, Any] = {"block": "basic", "stem": "cifar", "stem_width": 16, "widths": (16, 32, 64)}

# Names of the form resnet50 are v1.5 (stride on the 3×3), resnet50_v1 the first paper's, resnetv2_50 pre-activation.
ZOO: dict[str, ResNetSpec] = {
    **{f"resnet{d}": ResNetSpec(**shape) for d, shape in IMAGENET_DEPTHS.items()},
    **{f"resnet{d}_v1": ResNetSpec(**IMAGENET_DEPTHS[d], stride_in_1x1=True) for d in (50, 101, 152)},
    **{f"resnetv2_{d}": ResNetSpec(**shape, preactivation=True) for d, shape in IMAGENET_DEPTHS.items()},
    "wide_resnet50_2": ResNetSpec(**IMAGENET_DEPTHS[50], inner_factor=2.0),
    "wide_resnet101_2": ResNetSpec(**IMAGENET_DEPTHS[101], inner_factor=2.0),
    # He et al. 2015, section 4.2: 6n+2 layers, three stages of n blocks, shortcuts without parameters.
    **{
        f"cifar_resnet{d}": ResNetSpec(**CIFAR, depths=((d - 2) // 6,) * 3, shortcut="A")
        for d in (20, 32, 44, 56, 110, 1202)
    },
    # Zagoruyko and Komodakis 2016: 6n+4 layers, widths ×k, pre-activation.
    "wrn_16_4": ResNetSpec(**CIFAR | {"widths": (64, 128, 256)}, depths=(2, 2, 2), preactivation=True),
    "wrn_28_10": ResNetSpec(**CIFAR | {"widths": (160, 320, 640)}, depths=(4, 4, 4), preactivation=True),
    "wrn_40_2": ResNetSpec(**CIFAR | {"widths": (32, 64, 128)}, depths=(6, 6, 6), preactivation=True),
}


def model_spec(name: str, **overrides: Any) -> ResNetSpec:
    """The description of the network called `name`, with fields replaced by `overrides` (None: not replaced).

    Besides the names of the table: cifar_resnet<6n+2>, cifar_resnetv2_<6n+2> and wrn_<6n+4>_<k> of any size.
    Raises UserError, naming near names, for an unknown name, field or value.
    """
    spec = ZOO.get(name) or _by_rule(name)
    if spec is None:
        raise UserError(f"model {name!r}: unknown name; {did_you_mean(name, ZOO)}")
    fields = {f.name for f in dataclasses.fields(ResNetSpec)}
    for key in overrides.keys() - fields:
        raise UserError(f"model {name!r}: no option {key!r}; {did_you_mean(key, fields)}")
    try:
        return dataclasses.replace(spec, **{k: v for k, v in overrides.items() if v is not None})
    except ValueError as e:
        raise UserError(f"model {name!r}: {e}") from None


def create_model(
    name: str,
    *,
    num_classes: int,
    rngs: nnx.Rngs,
    in_channels: int = 3,
    dtype: DTypeLike = jnp.float32,
    **overrides: Any,
) -> ResNet:
    """Builds the network called `name`, which maps images to logits.

    It takes normalised float images [N, H, W, in_channels] and gives float32 [N, num_classes].
    `overrides` replace fields of `ResNetSpec`: depths, widths, stem, shortcut, pool, dropout, bn_group_size …
    A new model is in training mode, where batch norm uses the batch's statistics; `model.eval()` switches to the
    running ones. Images must be at least `model.spec.total_stride` pixels a side to be of use.

        model = create_model("resnet50", num_classes=1000, rngs=nnx.Rngs(0))
        model.eval()
        logits = model(images)

    Training with dropout needs keys for it: `model(images, rngs=nnx.Rngs(dropout=0))`.
    Raises UserError for an unknown name or option, or fewer than one class.
    """
    if num_classes < 1:
        raise UserError(f"model {name!r}: num_classes={num_classes} must be at least 1")
    return ResNet(
        model_spec(name, **overrides), num_classes=num_classes, in_channels=in_channels, dtype=dtype, rngs=rngs
    )


def _by_rule(name: str) -> ResNetSpec | None:
    if match := re.fullmatch(r"cifar_resnet(v2_)?(\d+)", name):
        depth = int(match[2])
        if depth < 8 or (depth - 2) % 6:
            near = max(8, 6 * round((depth - 2) / 6) + 2)
            raise UserError(f"model {name!r}: a CIFAR ResNet has 6n+2 layers; the nearest depth is {near}")
        return ResNetSpec(**CIFAR, depths=((depth - 2) // 6,) * 3, shortcut="A", preactivation=bool(match[1]))
    if match := re.fullmatch(r"wrn_(\d+)_(\d+)", name):
        depth, k = int(match[1]), int(match[2])
        if k < 1:
            raise UserError(f"model {name!r}: the widening factor after the depth must be at least 1")
        if depth < 10 or (depth - 4) % 6:
            near = max(10, 6 * round((depth - 4) / 6) + 4)
            raise UserError(f"model {name!r}: a wide ResNet has 6n+4 layers; the nearest depth is {near}")
        return ResNetSpec(
            **CIFAR | {"widths": (16 * k, 32 * k, 64 * k)}, depths=((depth - 4) // 6,) * 3, preactivation=True
        )
    return None
