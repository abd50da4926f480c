"""How an image becomes one of a batch, on the host."""

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
    flip_alternate: bool = False

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
            flip_alternate=c.flip_alternate,
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
