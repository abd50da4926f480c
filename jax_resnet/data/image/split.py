"""Images and their labels, read by record number: in memory, or decoded when they are read."""

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

Records = Callable[[Sequence[int]], Iterable[tuple[bytes, int, str]]]  # record numbers → bytes, label and name of each


@dataclass(frozen=True)
class ImageSplit(Split):
    """Images uint8 [H, W, C] with one label each, int32."""

    pixels: Pixels

    @property
    @abstractmethod
    def original_size(self) -> tuple[int, int]:
        """Height and width of an image as it is stored: the first one, where they differ."""

    @property
    def random(self) -> bool:
        """See Split."""
        return self.pixels.random

    def shape(self, size: int | None = None) -> tuple[int, int, int]:
        """Return height, width and channels of the images that `read` gives."""
        side = size or self.pixels.size
        return (*((side, side) if side else self.original_size), self.pixels.channels)

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
        pixels, shape = self.pixels.at(size), self.shape(size)
        found = image_ops.with_channels(self.images.take(indices, axis=0), self.pixels.channels)
        if not pixels.leaves_alone(*found.shape[1:3], training=rngs is not None):
            images = np.empty((len(indices), *shape), np.uint8)
            for row, image in enumerate(found):
                images[row] = pixels.of_image(image, rngs[row] if rngs else None)
            found = images
        return Rows({"image": found, "label": self.labels[indices]}, {})


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
        pixels, shape = self.pixels.at(size), self.shape(size)
        images, labels = np.empty((len(indices), *shape), np.uint8), np.empty(len(indices), np.int32)
        broken: dict[int, tuple[str, str]] = {}
        for row, (data, label, name) in enumerate(self.records(indices.tolist())):
            if not 0 <= label < self.num_classes:
                raise UserError(
                    f"{self.name} split: {name} has label {label}; labels must lie in 0 … {self.num_classes - 1}"
                )
            labels[row] = label
            try:
                images[row] = pixels.of_bytes(data, rngs[row] if rngs else None)
            except ValueError as e:
                images[row], broken[row] = 0, (name, str(e))
        return Rows({"image": images, "label": labels}, broken)


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
