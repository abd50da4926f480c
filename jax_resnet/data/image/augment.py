"""Augment one image at a time, on the host: RandAugment, timm's too, TrivialAugment, colour jitter.

Operations and magnitudes are those of torchvision and timm, and pixels are those of Pillow: exactly
for tables of grey levels and nearest-pixel geometry, within one grey level for Color, Contrast and
Sharpness. Rounding differs where Pillow keeps 256 levels (hue) or truncates (bilinear).
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from ml_collections import ConfigDict

LEVELS = 31  # a magnitude is one of 0 … 30

# Strongest magnitude of RandAugment and of TrivialAugment, and whether its sign is drawn.
OPERATIONS = {
    "Identity": (0.0, 0.0, False),
    "ShearX": (0.3, 0.99, True),  # pixels per pixel
    "ShearY": (0.3, 0.99, True),
    "TranslateX": (150 / 331, 32.0, True),  # shares of the side; pixels
    "TranslateY": (150 / 331, 32.0, True),
    "Rotate": (30.0, 135.0, True),  # degrees, counterclockwise
    "Brightness": (0.9, 0.99, True),  # added to a factor of 1
    "Color": (0.9, 0.99, True),
    "Contrast": (0.9, 0.99, True),
    "Sharpness": (0.9, 0.99, True),
    "Posterize": (4.0, 6.0, False),  # bits fewer than 8
    "Solarize": (255.0, 255.0, False),  # 255 less the first level inverted
    "AutoContrast": (0.0, 0.0, False),
    "Equalize": (0.0, 0.0, False),
}
_NAMES = tuple(OPERATIONS)
# timm's operations that grow with their magnitude, how strong at 10, and whether the sign is drawn.
TIMM_OPERATIONS = {
    "AutoContrast": (0.0, False),
    "Equalize": (0.0, False),
    "Invert": (0.0, False),
    "Rotate": (30.0, True),
    "Posterize": (4.0, False),  # bits fewer than 4
    "Solarize": (256.0, False),  # 256 less the first level inverted
    "SolarizeAdd": (110.0, False),  # added to levels under 128
    "Color": (0.9, True),
    "Contrast": (0.9, True),
    "Brightness": (0.9, True),
    "Sharpness": (0.9, True),
    "ShearX": (0.3, True),
    "ShearY": (0.3, True),
    "TranslateXRel": (0.45, True),  # shares of the side
    "TranslateYRel": (0.45, True),
}
_TIMM_NAMES = tuple(TIMM_OPERATIONS)
_JITTER = ("Brightness", "Contrast", "Color", "Hue")
_GREY = np.arange(256)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images after the crop; false if it changes nothing."""

    operations: int  # of RandAugment, for each image
    level: int  # of RandAugment, 0 … 30
    trivial: bool  # TrivialAugment
    # timm's RandAugment: operations, their mean magnitude, its deviation, their probability.
    timm: tuple[int, float, float, float]
    jitter: tuple[float, ...]  # of brightness, contrast, saturation, hue
    bilinear: bool  # or the nearest pixel, to shear or rotate
    fill: tuple[int, ...]  # mean colour beyond an image, for timm's

    @classmethod
    def of(cls, image: ConfigDict) -> "Augmentation":
        """Build it from `image`, which is config.data.image."""
        operations, level = image.randaugment
        return cls(
            operations=operations,
            level=level,
            trivial=image.trivial_augment,
            timm=tuple(image.randaugment_timm),
            jitter=tuple(image.color_jitter),
            bilinear=image.augment_interpolation == "bilinear",
            fill=tuple(min(255, round(255 * mean)) for mean in image.mean),
        )

    def __bool__(self) -> bool:
        return bool(self.operations or self.trivial or self.timm[0] or any(self.jitter))


def augment(image: np.ndarray, rng: np.random.Generator, policy: Augmentation) -> np.ndarray:
    """Augment uint8 [H, W, 1 or 3] → same; `image` itself is not changed.

    RandAugment (Cubuk et al. 2019) draws `operations` one by one, all at one level. TrivialAugment
    (Müller & Hutter 2021, the wide space) draws one operation and its level. timm's RandAugment
    draws operations one by one, and does each with a probability, at a normal magnitude clipped to
    0 … 10. Colour jitter comes last: each factor is uniform in 1 ± its share (not below 0), the hue
    turns by up to that part of the circle, in random order.
    """
    for _ in range(1 if policy.trivial else policy.operations):
        name = _NAMES[rng.integers(len(_NAMES))]
        level = int(rng.integers(LEVELS)) if policy.trivial else policy.level
        value = magnitude(name, level, policy.trivial, *image.shape[:2])
        if OPERATIONS[name][2] and rng.integers(2):
            value = -value
        image = apply(image, name, value, policy.bilinear)
    operations, mean, deviation, probability = policy.timm
    for _ in range(operations):
        name = _TIMM_NAMES[rng.integers(len(_TIMM_NAMES))]
        if rng.random() < probability:
            value = timm_magnitude(name, min(max(rng.normal(mean, deviation), 0.0), 10.0))
            if TIMM_OPERATIONS[name][1] and rng.integers(2):
                value = -value
            image = apply(image, name, value, policy.bilinear, policy.fill)
    if any(policy.jitter):
        for i in rng.permutation(len(_JITTER)):
            if share := policy.jitter[i]:
                image = apply(image, _JITTER[i], rng.uniform(-min(share, 1), share))
    return image


def magnitude(name: str, level: int, wide: bool, height: int, width: int) -> float:
    """Return how strong operation `name` is at `level`, without a sign, in the unit of `apply`."""
    value = OPERATIONS[name][wide] * level / (LEVELS - 1)
    if name == "TranslateX" and not wide:
        return value * width
    if name == "TranslateY" and not wide:
        return value * height
    return {"Posterize": 8 - round(value), "Solarize": 255 - value}.get(name, value)


def timm_magnitude(name: str, level: float) -> float:
    """Return how strong operation `name` of timm's is at `level`, 0 … 10, likewise."""
    value = level / 10 * TIMM_OPERATIONS[name][0]
    steps = int(value)
    return {"Posterize": 4 - steps, "Solarize": 256 - steps, "SolarizeAdd": steps}.get(name, value)


def apply(
    image: np.ndarray, name: str, value: float, bilinear: bool = False, fill: tuple[int, ...] = (0, 0, 0)
) -> np.ndarray:
    """Apply an operation of OPERATIONS, TIMM_OPERATIONS or "Hue" to uint8 [H, W, 1 or 3] → same.

    For "Hue", `value` is a part of the circle. `fill` is the colour beyond the image.
    """
    height, width, channels = image.shape
    if matrix := _matrix(name, value, height, width):
        return _affine(image, matrix, bilinear, fill).reshape(image.shape)
    out = image
    match name:
        case "Brightness":
            out = cv2.LUT(image, _blend_levels(0, 1 + value))
        case "Contrast":
            grey = _grey(image)
            out = cv2.LUT(image, _blend_levels(int(cv2.mean(grey)[0] + 0.5), 1 + value))
        case "Color" if channels == 3:
            out = _blend(cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), image, 1 + value)
        case "Sharpness":
            smooth = cv2.filter2D(image, -1, _SMOOTH, borderType=cv2.BORDER_REPLICATE).reshape(image.shape)
            for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
                smooth[edge] = image[edge]
            out = _blend(smooth, image, 1 + value)
        case "Hue" if channels == 3:
            # The full range has 256 steps around the circle, so that adding uint8 wraps.
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
            hsv[..., 0] += np.uint8(round(256 * value) % 256)
            out = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
        case "Posterize":
            out = image & np.uint8(256 - 2 ** (8 - int(value)))
        case "Solarize":
            out = cv2.LUT(image, np.where(value > _GREY, _GREY, 255 - _GREY).astype(np.uint8))
        case "SolarizeAdd":
            brighter = np.minimum(_GREY + int(value), 255)
            out = cv2.LUT(image, np.where(_GREY < 128, brighter, _GREY).astype(np.uint8))
        case "Invert":
            out = 255 - image
        case "AutoContrast":
            low, high = image.min(0).min(0).astype(int), image.max(0).max(0).astype(int)
            out = _channelwise(image, [_stretched(*ends) for ends in zip(low, high, strict=True)])
        case "Equalize":
            counts = [cv2.calcHist([image], [i], None, [256], [0, 256]) for i in range(channels)]
            out = _channelwise(image, [_equalised(count.astype(int).ravel()) for count in counts])
    return out.reshape(image.shape)


def _grey(image: np.ndarray) -> np.ndarray:
    if image.shape[-1] == 1:
        return image
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _matrix(name: str, value: float, height: int, width: int) -> tuple[float, ...] | None:
    """Return the matrix for `_affine` of an operation that moves pixels; None for the others."""
    # Pillow rounds to 15 digits too, so that a quarter turn moves by integral pixels.
    cos = round(math.cos(math.radians(value)), 15)
    sin = round(math.sin(math.radians(value)), 15)
    x, y = width / 2, height / 2
    return {
        "ShearX": (1, value, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, value, 1, 0),
        "TranslateX": (1, 0, -int(value), 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, -int(value)),
        "TranslateXRel": (1, 0, value * width, 0, 1, 0),
        "TranslateYRel": (1, 0, 0, 0, 1, value * height),
        "Rotate": (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y),
    }.get(name)


def _affine(image: np.ndarray, matrix: tuple[float, ...], bilinear: bool, fill: tuple[int, ...]) -> np.ndarray:
    """Move pixels: (x, y) gets the one at (a·x + b·y + c, d·x + e·y + f), or `fill` from outside.

    The coordinates of pixels' centres end in ½.
    """
    a, b, c, d, e, f = matrix
    height, width = image.shape[:2]
    if bilinear:
        inverse = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(image, inverse, (width, height), flags=flags, borderValue=fill)
    # Fixed point with 16 bits takes the same pixels as Pillow; cv2.warpAffine has 10 bits.
    a, b, c, d, e, f = (math.floor(v * 65536 + 0.5) for v in (a, b, c + (a + b) / 2, d, e, f + (d + e) / 2))
    rows, columns = np.arange(height, dtype=np.int32)[:, None], np.arange(width, dtype=np.int32)
    source = np.empty((height, width, 2), np.int16)
    source[..., 0] = (columns * a + (rows * b + c)) >> 16
    source[..., 1] = (columns * d + (rows * e + f)) >> 16
    border = cv2.BORDER_CONSTANT
    return cv2.remap(image, source, None, cv2.INTER_NEAREST, borderMode=border, borderValue=fill)


def _blend(start: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """Compute start + factor · (image − start), truncated and clipped to 0 … 255."""
    # addWeighted rounds to nearest: less ½ that truncates, but for float32 errors at integers.
    return cv2.addWeighted(image, factor, start, 1 - factor, 1e-4 - 0.5)


def _blend_levels(start: int, factor: float) -> np.ndarray:
    levels = start + np.float32(factor) * (_GREY - start).astype(np.float32)
    return np.clip(levels, 0, 255).astype(np.uint8)


def _channelwise(image: np.ndarray, tables: list[np.ndarray]) -> np.ndarray:
    return cv2.LUT(image, np.clip(np.stack(tables, -1), 0, 255).astype(np.uint8)[None])


def _stretched(low: int, high: int) -> np.ndarray:
    """Make the table that stretches low … high to 0 … 255."""
    if high <= low:
        return _GREY
    scale = 255.0 / (high - low)
    return _GREY * scale + -low * scale


def _equalised(counts: np.ndarray) -> np.ndarray:
    """Make the table that equalises a histogram, int [256], as ImageOps.equalize does."""
    step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
    if not step:
        return _GREY
    return (step // 2 + counts.cumsum() - counts) // step
