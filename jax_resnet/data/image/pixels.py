"""Turn an image into one of a batch, on the host."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from ml_collections import ConfigDict

from jax_resnet.config import check_crop_resize
from jax_resnet.data.image import images as image_ops
from jax_resnet.data.image.augment import Augmentation, augment
from jax_resnet.data.image.decoders import choose_decoder

CROPS = ("random_resized", "scaled", "stretched")  # at random, of any size


@dataclass(frozen=True)
class Pixels:
    """Turn images, encoded or in memory, into those of a batch."""

    size: int | None  # pixels a side; None: the image's own
    channels: int
    crop: str  # of training images, as in the config
    area: tuple[float, float]  # of random-resized crops, in images
    ratio: tuple[float, float]
    sides: tuple[float, float]  # of images to crop, in crop sides
    eval_crop: float  # share of the short side
    sampling: image_ops.Sampling
    augmentation: Augmentation
    decoder: str  # as decoders.choose_decoder returns it
    flip_alternate: bool = False

    @classmethod
    def of(cls, image: ConfigDict, size: int | None) -> "Pixels":
        """Build it from `image`, which is config.data.image.

        Evaluation crops only if training has random-resized or scaled crops. Raises UserError where
        images would be resized to less than the crop.
        """
        if size:
            check_crop_resize(image, size)
        low, high = image.crop_resize
        eval_crops = image.crop in ("random_resized", "scaled")
        return cls(
            size=size,
            channels=image.channels,
            crop=image.crop,
            area=tuple(image.crop_area),
            ratio=tuple(image.crop_ratio),
            sides=(low / (size or low), high / (size or low)),
            eval_crop=image.eval_crop if eval_crops else 1.0,
            sampling=image_ops.Sampling(image.interpolation, image.antialias),
            augmentation=Augmentation.of(image),
            decoder=choose_decoder(image.decoder),
            flip_alternate=image.flip_alternate,
        )

    def at(self, size: int | None) -> "Pixels":
        """Change the side to `size` pixels, if not None; crops keep their shares of an image."""
        if not size:
            return self
        return replace(self, size=size)

    @property
    def random(self) -> bool:
        """Whether training uses generators; else none need be made."""
        return self.crop in CROPS or bool(self.augmentation)

    def leaves_alone(self, height: int, width: int, *, training: bool) -> bool:
        """Tell whether images of that size stay as they are."""
        same = self.size is None or (height, width) == (self.size, self.size)
        return same and self.eval_crop == 1 and not (training and self.random)

    def of_bytes(self, data: bytes, rng: np.random.Generator | None) -> np.ndarray:
        """Decode an image → uint8 [size, size, channels]: at random with `rng`, else its centre.

        Raises ValueError for what cannot be decoded.
        """
        image = image_ops.decode(data, self.channels, self._chooser(rng), self.decoder)
        return self._finish(image, rng)

    def of_image(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Crop and resize uint8 [H, W, channels] → [size, size, channels], likewise."""
        if choose := self._chooser(rng):
            top, left, height, width = choose(*image.shape[:2])
            image = image[top : top + height, left : left + width]
        return self._finish(image, rng)

    def _chooser(self, rng: np.random.Generator | None) -> Callable[[int, int], image_ops.Box] | None:
        """Return the function (height, width) → box to crop; None where none is drawn."""
        if self.size is None or self.crop not in CROPS or rng is None:
            return None
        if self.crop == "random_resized":
            return partial(image_ops.random_box, area=self.area, ratio=self.ratio, rng=rng)
        return partial(image_ops.resized_box, sides=self.sides, rng=rng, stretched=self.crop == "stretched")

    def _finish(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Resize a cropped image; augment it with `rng`."""
        if self.size is not None and (self.crop == "stretched" or (self.crop in CROPS and rng is not None)):
            image = image_ops.resize(image, self.size, self.size, self.sampling)
        elif self.size is not None:
            image = image_ops.resize_and_center_crop(image, self.size, self.eval_crop, self.sampling)
        if rng is not None:
            image = augment(image, rng, self.augmentation)
        return image
