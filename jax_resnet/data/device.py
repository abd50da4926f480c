"""What is done to pixels on the device, inside the jitted step: shift, flip, normalise."""

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
