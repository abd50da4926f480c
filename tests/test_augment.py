"""What is done to pixels on the device, against numpy."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, main_env

from jax_resnet.data.device import augment, mix, mix_labels, normalise, random_erase, random_flip, random_shift


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


# ---- erasing ---------------------------------------------------------------------------------------------------------


def rectangles(changed: np.ndarray) -> np.ndarray:
    """top, left, height, width of the rectangle in which bool [N, H, W] holds; nowhere else may it."""
    found = []
    for mask in changed:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not rows.size:
            found.append((0, 0, 0, 0))
            continue
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()
        assert mask.sum() == box.size
        found.append((rows[0], columns[0], *box.shape))
    return np.array(found)


def erased(images: np.ndarray, probability: float, seed: int = 0) -> np.ndarray:
    """The rectangles that were set to 0; everything else must be as it was."""
    out = np.asarray(jax.jit(random_erase, static_argnums=2)(images, jax.random.key(seed), probability))
    assert out.dtype == np.float32
    zero = (out == 0).all(-1)
    np.testing.assert_array_equal(out[~zero], images[~zero])
    return rectangles(zero)


def some_images(n: int, height: int, width: int, channels: int = 1) -> np.ndarray:
    """float32, all pixels different from each other and from 0."""
    return np.arange(1, n * height * width * channels + 1, dtype=np.float32).reshape(n, height, width, channels)


def torchvision_erasing(height: int, width: int, times: int) -> np.ndarray:
    """height and width of what torchvision's RandomErasing cuts: its loop, in numpy."""
    rng, found = np.random.default_rng(0), []
    while len(found) < times:
        area = height * width * rng.uniform(0.02, 0.33)
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            found.append((h, w))
    return np.array(found)


def assert_same_mean(a: np.ndarray, b: np.ndarray) -> None:
    """Of two samples, within five standard errors."""
    assert abs(a.mean() - b.mean()) < 5 * math.sqrt(a.var() / len(a) + b.var() / len(b))


def test_erased_rectangles_have_the_areas_and_ratios_of_torchvision():
    top, left, h, w = erased(some_images(3000, 40, 24), 1.0).T
    assert h.min() > 0
    share, ratio = h * w / (40 * 24), h / w
    assert 0.015 < share.min() < 0.03  # 0.02, but for whole pixels
    assert 0.30 < share.max() < 0.345
    assert ((h + 0.5) / (w - 0.5)).min() >= 0.3
    assert ((h - 0.5) / (w + 0.5)).max() <= 3.3
    expected = torchvision_erasing(40, 24, 20_000)
    for found, theirs in (
        (share, expected.prod(1) / (40 * 24)),
        (np.log(ratio), np.log(expected[:, 0] / expected[:, 1])),
    ):
        assert_same_mean(found, theirs)
        assert_same_mean((found - theirs.mean()) ** 2, (theirs - theirs.mean()) ** 2)
    for start, room in ((top, 40 - h), (left, 24 - w)):  # anywhere it fits, as often
        assert start.min() == 0
        assert (start == room).any()
        assert abs((start / room).mean() - 0.5) < 5 * np.std(start / room) / math.sqrt(len(start))


@pytest.mark.parametrize("probability", [0.25, 0.9])
def test_erasing_has_its_probability(probability):
    count = (erased(some_images(2000, 12, 12, 3), probability)[:, 2] > 0).sum()
    assert abs(count - 2000 * probability) < 5 * math.sqrt(2000 * probability * (1 - probability))


def test_erasing_is_a_function_of_its_key_and_gives_the_mean_colour():
    images = some_images(20, 12, 12)
    assert erased(images, 1.0, 1).tobytes() == erased(images, 1.0, 1).tobytes()
    assert erased(images, 1.0, 1).tobytes() != erased(images, 1.0, 2).tobytes()
    mean, std = (0.5, 0.25, 0.1), (0.2, 0.3, 0.4)
    out = random_erase(normalise(np.full((1, 8, 8, 3), 9, np.uint8), mean, std), jax.random.key(0), 1.0)
    colours = np.unique(np.asarray(out * jnp.array(std) + jnp.array(mean)).round(5).reshape(-1, 3), axis=0)
    np.testing.assert_allclose(colours, [[9 / 255] * 3, mean], atol=1e-5)


def test_an_image_without_room_is_not_erased():
    images = some_images(30, 1, 9)
    np.testing.assert_array_equal(random_erase(images, jax.random.key(0), 1.0), images)


# ---- mixing ----------------------------------------------------------------------------------------------------------


def partners(rows: np.ndarray) -> np.ndarray:
    return rows[np.arange(len(rows)) ^ 1]


def many_mixes(images: np.ndarray, times: int, **alphas: float) -> tuple[np.ndarray, np.ndarray]:
    """Mixed images [times, N, H, W, C] and kept weights [times], of as many keys."""
    keys = jax.random.split(jax.random.key(7), times)
    mixed, kept = jax.jit(jax.vmap(lambda key: mix(images, key, **alphas)))(keys)
    assert (mixed.dtype, kept.dtype) == (np.float32, np.float32)
    return np.asarray(mixed), np.asarray(kept)


def pasted(images: np.ndarray, mixed: np.ndarray) -> np.ndarray:
    """Which pixels are the partner's, bool [times, H, W]: the same of all images, and the rest is as it was."""
    own, other = mixed == images, mixed == partners(images)
    assert np.all(own ^ other)
    assert np.all(other == other[:, :1, :, :, :1])
    return other[:, 0, :, :, 0]


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_is_the_weighted_mean_of_two_images_with_a_beta_weight(alpha):
    images = np.random.default_rng(0).normal(size=(6, 3, 4, 2)).astype(np.float32)
    mixed, kept = many_mixes(images, 3000, mixup=alpha, cutmix=0.0)
    weight = kept[:, None, None, None, None]
    np.testing.assert_allclose(mixed, weight * images + (1 - weight) * partners(images), atol=1e-6)
    theirs = np.random.default_rng(0).beta(alpha, alpha, 30_000)
    assert_same_mean(kept, theirs)
    assert_same_mean((kept - 0.5) ** 2, (theirs - 0.5) ** 2)


def torchvision_cutmix(height: int, width: int, alpha: float, times: int) -> np.ndarray:
    """The share left by torchvision's CutMix, in numpy."""
    rng, left = np.random.default_rng(0), []
    for lam in rng.beta(alpha, alpha, times):
        x, y, r = rng.integers(width), rng.integers(height), 0.5 * math.sqrt(1 - lam)
        dx, dy = int(r * width), int(r * height)
        area = (min(x + dx, width) - max(x - dx, 0)) * (min(y + dy, height) - max(y - dy, 0))
        left.append(1 - area / (width * height))
    return np.array(left)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_cutmix_pastes_one_rectangle_and_keeps_the_share_of_pixels_that_is_left(alpha):
    images = some_images(4, 20, 12, 3)
    mixed, kept = many_mixes(images, 3000, mixup=0.0, cutmix=alpha)
    boxes = pasted(images, mixed)
    np.testing.assert_array_equal(np.round(kept * 240), (~boxes).sum((1, 2)))
    np.testing.assert_allclose(kept, 1 - boxes.mean((1, 2)), atol=2e-7)
    top, left, h, w = rectangles(boxes).T
    theirs = torchvision_cutmix(20, 12, alpha, 20_000)
    assert_same_mean(kept, theirs)
    assert_same_mean((kept - theirs.mean()) ** 2, (theirs - theirs.mean()) ** 2)
    free = (h > 0) & (top > 0) & (left > 0) & (top + h < 20) & (left + w < 12)
    assert free.sum() > 300
    assert np.all(np.abs(h / 20 - w / 12)[free] < 2 / 12)  # as tall as wide, for the image


def test_both_take_turns_at_random():
    images = some_images(2, 6, 6)
    mixed, kept = many_mixes(images, 1000, mixup=1.0, cutmix=1.0)
    copied = ((mixed == images) | (mixed == partners(images))).all((1, 2, 3, 4))
    assert abs(copied.sum() - 500) < 5 * math.sqrt(1000 / 4)
    pasted(images, mixed[copied])
    weight = kept[~copied, None, None, None, None]
    np.testing.assert_allclose(mixed[~copied], weight * images + (1 - weight) * partners(images), rtol=1e-5)
    assert_same_mean(kept[~copied], np.random.default_rng(0).uniform(size=30_000))


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_mixed_labels_are_those_of_the_pair_by_weight(kept):
    targets = np.asarray(mix_labels(jnp.array([2, 0, 1, 1]), jnp.float32(kept), 3))
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets, [[1 - kept, 0, kept], [kept, 0, 1 - kept], [0, 1, 0], [0, 1, 0]], atol=1e-7)


DEVICES = """
import re, jax, jax.numpy as jnp, numpy as np
from jax_resnet import parallel
from jax_resnet.data.device import mix, mix_labels, random_erase
mesh = parallel.data_mesh()
sharded, whole = parallel.batch_sharding(mesh), parallel.replicated(mesh)
def mixed(images, labels, seed):
    erase_key, mix_key = jax.random.split(jax.random.key(seed))
    images, kept = mix(random_erase(images, erase_key, 0.5), mix_key, mixup=0.2, cutmix=1.0)
    return images, mix_labels(labels, kept, 10)
one = jax.jit(mixed)
several = jax.jit(mixed, in_shardings=(sharded, sharded, whole), out_shardings=sharded)
for rows in (16, 8):
    images = np.random.default_rng(0).normal(size=(rows, 12, 10, 3)).astype(np.float32)
    labels = np.arange(rows, dtype=np.int32) % 10
    for seed in range(8):  # some of them mixup, some CutMix
        for a, b in zip(several(images, labels, seed), one(images, labels, seed)):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # one may fuse a multiply-add, the other not
    text = several.lower(images, labels, 0).compile().as_text()
    collectives = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    print(*set(re.findall(f"({collectives})(?:-start)?[(]", text)))
"""


def test_eight_devices_mix_and_erase_as_one_and_send_nothing_that_lies_side_by_side():
    done = subprocess.run([sys.executable, "-c", DEVICES], env=main_env(8), cwd=ROOT,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["", "collective-permute"]  # two rows a device; one, whose partner is elsewhere
