"""One part of a dataset, read by record number.

Images that all have one size and fit are kept in memory; others are decoded when they are read.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jax_resnet.config import check_crop_resize
from jax_resnet.data.image import images as image_ops
from jax_resnet.data.image.augment import Augmentation, augment
from jax_resnet.data.image.decoders import choose_decoder, describe
from jax_resnet.errors import UserError

EVAL_SPLITS = ("validation", "val", "valid", "test")  # names that the split for evaluation goes by
CROPS = ("random_resized", "scaled", "stretched")  # at random, of any size

Records = Callable[[Sequence[int]], Iterable[tuple[bytes, int, str]]]  # record numbers → bytes, label and name of each
Rngs = Sequence[np.random.Generator]


class Rows(NamedTuple):
    """What was read."""

    images: np.ndarray  # uint8 [B, H, W, C]
    labels: np.ndarray  # int32 [B]
    broken: dict[int, tuple[str, str]]  # row → name and reason, of what could not be decoded; its image is black


@dataclass(frozen=True)
class Pixels:
    """How an image becomes one of a batch, on the host: the same whether it was decoded or in memory."""

    size: int | None  # pixels a side; None: those the image has
    channels: int
    crop: str  # of training images, as in the config
    area: tuple[float, float]  # shares of the image that random-resized crops cover
    ratio: tuple[float, float]
    sides: tuple[float, float]  # of images to be cropped, in sides of the crop
    eval_crop: float  # share of the short side that evaluation keeps
    sampling: image_ops.Sampling
    augmentation: Augmentation
    decoder: str  # of decoders.DECODERS, chosen

    @classmethod
    def of(cls, c: ConfigDict, size: int | None) -> "Pixels":
        """Build it from `config.data.image`. Evaluation crops only where training has random-resized or scaled crops.

        Raises UserError where images would be resized to less than the crop.
        """
        if size:
            check_crop_resize(c, size)
        low, high = c.crop_resize
        return cls(
            size=size,
            channels=c.channels,
            crop=c.crop,
            area=tuple(c.crop_area),
            ratio=tuple(c.crop_ratio),
            sides=(low / (size or low), high / (size or low)),
            eval_crop=c.eval_crop if c.crop in ("random_resized", "scaled") else 1.0,
            sampling=image_ops.Sampling(c.interpolation, c.antialias),
            augmentation=Augmentation.of(c),
            decoder=choose_decoder(c.decoder),
        )

    def at(self, size: int | None) -> "Pixels":
        """The same to `size` pixels a side, crops of the same shares of an image; None: as it is."""
        return replace(self, size=size) if size else self

    @property
    def random(self) -> bool:
        """Whether training uses generators: they are worth making only then."""
        return self.crop in CROPS or bool(self.augmentation)

    def leaves_alone(self, height: int, width: int, *, training: bool) -> bool:
        """Whether images of that size come out as they went in."""
        same = self.size is None or (height, width) == (self.size, self.size)
        return same and self.eval_crop == 1 and not (training and self.random)

    def of_bytes(self, data: bytes, rng: np.random.Generator | None) -> np.ndarray:
        """An encoded image → uint8 [size, size, channels]: at random with `rng`, else its centre.

        Raises ValueError for what cannot be decoded.
        """
        return self._resized(image_ops.decode(data, self.channels, self._chooser(rng), self.decoder), rng)

    def of_image(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """uint8 [H, W, channels] → [size, size, channels], likewise."""
        if choose := self._chooser(rng):
            top, left, height, width = choose(*image.shape[:2])
            image = image[top : top + height, left : left + width]
        return self._resized(image, rng)

    def _chooser(self, rng: np.random.Generator | None) -> Callable[[int, int], image_ops.Box] | None:
        """What draws the box that is cropped of an image of a height and width, if one is drawn."""
        if self.size is None or self.crop not in CROPS or rng is None:
            return None
        if self.crop == "random_resized":
            return partial(image_ops.random_box, area=self.area, ratio=self.ratio, rng=rng)
        return partial(image_ops.resized_box, sides=self.sides, rng=rng, stretched=self.crop == "stretched")

    def _resized(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        if self.size is not None and (self.crop == "stretched" or (self.crop in CROPS and rng is not None)):
            image = image_ops.resize(image, self.size, self.size, self.sampling)
        elif self.size is not None:
            image = image_ops.resize_and_center_crop(image, self.size, self.eval_crop, self.sampling)
        return image if rng is None else augment(image, rng, self.augmentation)


@dataclass(frozen=True)
class Split(ABC):
    """One part of a dataset."""

    name: str  # what the dataset calls it
    pixels: Pixels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels of what `read` gives."""
        side = self.pixels.size
        return (*((side, side) if side else self.original_size), self.pixels.channels)

    @property
    @abstractmethod
    def original_size(self) -> tuple[int, int]:
        """Height and width of an image as it is stored: the first one, where they differ."""

    @property
    @abstractmethod
    def source(self) -> str:
        """Where pixels come from: memory, or which decoder."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: np.ndarray, rngs: Rngs | None, size: int | None = None) -> Rows:
        """Those records; `rngs`, one for each, crop and augment for training, None for evaluation.

        The images get `size` pixels a side; None: as many as `image_shape` says.
        Raises UserError naming a record that cannot be read, or whose label is out of range.
        """


@dataclass(frozen=True)
class Dataset:
    """A dataset's two splits and its classes."""

    name: str
    train: Split
    eval: Split
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell apart."""
        return len(self.class_names)


@dataclass(frozen=True)
class ArraySplit(Split):
    """Images of one size, in memory."""

    images: np.ndarray  # uint8 [N, H, W, 1 or 3]
    labels: np.ndarray  # int32 [N]

    @property
    def original_size(self) -> tuple[int, int]:
        """Height and width of the images in memory."""
        return self.images.shape[1], self.images.shape[2]

    @property
    def source(self) -> str:
        """Where pixels come from."""
        return "memory"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray, rngs: Rngs | None, size: int | None = None) -> Rows:
        """See Split."""
        pixels, shape = self.pixels.at(size), (size, size, self.pixels.channels) if size else self.image_shape
        found = image_ops.with_channels(self.images.take(indices, axis=0), self.pixels.channels)
        if not pixels.leaves_alone(*found.shape[1:3], training=rngs is not None):
            images = np.empty((len(indices), *shape), np.uint8)
            for row, image in enumerate(found):
                images[row] = pixels.of_image(image, rngs[row] if rngs else None)
            found = images
        return Rows(found, self.labels[indices], {})


@dataclass(frozen=True)
class EncodedSplit(Split):
    """Encoded images of any size, decoded when read."""

    length: int
    records: Records
    num_classes: int

    @property
    def original_size(self) -> tuple[int, int]:
        """Height and width of the first image that can be decoded. Raises UserError if none of 100 can."""
        for data, _, _ in self.records(range(min(100, self.length))):
            with contextlib.suppress(ValueError):
                height, width, _ = image_ops.decode(data, self.pixels.channels).shape
                return height, width
        raise UserError(f"{self.name} split: none of its first images can be decoded")

    @property
    def source(self) -> str:
        """Where pixels come from."""
        return describe(self.pixels.decoder)

    def __len__(self) -> int:
        return self.length

    def read(self, indices: np.ndarray, rngs: Rngs | None, size: int | None = None) -> Rows:
        """See Split."""
        pixels, shape = self.pixels.at(size), (size, size, self.pixels.channels) if size else self.image_shape
        rows = Rows(np.empty((len(indices), *shape), np.uint8), np.empty(len(indices), np.int32), {})
        for row, (data, label, name) in enumerate(self.records(indices.tolist())):
            if not 0 <= label < self.num_classes:
                raise UserError(
                    f"{self.name} split: {name} has label {label}; labels must lie in 0 … {self.num_classes - 1}"
                )
            rows.labels[row] = label
            try:
                rows.images[row] = pixels.of_bytes(data, rngs[row] if rngs else None)
            except ValueError as e:
                rows.images[row], rows.broken[row] = 0, (name, str(e))
        return rows


def in_memory(
    name: str, images: np.ndarray, labels: np.ndarray, num_classes: int, c: ConfigDict, source: str
) -> ArraySplit:
    """A split of images uint8 [N, H, W(, 1 or 3)] and labels [N]; `c` is config.data.image.

    Raises UserError, naming `source`, for images or labels of another form.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"{source}: {name} images have shape {images.shape}; they must be [N, H, W], [N, H, W, 1] or [N, H, W, 3]"
        )
    if len(images) != len(labels):
        raise UserError(f"{source}: {len(images)} {name} images, but {len(labels)} labels")
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if bad.size:
        raise UserError(
            f"{source}: {name} label {labels[bad[0]]} of record {bad[0]} is out of range; "
            f"labels must lie in 0 … {num_classes - 1}"
        )
    size = c.size
    if size is None and c.crop in CROPS:
        size = images.shape[1]
        if images.shape[1] != images.shape[2]:
            raise UserError(
                f"{source}: {c.crop} crops are square, the images {images.shape[1:3]}; set config.data.image.size"
            )
    return ArraySplit(name, Pixels.of(c, size), images, labels.astype(np.int32))


def encoded(name: str, size: int, records: Records, num_classes: int, c: ConfigDict) -> EncodedSplit:
    """A split of encoded images. Raises UserError if the config has no size for them, or none can be read."""
    if c.image.size is None:
        raise UserError(
            f"config.data.name={c.name}: its images differ in size, or are too many for memory; "
            "say which the network gets: --config.data.image.size=224"
        )
    split = EncodedSplit(name, Pixels.of(c.image, c.image.size), size, records, num_classes)
    if size:
        split.read(np.zeros(1, np.int64), None)  # what is wrong with all of it shows now, not after an epoch
    return split
