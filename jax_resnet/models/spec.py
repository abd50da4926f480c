"""ResNetSpec: the description of one network of the family."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

Block = Literal["basic", "bottleneck"]
EXPANSION = {"basic": 1, "bottleneck": 4}  # a block's output channels / `widths`


@dataclass(frozen=True)
class ResNetSpec:
    """The shape of one network of the family. The defaults are ResNet-50's (v1.5)."""

    block: Block | tuple[Block, ...] = "bottleneck"  # or one for each stage
    # The blocks of each stage. Every stage but the first halves the image.
    depths: tuple[int, ...] = (3, 4, 6, 3)
    # The channels of each stage's 3×3 convolutions; bottlenecks have 4 times as many outputs.
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: Literal["imagenet", "cifar", "deep", "tiered"] = "imagenet"
    stem_width: int = 64  # output channels of the stem
    stem_pool: Literal["max", "zero_max", "blur_max", "conv"] = "max"  # unless the stem is "cifar"
    shortcut: Literal["A", "B", "D"] = "B"
    shortcut_kernel: Literal[1, 3] = 1  # of projections with a stride
    preactivation: bool = False  # v2
    stride_in_1x1: bool = False  # v1, the first paper, not v1.5
    # The width of a bottleneck's 3×3 convolution over `widths`: 2 in wide_resnet50_2.
    inner_factor: float = 1.0
    # The width of a block's first convolution over that of its second: 1/2 in SENet-154.
    first_factor: float = 1.0
    # The groups of a bottleneck's 3×3 convolution: 32 in ResNeXt-50 32×4d, where inner_factor is
    # 32 · 4 / 64.
    groups: int = 1
    # The output channels of each convolution of each block, by stage, after pruning.
    block_widths: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    attention: Literal[None, "se", "eca"] = None
    se_ratio: float = 1 / 16
    # avg and blur halve the image in place of strides and of max pooling; blur_conv blurs before
    # convolutions with a stride.
    antialias: Literal[None, "avg", "blur", "blur_conv"] = None
    norm: Literal["batch", "group", "evonorm", "frn"] = "batch"
    standardise: bool = False  # weight standardisation
    pool: Literal["avg", "max"] = "avg"
    dropout: float = 0.0
    # The share of examples whose residual the last block drops; it grows linearly from 0.
    drop_path: float = 0.0
    # The kernels of convolutions start with variance 2 / fan_out or 2 / fan_in.
    init: Literal["fan_out", "fan_in"] = "fan_out"
    head_std: float = 0.01  # standard deviation of its first kernel
    # The head's biases start at −log(classes), where sigmoids are near 1 / classes.
    head_prior: bool = False
    # The last norm's scale starts at 0 (Goyal et al. 2017, section 5.1). Pre-activation blocks
    # end in no norm.
    zero_init_last: bool = True
    bn_group_size: int | None = None  # examples; None: the batch
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5  # of the other norms too

    def __post_init__(self) -> None:
        for field in fields(self):
            values = get_args(field.type)
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in values:
                raise ValueError(f"{field.name}={value!r}: must be {' or '.join(map(str, values))}")
        for name in ("depths", "widths"):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or not values or not all(type(v) is int and v > 0 for v in values):
                raise ValueError(f"{name}={values}: must be whole numbers, at least 1, one for each stage")
            object.__setattr__(self, name, tuple(values))
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths={self.depths} and widths={self.widths}: one of each for every stage")
        for name in ("stem_width", "groups", "bn_group_size"):
            value = getattr(self, name)
            optional = name == "bn_group_size" and value is None
            if not optional and not (type(value) is int and value > 0):
                raise ValueError(f"{name}={value}: must be a whole number, at least 1")
        for name in ("dropout", "drop_path", "bn_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and less than 1")
        for name in ("inner_factor", "first_factor", "se_ratio", "bn_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be more than 0")
        if not self.head_std >= 0:
            raise ValueError(f"head_std={self.head_std}: must be at least 0")
        self._check_blocks()

    def _check_blocks(self) -> None:
        """Raise ValueError for choices that do not go together."""
        kinds = self.stage_blocks
        pools = self.antialias in ("avg", "blur")  # in place of strides
        if len(kinds) != len(self.depths) or not set(kinds) <= set(get_args(Block)):
            raise ValueError(f"block={self.block!r}: must be basic or bottleneck, or one of them for each stage")
        if "basic" in kinds and (self.inner_factor != 1 or self.groups != 1):
            raise ValueError("inner_factor and groups: only bottlenecks have an inside")
        if self.stride_in_1x1 and ("basic" in kinds or self.preactivation or pools):
            raise ValueError(
                "stride_in_1x1: only post-activation bottlenecks, not anti-aliased by avg or blur, have the choice"
            )
        if self.preactivation and (self.attention or pools or self.stem_pool == "conv"):
            raise ValueError("attention, antialias=avg or blur, and stem_pool=conv: only for post-activation networks")
        if pools and self.stem_pool in ("zero_max", "blur_max"):
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
            valid = all(len(block) == convs and all(type(w) is int for w in block) for block in stage)
            if not valid or len({block[-1] for block in stage}) > 1:
                raise ValueError(
                    f"block_widths: {stage} must be {convs} whole numbers a block, the last alike in a stage"
                )

    @property
    def stage_blocks(self) -> tuple[str, ...]:
        """Name the block of each stage."""
        return (self.block,) * len(self.depths) if isinstance(self.block, str) else tuple(self.block)

    def conv_widths(self, stage: int, block: int) -> tuple[int, ...]:
        """Return the output channels of a block's convolutions; the last are those of the stage."""
        if self.block_widths:
            return self.block_widths[stage][block]
        width = self.widths[stage]
        if self.stage_blocks[stage] == "basic":
            return int(width * self.first_factor), width
        inner = round(width * self.inner_factor)
        return int(inner * self.first_factor), inner, self.nominal_channels(stage)

    def nominal_channels(self, stage: int) -> int:
        """Count the channels of a stage's output before pruning."""
        return self.widths[stage] * EXPANSION[self.stage_blocks[stage]]

    @property
    def channels(self) -> tuple[int, ...]:
        """Return the channels of each stage's output."""
        return tuple(self.conv_widths(stage, 0)[-1] for stage in range(len(self.depths)))

    @property
    def strides(self) -> tuple[int, ...]:
        """Return the pixels of the image for one of each stage's output, along one side."""
        stem_stride = 1 if self.stem == "cifar" else 4
        return tuple(stem_stride * 2**stage for stage in range(len(self.depths)))

    @property
    def total_stride(self) -> int:
        """Return the pixels of the image for one of the last feature map, along one side."""
        return self.strides[-1]
