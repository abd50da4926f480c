"""Read images and labels by record number: from memory, or decoded when they are read."""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from ml_collections import ConfigDict

from jax_resnet.data.dataset import Rngs, Rows, Split
from jax_resnet.data.image import images as image_ops
from jax_resnet.data.image.decoders import describe
from jax_resnet.data.image.pixels import CROPS, Pixels
from jax_resnet.data.sampling import mirrored
from jax_resnet.errors import UserError

# Record numbers → encoded image, label and name of each.
Records = Callable[[Sequence[int]], Iterable[tuple[bytes, int, str]]]


@dataclass(frozen=True)
class ImageSplit(Split):
    """Images uint8 [H, W, C] with one label each, int32."""

    pixels: Pixels

    @property
    @abstractmethod
    def original_size(self) -> tuple[int, int]:
        """Height and width of a stored image: the first one, where they differ."""

    @property
    def random(self) -> bool:
        """See Split."""
        return self.pixels.random

    def shape(self, size: int | None = None) -> tuple[int, int, int]:
        """Return height, width and channels of the images that `read` gives."""
        side = size or self.pixels.size
        height, width = (side, side) if side else self.original_size
        return height, width, self.pixels.channels

    def element_spec(self, size: int | None = None, *, training: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
        """See Split. In training with flip_alternate an element also says whether it is mirrored."""
        spec = {
            "image": jax.ShapeDtypeStruct(self.shape(size), np.uint8),
            "label": jax.ShapeDtypeStruct((), np.int32),
        }
        if training and self.pixels.flip_alternate:
            spec["mirrored"] = jax.ShapeDtypeStruct((), np.bool_)
        return spec

    def marks(self, seed: int, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """See Split."""
        if not self.pixels.flip_alternate:
            return {}
        return {"mirrored": mirrored(seed, indices, epochs, len(self))}


@dataclass(frozen=True)
class ArraySplit(ImageSplit):
    """Images of one size, in memory."""

    images: np.ndarray  # uint8 [N, H, W, 1 or 3]
    labels: np.ndarray  # int32 [N]

    @property
    def original_size(self) -> tuple[int, int]:
        """Height and width of the images in memory."""
        return self.images.shape[1], self.images.shape[2]

    @property
    def source(self) -> str:
        """See Split."""
        return "memory"

    @property
    def in_memory(self) -> bool:
        """See Split."""
        return True

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray, rngs: Rngs | None, size: int | None = None) -> Rows:
        """See Split."""
        pixels = self.pixels.at(size)
        images = image_ops.with_channels(self.images.take(indices, axis=0), pixels.channels)
        if not pixels.leaves_alone(*images.shape[1:3], training=rngs is not None):
            stored = images
            images = np.empty((len(indices), *self.shape(size)), np.uint8)
            for row, image in enumerate(stored):
                images[row] = pixels.of_image(image, rngs[row] if rngs else None)
        return Rows({"image": images, "label": self.labels[indices]}, {})


@dataclass(frozen=True)
class EncodedSplit(ImageSplit):
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
        """See Split."""
        return describe(self.pixels.decoder)

    def __len__(self) -> int:
        return self.length

    def read(self, indices: np.ndarray, rngs: Rngs | None, size: int | None = None) -> Rows:
        """See Split."""
        pixels = self.pixels.at(size)
        images = np.empty((len(indices), *self.shape(size)), np.uint8)
        labels = np.empty(len(indices), np.int32)
        broken: dict[int, tuple[str, str]] = {}
        for row, (data, label, name) in enumerate(self.records(indices.tolist())):
            if not 0 <= label < self.num_classes:
                allowed = f"labels must lie in 0 … {self.num_classes - 1}"
                raise UserError(f"{self.name} split: {name} has label {label}; {allowed}")
            labels[row] = label
            try:
                images[row] = pixels.of_bytes(data, rngs[row] if rngs else None)
            except ValueError as e:
                images[row] = 0
                broken[row] = name, str(e)
        return Rows({"image": images, "label": labels}, broken)


def in_memory(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    config: ConfigDict,
    source: str,
) -> ArraySplit:
    """Make a split of images uint8 [N, H, W(, 1 or 3)] and labels [N].

    `config` is config.data.image. Raises UserError, naming `source`, for images or labels of
    another form.
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
    size = config.size
    if size is None and config.crop in CROPS:
        size = images.shape[1]
        if images.shape[1] != images.shape[2]:
            shapes = f"{config.crop} crops are square, the images {images.shape[1:3]}"
            raise UserError(f"{source}: {shapes}; set config.data.image.size")
    return ArraySplit(name, Pixels.of(config, size), images, labels.astype(np.int32))


def encoded(
    name: str,
    size: int,
    records: Records,
    num_classes: int,
    data: ConfigDict,
) -> EncodedSplit:
    """Make a split of `size` encoded images; `data` is config.data.

    Raises UserError if the config has no size for them, or the first cannot be read.
    """
    if data.image.size is None:
        raise UserError(
            f"config.data.name={data.name}: its images differ in size, or are too many for memory; "
            "say which the network gets: --config.data.image.size=224"
        )
    pixels = Pixels.of(data.image, data.image.size)
    split = EncodedSplit(name, pixels, size, records, num_classes)
    # An error that all records share shows now, not after an epoch.
    if size:
        split.read(np.zeros(1, np.int64), None)
    return split
