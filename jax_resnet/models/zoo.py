"""The table of named networks, and `create_model`."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jax_resnet.errors import UserError, did_you_mean
from jax_resnet.models.resnet import ResNet
from jax_resnet.models.spec import ResNetSpec

Choices = dict[str, Any]  # fields of ResNetSpec

# Each depth stands for a block and the number of them in each stage. He et al. 2015, table 1;
# 200: He et al. 2016, section 4.2; 10, 14, 26: timm; 269: SENet's and ECA's authors; 270, 350, 420:
# Bello et al. 2021, table 10.
DEPTHS: dict[int, Choices] = {
    10: {"block": "basic", "depths": (1, 1, 1, 1)},
    14: {"block": "bottleneck", "depths": (1, 1, 1, 1)},
    18: {"block": "basic", "depths": (2, 2, 2, 2)},
    26: {"block": "bottleneck", "depths": (2, 2, 2, 2)},
    34: {"block": "basic", "depths": (3, 4, 6, 3)},
    50: {"block": "bottleneck", "depths": (3, 4, 6, 3)},
    101: {"block": "bottleneck", "depths": (3, 4, 23, 3)},
    152: {"block": "bottleneck", "depths": (3, 8, 36, 3)},
    200: {"block": "bottleneck", "depths": (3, 24, 36, 3)},
    201: {"block": "bottleneck", "depths": (3, 24, 36, 4)},
    269: {"block": "bottleneck", "depths": (3, 30, 48, 8)},
    270: {"block": "bottleneck", "depths": (4, 29, 53, 4)},
    350: {"block": "bottleneck", "depths": (4, 36, 72, 4)},
    420: {"block": "bottleneck", "depths": (4, 44, 87, 4)},
}

# The letter after the depth names a variant. He et al. 2018, "Bag of tricks", figure 2: B (stride
# on the 3×3) is this library's default; C has three 3×3 convolutions in the stem; D also averages
# in the shortcuts. S is C with a wider stem, T is D with a tiered one.
C: Choices = {"stem": "deep"}
D: Choices = {"stem": "deep", "shortcut": "D"}
S: Choices = {"stem": "deep", "stem_width": 128}
T: Choices = {"stem": "tiered", "shortcut": "D"}
LETTERS: dict[str, Choices] = {"": {}, "c": C, "d": D, "s": S, "t": T}

SE: Choices = {"attention": "se"}
ECA: Choices = {"attention": "eca"}
AVG: Choices = {"antialias": "avg"}
BLUR: Choices = {"antialias": "blur"}
RS: Choices = D | SE | {"se_ratio": 1 / 4, "stem_pool": "conv"}  # Bello et al. 2021, section 4.2
V2: Choices = {"preactivation": True}
CIFAR: Choices = {"block": "basic", "stem": "cifar", "stem_width": 16, "widths": (16, 32, 64)}


def _net(depth: int, *choices: Choices, **more: Any) -> ResNetSpec:
    merged: Choices = dict(DEPTHS[depth])
    for choice in (*choices, more):
        merged |= choice
    return ResNetSpec(**merged)


def _groups(groups: int, width: int) -> Choices:
    """Choose ResNeXt's groups: 32×4d has 32 of 4 channels in the first stage.

    Xie et al. 2016, table 1.
    """
    return {"groups": groups, "inner_factor": groups * width / 64}


def _bit(factor: int) -> Choices:
    """Choose Big Transfer's networks: group norm, standardised kernels, every width × factor.

    Kolesnikov et al. 2019, section 3.1.
    """
    widths = tuple(factor * width for width in (64, 128, 256, 512))
    norm = {"norm": "group", "standardise": True}
    return V2 | norm | {"stem_pool": "zero_max", "stem_width": 64 * factor, "widths": widths}


def _pruned(*stages: tuple[int, tuple[tuple[int, int], ...]]) -> Choices:
    """Choose block widths: for each stage its output channels and each block's inner widths."""
    return {"block_widths": tuple(tuple((*inside, out) for inside in blocks) for out, blocks in stages)}


# Knapsack pruning (Aflalo et al. 2020, "Knapsack pruning with inner distillation"), as published in timm.
PRUNED_50D = _pruned(
    (19, ((47, 18), (52, 22), (64, 35))),
    (171, ((85, 37), (107, 80), (120, 85), (125, 87))),
    (818, ((198, 126), (255, 232), (256, 233), (253, 235), (256, 225), (256, 239))),
    (2022, ((492, 237), (512, 500), (512, 490))),
)
# fmt: off
PRUNED_101D = _pruned(
    (26, ((45, 25), (53, 20), (60, 27))),
    (142, ((81, 24), (93, 49), (102, 54), (122, 78))),
    (278, ((101, 25), (239, 160), (234, 156), (250, 176), (253, 191), (251, 175), (230, 128), (244, 154), (244, 159),
           (238, 97), (244, 149), (253, 181), (245, 119), (255, 216), (256, 201), (253, 149), (254, 141), (256, 190),
           (256, 217), (255, 156), (256, 155), (256, 232), (256, 214))),
    (2042, ((499, 289), (512, 512), (512, 502))),
)
# fmt: on

# resnet50 is v1.5 (stride on the 3×3), resnet50_v1 that of the first paper, resnetv2_50
# pre-activation. Networks that timm also has share its names and shapes.
ZOO: dict[str, ResNetSpec] = {
    **{
        f"resnet{depth}{letter}": _net(depth, LETTERS[letter])
        for letter, depths in {
            "": (18, 26, 34, 50, 101, 152, 200),
            "c": (50, 101, 152),
            "d": (18, 26, 34, 50, 101, 152, 200),
            "s": (50, 101, 152),
            "t": (10, 14, 26, 50),
        }.items()
        for depth in depths
    },
    **{f"resnet{depth}_v1": _net(depth, stride_in_1x1=True) for depth in (50, 101, 152)},
    "resnet50_gn": _net(50, norm="group"),
    "test_resnet": ResNetSpec(
        **D,
        block=("basic", "basic", "bottleneck", "basic"),
        depths=(1, 1, 1, 1),
        widths=(32, 48, 48, 96),
        stem_width=32,
    ),
    # Zagoruyko and Komodakis 2016, section 3: bottlenecks with a wider inside.
    "wide_resnet50_2": _net(50, inner_factor=2.0),
    "wide_resnet101_2": _net(101, inner_factor=2.0),
    # Xie et al. 2016.
    "resnext50_32x4d": _net(50, _groups(32, 4)),
    "resnext50d_32x4d": _net(50, D, _groups(32, 4)),
    "resnext101_32x4d": _net(101, _groups(32, 4)),
    "resnext101_32x8d": _net(101, _groups(32, 8)),
    "resnext101_32x16d": _net(101, _groups(32, 16)),
    "resnext101_32x32d": _net(101, _groups(32, 32)),
    "resnext101_64x4d": _net(101, _groups(64, 4)),
    # Hu et al. 2017: squeeze and excitation.
    **{f"seresnet{depth}": _net(depth, SE) for depth in (18, 34, 50, 101, 152)},
    **{f"seresnet{depth}d": _net(depth, D, SE) for depth in (152, 200, 269)},
    "seresnet50t": _net(50, T, SE),
    "seresnext26d_32x4d": _net(26, D, SE, _groups(32, 4)),
    "seresnext26t_32x4d": _net(26, T, SE, _groups(32, 4)),
    "seresnext50_32x4d": _net(50, SE, _groups(32, 4)),
    "seresnext101_32x4d": _net(101, SE, _groups(32, 4)),
    "seresnext101_32x8d": _net(101, SE, _groups(32, 8)),
    "seresnext101d_32x8d": _net(101, D, SE, _groups(32, 8)),
    "seresnext101_64x4d": _net(101, SE, _groups(64, 4)),
    "senet154": _net(152, S, SE, _groups(64, 4), first_factor=0.5, shortcut_kernel=3),
    # Wang et al. 2019: efficient channel attention.
    **{f"ecaresnet{depth}d": _net(depth, D, ECA) for depth in (50, 101, 200, 269)},
    **{f"ecaresnet{depth}t": _net(depth, T, ECA) for depth in (26, 50)},
    "ecaresnet50d_pruned": _net(50, D, ECA, PRUNED_50D),
    "ecaresnet101d_pruned": _net(101, D, ECA, PRUNED_101D),
    "ecaresnetlight": _net(50, ECA, depths=(1, 1, 11, 3), shortcut="D"),
    "ecaresnext26t_32x4d": _net(26, T, ECA, _groups(32, 4)),
    "ecaresnext50t_32x4d": _net(50, T, ECA, _groups(32, 4)),
    # Zhang 2019: anti-aliased, by the mean or by a binomial filter.
    "resnetaa34d": _net(34, D, AVG),
    "resnetaa50": _net(50, AVG),
    "resnetaa50d": _net(50, D, AVG),
    "resnetaa101d": _net(101, D, AVG),
    "seresnetaa50d": _net(50, D, SE, AVG),
    "seresnextaa101d_32x8d": _net(101, D, SE, AVG, _groups(32, 8)),
    "seresnextaa201d_32x8d": _net(201, D, SE, AVG, _groups(32, 8), stem_width=128),
    "resnetblur18": _net(18, BLUR),
    "resnetblur50": _net(50, BLUR),
    "resnetblur50d": _net(50, D, BLUR),
    "resnetblur101d": _net(101, D, BLUR),
    # Bello et al. 2021, "Revisiting ResNets".
    **{f"resnetrs{depth}": _net(depth, RS) for depth in (50, 101, 152, 200, 270, 350, 420)},
    # He et al. 2016, "Identity mappings": pre-activation.
    **{f"resnetv2_{depth}": _net(depth, V2) for depth in (18, 34, 50, 101, 152, 200)},
    **{f"resnetv2_{depth}d": _net(depth, V2, D) for depth in (18, 34, 50, 101, 152)},
    "resnetv2_50t": _net(50, V2, T),
    "resnetv2_50d_gn": _net(50, V2, D, norm="group"),
    "resnetv2_50d_evos": _net(50, V2, D, norm="evonorm"),
    "resnetv2_50d_frn": _net(50, V2, D, norm="frn"),
    **{
        f"resnetv2_{depth}x{factor}_bit": _net(depth, _bit(factor))
        for depth, factor in ((50, 1), (50, 3), (101, 1), (101, 3), (152, 2), (152, 4))
    },
    # He et al. 2015, section 4.2: 6n+2 layers, three stages of n blocks, shortcuts without parameters.
    **{
        f"cifar_resnet{depth}": ResNetSpec(**CIFAR, depths=((depth - 2) // 6,) * 3, shortcut="A")
        for depth in (20, 32, 44, 56, 110, 1202)
    },
    # Zagoruyko and Komodakis 2016: 6n+4 layers, widths ×k, pre-activation.
    "wrn_16_4": ResNetSpec(**CIFAR | V2 | {"widths": (64, 128, 256)}, depths=(2, 2, 2)),
    "wrn_28_10": ResNetSpec(**CIFAR | V2 | {"widths": (160, 320, 640)}, depths=(4, 4, 4)),
    "wrn_40_2": ResNetSpec(**CIFAR | V2 | {"widths": (32, 64, 128)}, depths=(6, 6, 6)),
}


def model_spec(name: str, **overrides: Any) -> ResNetSpec:
    """Return the spec of the network called `name`, with fields replaced by `overrides`.

    An override of None replaces nothing. Names are those of the table, and cifar_resnet<6n+2>,
    cifar_resnetv2_<6n+2> and wrn_<6n+4>_<k> of any size. Raises UserError, with near names, for an
    unknown name, field or value.
    """
    spec = ZOO.get(name) or _by_rule(name)
    if spec is None:
        raise UserError(f"model {name!r}: unknown name; {did_you_mean(name, ZOO)}")
    fields = {f.name for f in dataclasses.fields(ResNetSpec)}
    for key in overrides.keys() - fields:
        raise UserError(f"model {name!r}: no option {key!r}; {did_you_mean(key, fields)}")
    if spec.block_widths and overrides.get("widths") and not overrides.get("block_widths"):
        raise UserError(f"model {name!r}: pruned to widths of its own; change block_widths, or take another network")
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
    """Build the network called `name`, which maps images to logits.

    It takes normalised float images [N, H, W, in_channels] and returns float32 [N, num_classes].
    `overrides` replace fields of `ResNetSpec`: depths, widths, stem, shortcut, pool, dropout,
    bn_group_size … A new model is in training mode, where batch norm uses the batch's statistics;
    `model.eval()` switches to the running ones. Images should be at least
    `model.spec.total_stride` pixels high and wide.

        model = create_model("resnet50", num_classes=1000, rngs=nnx.Rngs(0))
        model.eval()
        logits = model(images)

    Training with dropout needs keys for it: `model(images, rngs=nnx.Rngs(dropout=0))`.
    Raises UserError for an unknown name or option, or fewer than one class or channel.
    """
    for option, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise UserError(f"model {name!r}: {option}={value} must be at least 1")
    spec = model_spec(name, **overrides)
    return ResNet(spec, num_classes=num_classes, in_channels=in_channels, dtype=dtype, rngs=rngs)


def _by_rule(name: str) -> ResNetSpec | None:
    if match := re.fullmatch(r"cifar_resnet(v2_)?(\d+)", name):
        depth = int(match[2])
        if depth < 8 or (depth - 2) % 6:
            near = max(8, 6 * round((depth - 2) / 6) + 2)
            raise UserError(f"model {name!r}: a CIFAR ResNet has 6n+2 layers; the nearest depth is {near}")
        depths = ((depth - 2) // 6,) * 3
        return ResNetSpec(**CIFAR, depths=depths, shortcut="A", preactivation=bool(match[1]))
    if match := re.fullmatch(r"wrn_(\d+)_(\d+)", name):
        depth = int(match[1])
        k = int(match[2])
        if k < 1:
            raise UserError(f"model {name!r}: the widening factor after the depth must be at least 1")
        if depth < 10 or (depth - 4) % 6:
            near = max(10, 6 * round((depth - 4) / 6) + 4)
            raise UserError(f"model {name!r}: a wide ResNet has 6n+4 layers; the nearest depth is {near}")
        widths = {"widths": (16 * k, 32 * k, 64 * k)}
        return ResNetSpec(**CIFAR | V2 | widths, depths=((depth - 4) // 6,) * 3)
    return None
