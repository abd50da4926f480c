"""Augment pixels on the device, in the jitted step: shift, flip, normalise, colour, erase, mix.

All random numbers are drawn first, for all of a batch, as small arrays; its images can then be
augmented together or in parts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jax_resnet.data.inputs import Draws, mix

ERASED_AREA = (0.02, 0.33)  # shares of the image
ERASED_RATIO = (0.3, 3.3)  # height over width
# Principal components of ImageNet's pixels (red, green, blue) in [0, 1], in columns, and their
# standard deviations, as in fb.resnet.torch.
COLOUR_DEVIATIONS = (0.2175, 0.0188, 0.0045)
COLOUR_COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@dataclass(frozen=True)
class ImageInputs:
    """Images as the network's input: see Inputs."""

    data: ConfigDict  # config.data
    name: ClassVar[str] = "image"

    def draw(self, key: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Draws, Draws]:
        """See Inputs."""
        return draw(key, batch[self.name].shape, self.data)

    def augment(self, rows: Mapping[str, jax.Array], shared: Draws) -> jax.Array:
        """See Inputs."""
        return augment(rows[self.name], rows, shared, self.data.image)

    def normalise(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """See Inputs."""
        return normalise(batch[self.name], self.data.image.mean, self.data.image.std)

    def mirror(self, inputs: jax.Array) -> jax.Array:
        """See Inputs."""
        return inputs[:, :, ::-1]


def draw(key: jax.Array, shape: Sequence[int], data: ConfigDict) -> tuple[Draws, Draws]:
    """Draw the random numbers of `augment` for images of `shape` [N, H, W, C]; `data`: config.data.

    Returns two dicts with only what the config asks for. For each row: "corner" int32 [N, 2] of the
    part of a padded image that is kept; "mirrored" bool [N] (with flip_alternate the host puts it
    in the batch); "colour" float32 [N, C]; "erased" int32 [N, 2, 2], two corners.
    For the batch: "rows" and "columns" int32 that ColOut keeps; "weight" float32 of an image's own
    pixels, [] for mixup and [H', W', 1] for CutMix; "kept", the mean weight.
    """
    n, height, width, _ = shape
    shift_key, flip_key, colour_key, erase_key, row_key, column_key, mix_key = jax.random.split(key, 7)
    image = data.image
    rows: Draws = {}
    batch: Draws = {}
    if image.crop == "pad" and image.pad:
        rows["corner"] = jax.random.randint(shift_key, (n, 2), 0, 2 * image.pad + 1)
    if image.flip and not image.flip_alternate:
        rows["mirrored"] = jax.random.bernoulli(flip_key, shape=(n,))
    if image.pca_noise:
        rows["colour"] = _draw_colours(colour_key, n, image.pca_noise) / jnp.asarray(image.std, jnp.float32)
    if image.erase:
        rows["erased"] = _draw_rectangles(erase_key, n, height, width, image.erase)
    if image.colout:
        batch["rows"] = _draw_some(row_key, height, 1 - image.colout)
        batch["columns"] = _draw_some(column_key, width, 1 - image.colout)
        height, width = batch["rows"].size, batch["columns"].size
    if data.mixup or image.cutmix:
        batch |= _draw_weights(mix_key, height, width, data.mixup, image.cutmix)
    return rows, batch


def augment(images: jax.Array, rows: Mapping[str, jax.Array], batch: Draws, image: ConfigDict) -> jax.Array:
    """Augment and normalise images: uint8 [n, H, W, C] → float32 [n, H', W', C], smaller by ColOut.

    `rows` and `batch` are those of `draw`; `rows` has the n rows of these images: all, or a part of
    the batch, which with mixing begins at an even row and has an even number of them. `image` is
    config.data.image.
    """
    if "corner" in rows:
        images = shift(images, rows["corner"], image.pad, image.pad_mode)
    if "mirrored" in rows:
        images = jnp.where(rows["mirrored"][:, None, None, None], images[:, :, ::-1], images)
    images = normalise(images, image.mean, image.std)
    if "colour" in rows:
        images += rows["colour"][:, None, None]
    if "erased" in rows:
        images = erase(images, rows["erased"])
    if "rows" in batch:
        images = images[:, batch["rows"]][:, :, batch["columns"]]
    if "weight" in batch:
        images = mix(images, batch["weight"])
    return images


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Normalise uint8 [N, H, W, C] → float32, (pixel / 255 − mean) / std per channel."""
    offset = 255.0 * jnp.asarray(mean, jnp.float32)
    scale = 1 / (255.0 * jnp.asarray(std, jnp.float32))
    return (images.astype(jnp.float32) - offset) * scale


def shift(images: jax.Array, corner: jax.Array, pad: int, mode: str) -> jax.Array:
    """Pad images by `pad` pixels and crop them at each `corner`, int [N, 2]: [N, H, W, C] → same.

    The border is "zeros" or "reflect": mirrored at the outermost pixels, which are not repeated.
    """
    border = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    padded = jnp.pad(images, border, mode="reflect" if mode == "reflect" else "constant")

    def crop(image: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*at, 0), images.shape[1:])

    return jax.vmap(crop)(padded, corner)


def _draw_colours(key: jax.Array, n: int, deviation: float) -> jax.Array:
    """Draw shifts, float32 [n, 3], of colours in [0, 1] (Krizhevsky et al. 2012, section 4.1)."""
    alpha = deviation * jax.random.normal(key, (n, 3))
    # Not a matrix product: TPUs and GPUs would round its factors.
    return (jnp.asarray(COLOUR_COMPONENTS) * (alpha * jnp.asarray(COLOUR_DEVIATIONS))[:, None]).sum(-1)


def _draw_rectangles(key: jax.Array, n: int, h: int, w: int, probability: float) -> jax.Array:
    """Draw the rectangles for `erase` in n images h × w: int32 [n, 2, 2], first corner and end.

    The two are equal where nothing is erased. Zhong et al. 2017 with torchvision's numbers: area
    uniform, ratio log-uniform, the first of ten rectangles that fits, if any.
    """
    keys = jax.random.split(key, 4)
    area = h * w * jax.random.uniform(keys[0], (n, 10), minval=ERASED_AREA[0], maxval=ERASED_AREA[1])
    low, high = map(math.log, ERASED_RATIO)
    ratio = jnp.exp(jax.random.uniform(keys[1], (n, 10), minval=low, maxval=high))
    sides = jnp.round(jnp.sqrt(jnp.stack([area * ratio, area / ratio], -1))).astype(jnp.int32)
    limits = jnp.array([h, w])
    fits = (sides < limits).all(-1)
    sides = jnp.take_along_axis(sides, fits.argmax(-1)[:, None, None], 1)[:, 0]
    corner = jax.random.randint(keys[2], (n, 2), 0, jnp.maximum(limits - sides, 0) + 1)
    erased = jax.random.bernoulli(keys[3], probability, (n,)) & fits.any(-1)
    return jnp.stack([corner, corner + sides * erased[:, None]], 1)


def erase(images: jax.Array, rectangles: jax.Array) -> jax.Array:
    """Set normalised images, float [N, H, W, C], to 0 in their rectangles, int [N, 2, 2]."""
    low, high = rectangles[:, 0], rectangles[:, 1]
    inside = jax.vmap(_rectangle, (0, 0, None, None))(low, high, *images.shape[1:3])
    return jnp.where(inside[..., None], 0.0, images)


def _draw_some(key: jax.Array, count: int, share: float) -> jax.Array:
    """Draw a share of 0 … count − 1, rounded down as in Composer's ColOut, in order: int32."""
    return jnp.sort(jax.random.permutation(key, count)[: max(1, int(share * count))])


def _draw_weights(key: jax.Array, h: int, w: int, mixup: float, cutmix: float) -> Draws:
    """Draw "weight", for `mix`, of images h × w, and "kept", its mean: float32.

    `mixup` (Zhang et al. 2017) and `cutmix` (Yun et al. 2019) are their α, 0 for never; with both,
    each batch has either with probability ½. A batch has one weight, from Beta(α, α); CutMix makes
    it 1 for an image's own pixels and 0 for its partner's.
    """
    choice_key, mixup_key, cutmix_key, centre_key = jax.random.split(key, 4)
    weight = kept = jnp.ones(())
    if mixup:
        weight = kept = jax.random.beta(mixup_key, mixup, mixup)
    if cutmix:
        sides = jnp.array([h, w])
        share = 1 - jax.random.beta(cutmix_key, cutmix, cutmix)
        half = (0.5 * jnp.sqrt(share) * sides).astype(jnp.int32)
        centre = jax.random.randint(centre_key, (2,), 0, sides)
        outside = 1.0 - _rectangle(centre - half, centre + half, h, w)[..., None]
        cuts = jax.random.bernoulli(choice_key) if mixup else True
        weight = jnp.where(cuts, outside, weight)
        kept = jnp.where(cuts, outside.mean(), kept)
    return {"weight": weight, "kept": kept}


def _rectangle(low: jax.Array, high: jax.Array, height: int, width: int) -> jax.Array:
    """Mark pixels from corner `low` to before `high`, each (row, column): bool [height, width]."""
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    return (rows >= low[0]) & (rows < high[0]) & (columns >= low[1]) & (columns < high[1])
