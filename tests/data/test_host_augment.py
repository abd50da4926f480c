"""The host's augmentations, pixel by pixel against Pillow; what they draw, against the papers."""

import colorsys
import importlib
import math
import sys
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from jax_resnet.config import default, from_json, to_json, validate
from jax_resnet.data.image import augment as module
from jax_resnet.data.image.augment import (
    LEVELS,
    OPERATIONS,
    TIMM_OPERATIONS,
    Augmentation,
    apply,
    augment,
    magnitude,
    timm_magnitude,
)
from jax_resnet.errors import UserError

NOTHING = Augmentation.of(default().data.image)
GEOMETRY = ("ShearX", "ShearY", "Rotate")


def picture(height: int, width: int, channels: int) -> np.ndarray:
    """Soft shades with noise, not over the whole range of grey; read-only, as images in memory may be."""
    rng = np.random.default_rng(height)
    shades = cv2.resize(rng.uniform(40, 190, (5, 6, channels)), (width, height)).reshape(height, width, channels)
    image = np.clip(shades + rng.normal(0, 10, shades.shape), 7, 240).astype(np.uint8)
    image.setflags(write=False)
    return image


def noise(height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def few_levels(height: int, width: int, channels: int) -> np.ndarray:
    """One shade in the first channel, two in the others: nothing to stretch, nothing to equalise."""
    image = np.full((height, width, channels), 90, np.uint8)
    image[: height // 3, :, 1:] = 91
    return image


IMAGES = [make(h, w, c) for make in (picture, noise, few_levels) for h, w in ((24, 31), (17, 16)) for c in (3, 1)]


def pillow(
    image: np.ndarray,
    name: str,
    value: float,
    resample: int = Image.Resampling.NEAREST,
    fill: tuple[int, ...] | None = None,
) -> np.ndarray:
    """What torchvision, and timm, call for a PIL image, with their sign conventions."""
    given = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    fill = fill and fill[: image.shape[-1]]

    def affine(*matrix: float) -> Image.Image:
        return given.transform(given.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)

    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        out = getattr(ImageEnhance, name)(given).enhance(1 + value)
    elif name in ("AutoContrast", "Equalize"):
        out = getattr(ImageOps, name.lower())(given)
    else:
        out = {
            "Identity": lambda: given,
            "ShearX": lambda: affine(1, value, 0, 0, 1, 0),
            "ShearY": lambda: affine(1, 0, 0, value, 1, 0),
            "TranslateX": lambda: affine(1, 0, -int(value), 0, 1, 0),
            "TranslateY": lambda: affine(1, 0, 0, 0, 1, -int(value)),
            "TranslateXRel": lambda: affine(1, 0, value * given.width, 0, 1, 0),
            "TranslateYRel": lambda: affine(1, 0, 0, 0, 1, value * given.height),
            "Rotate": lambda: given.rotate(value, resample, fillcolor=fill),
            "Invert": lambda: ImageOps.invert(given),
            "SolarizeAdd": lambda: given.point([min(i + value, 255) if i < 128 else i for i in range(256)] * len(fill)),
            # Pillow 13 refuses to keep 0 bits; those before keep none.
            "Posterize": lambda: ImageOps.posterize(given, int(value)) if value else given.point(lambda _: 0),
            "Solarize": lambda: ImageOps.solarize(given, value),
        }[name]()
    return np.asarray(out).reshape(image.shape)


def magnitudes(name: str, height: int, width: int) -> set[float]:
    """Every one that RandAugment and TrivialAugment can draw."""
    found = {magnitude(name, level, wide, height, width) for level in range(LEVELS) for wide in (False, True)}
    return found | ({-value for value in found} if OPERATIONS[name][2] else set())


def timm_magnitudes(name: str) -> set[float]:
    """Of every half level that timm's RandAugment can draw."""
    found = {timm_magnitude(name, half / 2) for half in range(21)}
    return found | ({-value for value in found} if TIMM_OPERATIONS[name][1] else set())


# ---- what an operation does ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "Color"])
def test_equals_pillow_at_every_magnitude(name):
    for image in IMAGES:
        for value in magnitudes(name, *image.shape[:2]):
            found = apply(image, name, value)
            assert (found.shape, found.dtype) == (image.shape, np.uint8)
            np.testing.assert_array_equal(found, pillow(image, name, value), f"{name} {value} {image.shape}")


FILL = (124, 116, 104)


@pytest.mark.parametrize("name", [name for name in TIMM_OPERATIONS if name != "Color"])
def test_timms_equal_pillow_too_with_the_mean_colour_from_beyond_the_image(name):
    for image in IMAGES:
        fill = FILL[: image.shape[-1]]
        for value in timm_magnitudes(name):
            found, expected = apply(image, name, value, fill=fill), pillow(image, name, value, fill=fill)
            np.testing.assert_array_equal(found, expected, f"{name} {value} {image.shape}")


def test_color_is_within_one_grey_level_of_pillow_and_seldom_not_the_same():
    differ = []
    for image in IMAGES:
        for value in magnitudes("Color", *image.shape[:2]):
            gap = np.abs(apply(image, "Color", value).astype(int) - pillow(image, "Color", value))
            assert gap.max() <= 1
            differ.append((gap > 0).mean())
    assert np.mean(differ) < 1e-3  # OpenCV's grey has 15 bits, Pillow's 16


@pytest.mark.parametrize("name", [*GEOMETRY, "TranslateXRel", "TranslateYRel"])
def test_bilinear_is_within_one_grey_level_of_pillow_but_for_the_rim(name):
    rows, columns = np.mgrid[:40, :50]
    image = np.stack([2 * rows + 50, 2 * columns + 50, rows + columns], -1).astype(np.uint8)
    for value in magnitudes(name, 40, 50) if name in OPERATIONS else timm_magnitudes(name):
        expected = pillow(image, name, value, Image.Resampling.BILINEAR)
        # OpenCV blends the outermost half pixel with the black around it, Pillow does not.
        covered = pillow(np.full((40, 50, 1), 255, np.uint8), name, value, Image.Resampling.BILINEAR)
        inside = cv2.erode(covered, np.ones((5, 5)), borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
        assert inside.any()
        gap = np.abs(apply(image, name, value, bilinear=True).astype(int) - expected)
        assert gap[inside].max() <= 1, value


def test_a_large_image_is_turned_as_pillow_turns_it():
    image = noise(400, 600, 3)
    for value in (30.0, -135.0, 90.0, 7.3):
        np.testing.assert_array_equal(apply(image, "Rotate", value), pillow(image, "Rotate", value))


def test_sharpness_needs_no_inside():
    for shape in ((1, 1), (2, 5), (5, 2)):
        image = noise(*shape, 3)
        np.testing.assert_array_equal(apply(image, "Sharpness", -0.9), image)


@pytest.mark.parametrize("share", [0.0, 0.1, -0.3, 0.5])
def test_hue_turns_the_circle(share):
    image = noise(32, 32, 3)
    hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3) / 255]
    exact = 255 * np.array([colorsys.hsv_to_rgb((h + share) % 1, s, v) for h, s, v in hsv]).reshape(image.shape)
    gap = np.abs(apply(image, "Hue", share) - exact)
    assert gap.mean() < 1  # 256 hues, 6 of which are the corners: a step is 6 grey levels; Pillow's mean is up to 1.6
    assert gap.max() < 13


def test_grey_images_have_no_colour_to_change():
    image = picture(9, 9, 1)
    for name in ("Color", "Hue"):
        np.testing.assert_array_equal(apply(image, name, 0.4), image)


def test_magnitudes_and_operations_are_torchvisions(shared, monkeypatch):
    pytest.importorskip("torch", reason="compares with torchvision where it is installed")
    monkeypatch.setattr(sys, "path", [*sys.path, str(shared / "tools")])
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("compares with torchvision where it is installed")
    importlib.import_module("torchvision_shim")
    theirs = importlib.import_module("torchvision.transforms.autoaugment")
    nearest = theirs.InterpolationMode.NEAREST
    image = picture(24, 31, 3)
    spaces = (theirs.RandAugment()._augmentation_space(LEVELS, (24, 31)),
              theirs.TrivialAugmentWide()._augmentation_space(LEVELS))  # fmt: skip
    for wide, space in enumerate(spaces):
        assert list(space) == list(OPERATIONS)
        for name, (values, signed) in space.items():
            assert signed == OPERATIONS[name][2]
            found = [magnitude(name, level, bool(wide), 24, 31) for level in range(LEVELS)]
            np.testing.assert_allclose(found, np.broadcast_to(values.numpy(), LEVELS), rtol=1e-5, atol=1e-5)
            for value in {*found, *(-v for v in found if signed)}:
                out = np.asarray(theirs._apply_op(Image.fromarray(image), name, value, nearest, None))
                gap = np.abs(apply(image, name, value).astype(int) - out).max()
                assert gap <= (name == "Color"), (name, value)


def test_timms_operations_and_magnitudes_are_timms(monkeypatch, request):
    pytest.importorskip("torch", reason="compares with timm where it is installed")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("compares with timm where it is installed")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # its compiled part is for another build of torch
        monkeypatch.setattr(sys, "path", [*sys.path, str(request.getfixturevalue("shared") / "tools")])
        importlib.import_module("torchvision_shim")
    theirs = importlib.import_module("timm.data.auto_augment")
    monkeypatch.setattr(theirs, "_randomly_negate", lambda value: value)
    names = {name: name.removesuffix("Increasing") for name in theirs._RAND_INCREASING_TRANSFORMS}
    assert list(names.values()) == list(TIMM_OPERATIONS)
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.NEAREST}
    image = picture(24, 31, 3)
    for name, ours in names.items():
        for half in range(20 if ours == "Posterize" else 21):  # at 10 Pillow 13 refuses to keep 0 bits
            op = theirs.AugmentOp(name, prob=1.0, magnitude=half / 2, hparams=hparams)
            found = apply(image, ours, timm_magnitude(ours, half / 2), fill=FILL)
            gap = np.abs(found.astype(int) - np.asarray(op(Image.fromarray(image)))).max()
            assert gap <= (ours == "Color"), (name, half / 2)


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def drawn(monkeypatch: pytest.MonkeyPatch, policy: Augmentation, images: int) -> list[list[tuple[str, float, bool]]]:
    """The calls of `apply` for each of many images, 100 × 200, none of them carried out."""
    calls: list[list[tuple[str, float, bool]]] = []

    def note(image: np.ndarray, name: str, value: float, bilinear: bool = False, fill: object = None) -> np.ndarray:
        assert (fill == policy.fill) == bool(policy.timm[0])
        calls[-1].append((name, value, bilinear))
        return image

    monkeypatch.setattr(module, "apply", note)
    rng = np.random.default_rng(0)
    for _ in range(images):
        calls.append([])
        augment(np.zeros((100, 200, 3), np.uint8), rng, policy)
    return calls


def assert_even(counts: Counter, kinds: int) -> None:
    """All `kinds` of things were counted, as often as each other."""
    total = sum(counts.values())
    assert len(counts) == kinds
    assert all(abs(n - total / kinds) < 5 * math.sqrt(total / kinds) for n in counts.values()), counts


def test_randaugment_draws_operations_and_signs_evenly_at_its_level(monkeypatch):
    calls = drawn(monkeypatch, replace(NOTHING, operations=3, level=12, bilinear=True), 4000)
    assert {len(c) for c in calls} == {3}
    assert_even(Counter(name for c in calls for name, _, _ in c), 14)
    assert_even(Counter((c[0][0], c[1][0]) for c in calls), 14**2)  # independent of each other
    assert {bilinear for c in calls for _, _, bilinear in c} == {True}
    values = {name: Counter(v for c in calls for n, v, _ in c if n == name) for name in OPERATIONS}
    for name, (_, _, signed) in OPERATIONS.items():
        expected = magnitude(name, 12, False, 100, 200)
        assert set(values[name]) == ({expected, -expected} if signed else {expected})
        assert_even(values[name], 1 + signed)
    assert max(values["TranslateX"]) == pytest.approx(200 * 150 / 331 * 0.4)  # a share of the width
    assert max(values["TranslateY"]) == pytest.approx(100 * 150 / 331 * 0.4)
    assert max(values["Posterize"]) == 6
    assert max(values["Solarize"]) == 153


def test_timms_randaugment_draws_with_replacement_at_a_normal_magnitude_with_a_probability(monkeypatch):
    calls = drawn(monkeypatch, replace(NOTHING, timm=(2, 9.0, 1.5, 0.4), bilinear=True), 20_000)
    counts = Counter(len(c) for c in calls)
    for done, share in ((0, 0.36), (1, 0.48), (2, 0.16)):
        assert abs(counts[done] - 20_000 * share) < 5 * math.sqrt(20_000 * share)
    assert_even(Counter(name for c in calls for name, _, _ in c), 15)
    assert_even(Counter((c[0][0], c[1][0]) for c in calls if len(c) == 2), 15**2)
    assert {bilinear for c in calls for _, _, bilinear in c} == {True}
    for name, at_10 in (("Rotate", 30.0), ("Color", 0.9), ("TranslateYRel", 0.45)):
        values = np.array([v for c in calls for n, v, _ in c if n == name])
        assert_even(Counter(np.sign(values)), 2)
        levels = np.abs(values) / at_10 * 10
        clipped = levels > 10 - 1e-9
        tail = (1 - math.erf(1 / 1.5 / math.sqrt(2))) / 2  # of a normal variable beyond 10
        assert abs(clipped.mean() - tail) < 5 * math.sqrt(tail / len(levels))
        below = (levels < 9).mean()
        assert abs(below - 0.5) < 5 * math.sqrt(0.25 / len(levels))
        assert levels.max() == pytest.approx(10)
        lower = 9 - levels[levels < 9]  # half a normal: its mean square is that of the whole
        assert np.mean(lower**2) == pytest.approx(1.5**2, rel=5 * math.sqrt(2 / len(lower)))


def test_timms_magnitude_without_deviation_is_that_and_never_negative(monkeypatch):
    calls = drawn(monkeypatch, replace(NOTHING, timm=(1, 4.0, 0.0, 1.0)), 300)
    assert {len(c) for c in calls} == {1}
    assert {round(abs(c[0][1]), 9) for c in calls if c[0][0] == "Rotate"} == {12.0}
    calls = drawn(monkeypatch, replace(NOTHING, timm=(1, 0.0, 3.0, 1.0)), 2000)
    assert {v for c in calls for n, v, _ in c if n == "Solarize"} <= set(range(257))


def test_trivialaugment_draws_one_operation_at_any_level(monkeypatch):
    calls = drawn(monkeypatch, replace(NOTHING, trivial=True), 14_000)
    assert {len(c) for c in calls} == {1}
    assert_even(Counter(c[0][0] for c in calls), 14)
    turns = Counter(round(abs(c[0][1]) / 4.5) for c in calls if c[0][0] == "Rotate")
    assert_even(turns, LEVELS)
    assert_even(Counter(np.sign(c[0][1]) for c in calls if c[0][0] == "ShearX" and c[0][1]), 2)
    assert max(c[0][1] for c in calls if c[0][0] == "TranslateX") == 32


def test_jitter_draws_factors_uniformly_in_random_order(monkeypatch):
    calls = drawn(monkeypatch, replace(NOTHING, jitter=(0.4, 1.5, 0.2, 0.1)), 2400)
    assert_even(Counter(tuple(name for name, _, _ in c) for c in calls), 24)
    for name, low, high in (("Brightness", -0.4, 0.4), ("Contrast", -1, 1.5), ("Color", -0.2, 0.2), ("Hue", -0.1, 0.1)):
        values = np.array([v for c in calls for n, v, _ in c if n == name])
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high >= values.max() > high - 0.01 * (high - low)
        assert_even(Counter(np.floor((values - low) / (high - low) * 8)), 8)


def test_jitter_leaves_out_what_has_no_share(monkeypatch):
    calls = drawn(monkeypatch, replace(NOTHING, jitter=(0, 0.1, 0, 0)), 20)
    assert {name for c in calls for name, _, _ in c} == {"Contrast"}
    assert {len(c) for c in calls} == {1}


@pytest.mark.parametrize(
    "policy",
    [
        replace(NOTHING, operations=2),
        replace(NOTHING, trivial=True, bilinear=True),
        replace(NOTHING, timm=(2, 9.0, 0.5, 0.5)),
        replace(NOTHING, jitter=(0.4, 0.4, 0.4, 0.1)),
    ],
    ids=["randaugment", "trivial", "timm", "jitter"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_augment_is_a_function_of_its_generator_and_leaves_its_image_alone(policy, channels):
    image = picture(24, 31, channels)
    before = image.copy()

    def pixels(seed: int) -> bytes:
        out = augment(image, np.random.Generator(np.random.Philox(key=seed)), policy)
        assert (out.shape, out.dtype) == (image.shape, np.uint8)
        return out.tobytes()

    assert [pixels(seed) for seed in range(30)] == [pixels(seed) for seed in range(30)]
    assert len({pixels(seed) for seed in range(30)}) > 12
    np.testing.assert_array_equal(image, before)


def test_a_view_into_a_larger_image_is_augmented_as_its_copy():
    view = noise(40, 50, 3)[3:27, 5:36]
    for name in (*OPERATIONS, "Hue"):
        value = magnitude(name, 7, False, 24, 31) if name in OPERATIONS else 0.2
        np.testing.assert_array_equal(apply(view, name, value), apply(view.copy(), name, value), name)


# ---- what is asked for -----------------------------------------------------------------------------------------------


def test_the_default_asks_for_nothing():
    assert not NOTHING
    image, rng = picture(5, 5, 3), np.random.default_rng(0)
    state = rng.bit_generator.state
    assert augment(image, rng, NOTHING) is image
    assert rng.bit_generator.state == state


@pytest.mark.parametrize(
    "changes",
    [
        {"randaugment": (2, 9)},
        {"randaugment_timm": (2, 7.0, 0.5, 0.5)},
        {"trivial_augment": True},
        {"color_jitter": (0.0, 0.0, 0.0, 0.1)},
    ],
)
def test_what_a_config_asks_for_survives_its_file(changes):
    c = default()
    c.data.image.update(changes)
    validate(c)
    assert Augmentation.of(c.data.image)
    assert Augmentation.of(from_json(to_json(c)).data.image) == Augmentation.of(c.data.image)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data.image.randaugment": (2,)}, r"randaugment=\(2,\): must be two whole numbers"),
        ({"data.image.randaugment": (2, 31)}, r"randaugment=\(2, 31\): must be .*0 … 30"),
        ({"data.image.randaugment": (2.0, 9)}, "two whole numbers"),
        ({"data.image.randaugment": (-1, 9)}, "two whole numbers"),
        (
            {"data.image.randaugment": (1, 9), "data.image.trivial_augment": True},
            "randaugment and trivial_augment: choose one",
        ),
        (
            {"data.image.randaugment": (1, 9), "data.image.randaugment_timm": (1, 9.0, 0.5, 0.5)},
            "randaugment and randaugment_timm: choose one of them",
        ),
        (
            {"data.image.randaugment_timm": (2, 9.0, 0.5)},
            r"randaugment_timm=\(2, 9.0, 0.5\): must be a whole number of",
        ),
        ({"data.image.randaugment_timm": (2.0, 9.0, 0.5, 0.5)}, "a whole number of operations"),
        ({"data.image.randaugment_timm": (2, 11.0, 0.5, 0.5)}, "0 … 10"),
        ({"data.image.randaugment_timm": (2, 9.0, 0.5, 1.5)}, "their probability"),
        ({"data.image.randaugment_timm": (2, 9.0, -0.5, 0.5)}, "its deviation"),
        ({"data.image.augment_interpolation": "bilinaer"}, "did you mean bilinear"),
        ({"data.image.color_jitter": (0.4, 0.4, 0.4)}, "color_jitter=.*: must be four numbers"),
        ({"data.image.color_jitter": (0.4, 0.4, 0.4, 0.6)}, "at most 0.5"),
        ({"data.image.color_jitter": (0.4, -0.4, 0.4, 0.1)}, "not negative"),
        ({"data.image.color_jitter": (0.4, "x", 0.4, 0.1)}, "must be numbers"),
        (
            {"data.image.flip_alternate": True, "data.image.flip": False},
            "config.data.image.flip_alternate=True: which images",
        ),
        (
            {
                "data.image.pca_noise": 0.1,
                "data.image.channels": 1,
                "data.image.mean": (0.5,),
                "data.image.std": (0.2,),
            },
            "config.data.image.pca_noise=0.1: .* config.data.image.channels=1",
        ),
        (
            {"data.image.crop": "scaled", "data.image.size": 288},
            r"crop_resize=\(256, 480\): is less than the 288 pixels of a crop",
        ),
        ({"data.image.crop": "stretched", "data.image.size": 300}, "for config.data.image.crop=stretched"),
        ({"data.mixup": -0.1}, "config.data.mixup=-0.1"),
        ({"data.image.cutmix": math.nan}, "config.data.image.cutmix=nan"),
        ({"data.image.erase": 1.1}, "config.data.image.erase=1.1"),
        ({"data.mixup": 0.2, "batch_size": 25}, "config.batch_size=25: must be even"),
    ],
)
def test_a_mistake_is_one_line(changes, expected):
    c = default()
    c.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=expected) as e:
        validate(c)
    assert "\n" not in str(e.value)
