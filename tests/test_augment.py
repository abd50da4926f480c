"""What is done to pixels on the device, against numpy."""

import jax
import numpy as np
import pytest

from jax_resnet.data.device import augment, normalise, random_flip, random_shift


def distinct_images(n: int, height: int, width: int, channels: int = 2) -> np.ndarray:
    """Random pixels, none of them 0, so that each shift and the mirror of an image look different."""
    return np.random.default_rng(n).integers(1, 256, (n, height, width, channels), dtype=np.uint8)


def all_shifts(image: np.ndarray, pad: int) -> list[bytes]:
    height, width, _ = image.shape
    padded = np.zeros((height + 2 * pad, width + 2 * pad, image.shape[2]), np.uint8)
    padded[pad : pad + height, pad : pad + width] = image
    corners = [(top, left) for top in range(2 * pad + 1) for left in range(2 * pad + 1)]
    return [padded[top : top + height, left : left + width].tobytes() for top, left in corners]


def test_normalise_is_pixels_less_mean_over_deviation():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found = normalise(images, mean, std)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (images / 255.0 - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pad", [1, 2])
def test_shift_gives_every_cut_of_the_zero_padded_image_and_nothing_else(pad):
    images = distinct_images(600, 6, 5)
    shifted = np.asarray(random_shift(images, jax.random.key(0), pad))
    assert shifted.dtype == np.uint8
    found = [all_shifts(image, pad).index(out.tobytes()) for image, out in zip(images, shifted, strict=True)]
    share = 1 / (2 * pad + 1) ** 2
    counts = np.bincount(found, minlength=(2 * pad + 1) ** 2)
    assert counts.min() > 0
    assert np.all(np.abs(counts - 600 * share) < 5 * np.sqrt(600 * share))


def test_flip_mirrors_about_half_of_the_images_and_leaves_the_others():
    images = distinct_images(400, 4, 5)
    flipped = np.asarray(random_flip(images, jax.random.key(0)))
    same = (flipped == images).all((1, 2, 3))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert np.all(same ^ mirrored)
    assert abs(mirrored.sum() - 200) < 5 * np.sqrt(400 / 4)


def test_augment_shifts_and_flips_independently():
    images = distinct_images(400, 4, 4)
    out = np.asarray(augment(images, jax.random.key(1), pad=1, flip=True))
    cases = set()
    for image, pixels in zip(images, out, strict=True):
        mirror = pixels[:, ::-1].tobytes()
        shifts = all_shifts(image, 1)
        flipped = pixels.tobytes() not in shifts
        cases.add((flipped, shifts.index(mirror if flipped else pixels.tobytes())))
    assert len(cases) == 2 * 9


@pytest.mark.parametrize(("pad", "flip"), [(0, True), (2, False), (2, True)])
def test_augment_is_a_function_of_its_key(pad, flip):
    images = distinct_images(20, 4, 4)

    def pixels(seed):
        return np.asarray(augment(images, jax.random.key(seed), pad=pad, flip=flip)).tobytes()

    assert pixels(0) == pixels(0)
    assert len({pixels(seed) for seed in range(5)}) == 5


def test_augment_without_pad_and_flip_changes_nothing():
    images = distinct_images(3, 4, 4)
    np.testing.assert_array_equal(augment(images, jax.random.key(0), pad=0, flip=False), images)


def test_without_flip_nothing_is_mirrored():
    images = distinct_images(50, 4, 4)
    out = np.asarray(augment(images, jax.random.key(2), pad=1, flip=False))
    assert all(pixels.tobytes() in all_shifts(image, 1) for image, pixels in zip(images, out, strict=True))


def test_augment_traced_equals_augment():
    images, key = distinct_images(20, 4, 4), jax.random.key(3)
    traced = jax.jit(lambda x, k: augment(x, k, pad=2, flip=True))(images, key)
    np.testing.assert_array_equal(traced, augment(images, key, pad=2, flip=True))
