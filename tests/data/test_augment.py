"""What is done to pixels on the device, against numpy."""

import math
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from conftest import ROOT, main_env
from ml_collections import ConfigDict
from tiny import data_config

from jax_resnet.config import default
from jax_resnet.data.image.device import augment, draw, erase, normalise
from jax_resnet.data.inputs import mix
from jax_resnet.training.tasks import OneLabel


def distinct_images(n: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Random pixels, none of them 0, so that each shift and the mirror of an image look different."""
    return np.random.default_rng(n).integers(1, 256, (n, height, width, channels), dtype=np.uint8)


def all_shifts(image: np.ndarray, pad: int, mode: str = "zeros") -> list[bytes]:
    height, width, _ = image.shape
    padded = np.zeros((height + 2 * pad, width + 2 * pad, image.shape[2]), np.uint8)
    padded[pad : pad + height, pad : pad + width] = image
    if mode == "reflect":
        for i in range(pad):
            padded[i], padded[-1 - i] = padded[2 * pad - i], padded[-1 - 2 * pad + i]
        for i in range(pad):
            padded[:, i], padded[:, -1 - i] = padded[:, 2 * pad - i], padded[:, -1 - 2 * pad + i]
    corners = [(top, left) for top in range(2 * pad + 1) for left in range(2 * pad + 1)]
    return [padded[top : top + height, left : left + width].tobytes() for top, left in corners]


def test_normalise_is_pixels_less_mean_over_deviation():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found = normalise(images, mean, std)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (images / 255.0 - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-6)


def asked_for(**changes: Any) -> ConfigDict:
    """config.data with pixels left as they are, but for what `changes` says."""
    return data_config(**{"crop": "none", "flip": False, "mean": (0.0,) * 3, "std": (1 / 255,) * 3} | changes)


@lru_cache
def compiled(**changes: Any) -> Callable[..., jax.Array]:
    """What the step makes of images uint8, by a key."""
    data = asked_for(**changes)
    return jax.jit(lambda images, key: augment(images, *draw(key, images.shape, data), data.image))


def augmented(images: np.ndarray, seed: int = 0, **changes: Any) -> np.ndarray:
    out = compiled(**changes)(images, jax.random.key(seed))
    assert out.dtype == np.float32
    return np.asarray(out)


def pixels(images: np.ndarray, seed: int = 0, **changes: Any) -> np.ndarray:
    """The same as uint8, for what only moves pixels."""
    out = augmented(images, seed, **changes)
    np.testing.assert_allclose(out, out.round(), atol=1e-3)
    return out.round().astype(np.uint8)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("pad", [1, 2])
def test_shift_gives_every_cut_of_the_padded_image_and_nothing_else(pad, mode):
    images = distinct_images(600, 6, 5)
    shifted = pixels(images, crop="pad", pad=pad, pad_mode=mode)
    found = [all_shifts(image, pad, mode).index(out.tobytes()) for image, out in zip(images, shifted, strict=True)]
    share = 1 / (2 * pad + 1) ** 2
    counts = np.bincount(found, minlength=(2 * pad + 1) ** 2)
    assert counts.min() > 0
    assert np.all(np.abs(counts - 600 * share) < 5 * np.sqrt(600 * share))


def test_flip_mirrors_about_half_of_the_images_and_leaves_the_others():
    images = distinct_images(400, 4, 5)
    flipped = pixels(images, flip=True)
    same = (flipped == images).all((1, 2, 3))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert np.all(same ^ mirrored)
    assert abs(mirrored.sum() - 200) < 5 * np.sqrt(400 / 4)


def test_augment_shifts_and_flips_independently():
    images = distinct_images(400, 4, 4)
    cases = set()
    for image, out in zip(images, pixels(images, 1, crop="pad", pad=1, flip=True), strict=True):
        shifts = all_shifts(image, 1)
        flipped = out.tobytes() not in shifts
        cases.add((flipped, shifts.index((out[:, ::-1] if flipped else out).tobytes())))
    assert len(cases) == 2 * 9


def test_with_alternating_flip_the_batch_says_which_are_mirrored():
    images, data = distinct_images(6, 4, 5), asked_for(flip=True, flip_alternate=True)
    rows, batch = draw(jax.random.key(0), images.shape, data)
    assert not rows
    assert not batch
    mirrored = np.array([True, False, False, True, True, False])
    out = np.asarray(augment(images, {"mirrored": mirrored}, {}, data.image)).round()
    np.testing.assert_array_equal(out, np.where(mirrored[:, None, None, None], images[:, :, ::-1], images))


EVERYTHING = {"crop": "pad", "pad": 2, "pad_mode": "reflect", "flip": True, "pca_noise": 0.1, "colout": 0.2,
              "erase": 0.5, "mixup": 0.2, "cutmix": 1.0}  # fmt: skip


@pytest.mark.parametrize("changes", [{"flip": True}, {"crop": "pad"}, EVERYTHING], ids=["flip", "pad", "all"])
def test_augment_is_a_function_of_its_key(changes):
    images = distinct_images(20, 10, 10)
    first, *others = (augmented(images, seed, **changes).tobytes() for seed in (0, 0, 1, 2, 3))
    assert others[0] == first
    assert len({first, *others}) == 4


def test_what_is_not_asked_for_is_not_in_the_program():
    images = distinct_images(3, 4, 4)
    np.testing.assert_array_equal(pixels(images), images)
    key, data = jax.random.key(0), asked_for()
    assert draw(key, images.shape, data) == ({}, {})
    program, plain = (
        str(jax.make_jaxpr(f)(images))
        for f in (lambda x: augment(x, {}, {}, data.image), lambda x: normalise(x, data.image.mean, data.image.std))
    )
    assert program == plain


def test_parts_of_a_batch_are_augmented_to_the_very_pixels_of_the_whole():
    data = asked_for(**EVERYTHING, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    images, weights = distinct_images(16, 12, 10), set()
    drawing = jax.jit(lambda key: draw(key, images.shape, data))
    augmenting = jax.jit(lambda images, rows, batch: augment(images, rows, batch, data.image))
    for seed in range(6):
        rows, batch = drawing(jax.random.key(seed))
        assert set(rows) == {"corner", "mirrored", "colour", "erased"}
        assert all(len(of_rows) == 16 for of_rows in rows.values())
        weights.add(len(np.unique(batch["weight"])))
        whole = augmenting(images, rows, batch)
        assert whole.shape == (16, 9, 8, 3)
        for part in np.split(np.arange(16), 4):
            of_part = {name: of_rows[part] for name, of_rows in rows.items()}
            np.testing.assert_array_equal(augmenting(images[part], of_part, batch), whole[part])
    assert weights == {1, 2}  # mixup's and CutMix's


# ---- colours ---------------------------------------------------------------------------------------------------------


def test_pca_noise_shifts_an_image_by_a_colour_of_the_published_covariance():
    grey = np.full((4000, 3, 2, 3), 100, np.uint8)
    std = np.array((0.2, 0.3, 0.4))
    shifted = augmented(grey, pca_noise=0.1, mean=(0.4, 0.5, 0.6), std=tuple(std))
    noise = (shifted * std + np.array((0.4, 0.5, 0.6)) - 100 / 255).astype(np.float64)
    np.testing.assert_allclose(noise, noise[:, :1, :1].repeat(3, 1).repeat(2, 2), atol=1e-6)  # one colour an image
    # fb.resnet.torch's numbers. Along each component the deviation is 0.1 times its eigenvalue, and that is all.
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    along = noise[:, 0, 0] @ vectors
    np.testing.assert_allclose(along.std(0), 0.1 * values, rtol=5 / math.sqrt(2 * 4000), atol=1e-5)
    assert np.all(np.abs(along.mean(0)) < 5 * 0.1 * values / math.sqrt(4000) + 1e-5)
    assert np.all(np.abs(np.corrcoef(along.T) - np.eye(3)) < 0.1)


# ---- ColOut ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "height", "width"), [(0.15, 10, 13), (0.05, 224, 7), (0.5, 1, 2), (0.9, 4, 20)])
def test_colout_keeps_the_same_rows_and_columns_of_all_images_in_order(share, height, width):
    lines, across = np.mgrid[:height, :width].astype(np.uint8)
    images = np.broadcast_to(np.stack([lines, across, lines], -1), (2, height, width, 3))
    # As Composer counts them: int((1 - p_row) * row_size), but one at least.
    kept = [max(1, int((1 - share) * side)) for side in (height, width)]
    seen = set()
    for seed in range(20):
        out = pixels(images, seed, colout=share)
        assert out.shape == (2, *kept, 3)
        np.testing.assert_array_equal(out[0], out[1])
        rows, columns = out[0, :, 0, 0], out[0, 0, :, 1]
        assert np.all(np.diff(rows.astype(int)) > 0)
        assert np.all(np.diff(columns.astype(int)) > 0)
        np.testing.assert_array_equal(out[0, ..., 0], np.broadcast_to(rows[:, None], kept))
        np.testing.assert_array_equal(out[0, ..., 1], np.broadcast_to(columns, kept))
        seen |= set(columns.tolist())
    assert len(seen) > kept[1]


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


@lru_cache
def erasing(probability: float) -> Callable[..., jax.Array]:
    data = asked_for(erase=probability)
    return jax.jit(lambda images, key: erase(images, draw(key, images.shape, data)[0]["erased"]))


def erased(images: np.ndarray, probability: float, seed: int = 0) -> np.ndarray:
    """The rectangles that were set to 0; everything else must be as it was."""
    out = np.asarray(erasing(probability)(images, jax.random.key(seed)))
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
    out = augmented(np.full((1, 8, 8, 3), 9, np.uint8), mean=mean, std=std, erase=1.0)
    colours = np.unique(np.asarray(out * jnp.array(std) + jnp.array(mean)).round(5).reshape(-1, 3), axis=0)
    np.testing.assert_allclose(colours, [[9 / 255] * 3, mean], atol=1e-5)


def test_an_image_without_room_is_not_erased():
    assert not erased(some_images(30, 1, 9), 1.0).any()


# ---- mixing ----------------------------------------------------------------------------------------------------------


def partners(rows: np.ndarray) -> np.ndarray:
    return rows[np.arange(len(rows)) ^ 1]


def many_mixes(images: np.ndarray, times: int, **alphas: float) -> tuple[np.ndarray, np.ndarray]:
    """Mixed images [times, N, H, W, C] and kept weights [times], of as many keys."""
    keys = jax.random.split(jax.random.key(7), times)

    def mixing(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch = draw(key, images.shape, asked_for(**alphas))[1]
        return mix(images, batch["weight"]), batch["kept"]

    mixed, kept = jax.jit(jax.vmap(mixing))(keys)
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
    targets = np.asarray(OneLabel(default().loss, 3).targets({"label": jnp.array([2, 0, 1, 1])}, jnp.float32(kept)))
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets, [[1 - kept, 0, kept], [kept, 0, 1 - kept], [0, 1, 0], [0, 1, 0]], atol=1e-7)


DEVICES = """
import re, jax, jax.numpy as jnp, numpy as np
from jax_resnet.runtime.mesh import batch_sharding, data_mesh, replicated
from jax_resnet.config import default
from jax_resnet.data.image.device import augment, draw
from jax_resnet.data.inputs import mix
mesh = data_mesh()
sharded, whole = batch_sharding(mesh), replicated(mesh)
data = default().data
data.mixup = 0.2
data.image.update(crop="pad", pad=2, pad_mode="reflect", pca_noise=0.1, colout=0.2, erase=0.5, cutmix=1.0)
def mixed(images, labels, seed):
    rows, batch = draw(jax.random.key(seed), images.shape, data)
    return augment(images, rows, batch, data.image), mix(jax.nn.one_hot(labels, 10), batch["kept"])
one = jax.jit(mixed)
several = jax.jit(mixed, in_shardings=(sharded, sharded, whole), out_shardings=sharded)
for rows in (16, 8):
    images = np.random.default_rng(0).integers(0, 256, (rows, 12, 10, 3), dtype=np.uint8)
    labels = np.arange(rows, dtype=np.int32) % 10
    for seed in range(8):  # some of them mixup, some CutMix
        for a, b in zip(several(images, labels, seed), one(images, labels, seed)):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # one may fuse a multiply-add, the other not
    text = several.lower(images, labels, 0).compile().as_text()
    collectives = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    print(*set(re.findall(f"({collectives})(?:-start)?[(]", text)))
"""


def test_eight_devices_mix_and_erase_as_one_and_send_nothing_that_lies_side_by_side():
    done = programs.run([sys.executable, "-c", DEVICES], env=main_env(8), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["", "collective-permute"]  # two rows a device; one, whose partner is elsewhere
