"""What is done to pixels on the device, inside the jitted step: shift, flip, normalise, erase, mix."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 [N, H, W, C] → float32, (pixel / 255 − mean) / std per channel."""
    offset, scale = 255.0 * jnp.asarray(mean, jnp.float32), 1 / (255.0 * jnp.asarray(std, jnp.float32))
    return (images.astype(jnp.float32) - offset) * scale


def random_shift(images: jax.Array, key: jax.Array, pad: int) -> jax.Array:
    """Each image shifted by −pad … pad pixels on either axis, zeros beyond its border. [N, H, W, C] → same."""
    n, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corner = jax.random.randint(key, (n, 2), 0, 2 * pad + 1)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (h, w, c)))(padded, corner)


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Each image mirrored left to right with probability ½. [N, H, W, C] → same."""
    flips = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(flips, images[:, :, ::-1], images)


def augment(images: jax.Array, key: jax.Array, *, pad: int, flip: bool) -> jax.Array:
    """Random shift (for pad > 0), then flip. uint8 [N, H, W, C] → same."""
    shift_key, flip_key = jax.random.split(key)
    if pad:
        images = random_shift(images, shift_key, pad)
    return random_flip(images, flip_key) if flip else images


ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)  # shares of the image; heights over widths


def random_erase(images: jax.Array, key: jax.Array, probability: float) -> jax.Array:
    """A random rectangle of an image set to 0, with that probability. Float [N, H, W, C] → same.

    Zhong et al. 2017 with torchvision's numbers: area uniform, ratio log-uniform, the first of ten rectangles that
    fits, if any. Of normalised images 0 is the mean colour.
    """
    n, h, w, _ = images.shape
    keys = jax.random.split(key, 4)
    area = h * w * jax.random.uniform(keys[0], (n, 10), minval=ERASED_AREA[0], maxval=ERASED_AREA[1])
    low, high = map(math.log, ERASED_RATIO)
    ratio = jnp.exp(jax.random.uniform(keys[1], (n, 10), minval=low, maxval=high))
    sides = jnp.round(jnp.sqrt(jnp.stack([area * ratio, area / ratio], -1))).astype(jnp.int32)
    whole = jnp.array([h, w])
    fits = (sides < whole).all(-1)
    sides = jnp.take_along_axis(sides, fits.argmax(-1)[:, None, None], 1)[:, 0]
    corner = jax.random.randint(keys[2], (n, 2), 0, jnp.maximum(whole - sides, 0) + 1)
    erased = jax.random.bernoulli(keys[3], probability, (n,)) & fits.any(-1)
    inside = jax.vmap(_rectangle, (0, 0, None, None))(corner, corner + sides, h, w)
    return jnp.where((inside & erased[:, None, None])[..., None], 0.0, images)


def mix(images: jax.Array, key: jax.Array, *, mixup: float, cutmix: float) -> tuple[jax.Array, jax.Array]:
    """Each image mixed with its partner's: float [N, H, W, C] → same, and the float32 weight that it keeps itself.

    `mixup` (Zhang et al. 2017) and `cutmix` (Yun et al. 2019) are their α, 0 for never; of both, each batch has one,
    with probability ½. The weight, one for the batch, is drawn from Beta(α, α); CutMix's then becomes the very share of
    pixels that are left. `mix_labels` mixes the labels.
    """
    h, w = images.shape[1:3]
    choice_key, mixup_key, cutmix_key, centre_key = jax.random.split(key, 4)
    weight = kept = jnp.ones(())
    if mixup:
        weight = kept = jax.random.beta(mixup_key, mixup, mixup)
    if cutmix:
        whole = jnp.array([h, w])
        share = 1 - jax.random.beta(cutmix_key, cutmix, cutmix)
        half = (0.5 * jnp.sqrt(share) * whole).astype(jnp.int32)
        centre = jax.random.randint(centre_key, (2,), 0, whole)
        outside = 1.0 - _rectangle(centre - half, centre + half, h, w)[..., None]
        cuts = jax.random.bernoulli(choice_key) if mixup else True
        weight, kept = jnp.where(cuts, outside, weight), jnp.where(cuts, outside.mean(), kept)
    return weight * images + (1 - weight) * _partners(images), kept


def mix_labels(labels: jax.Array, kept: jax.Array, num_classes: int) -> jax.Array:
    """int [N] → the targets of mixed images, float32 [N, num_classes]: `kept` for the label, the rest the partner's."""
    targets = jax.nn.one_hot(labels, num_classes)
    return kept * targets + (1 - kept) * _partners(targets)


def _partners(rows: jax.Array) -> jax.Array:
    """Rows 0 and 1 change places, 2 and 3, and so on: [N, …] → same, N even.

    Batches are shuffled, so a neighbour is as good as any, and it is on the same device when that has an even number
    of rows: nothing is sent. Which rows are mixed never depends on the devices.
    """
    return rows.reshape(-1, 2, *rows.shape[1:])[:, ::-1].reshape(rows.shape)


def _rectangle(low: jax.Array, high: jax.Array, height: int, width: int) -> jax.Array:
    """bool [height, width]: whether a pixel is at or after the corner `low` and before `high`, both (row, column)."""
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    return (rows >= low[0]) & (rows < high[0]) & (columns >= low[1]) & (columns < high[1])
