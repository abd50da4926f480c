"""Decode, crop and resize one image at a time, on the host."""

import contextlib
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from jax_resnet.data.image.decoders import Jpeg

cv2.setNumThreads(0)  # the loader's own threads work on different batches
# The caller reports an image that cannot be decoded, with its name.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)

# ITU-R BT.601 luma, the weights that PIL, OpenCV and TensorFlow use for grey.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

_OPENCV = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}

_JPEG = b"\xff\xd8\xff"
# Markers of a JPEG's application data, as EXIF, and comments.
_BEFORE_IMAGE = re.compile(rb"\xff[\xe0-\xef\xfe]")

# EXIF orientations of images that are stored bottom up, from right to left, and by columns.
_BOTTOM_UP = (3, 4, 7, 8)
_RIGHT_TO_LEFT = (2, 3, 6, 7)
_TRANSPOSED = (5, 6, 7, 8)

Box = tuple[int, int, int, int]  # top, left, height, width


class Sampling(NamedTuple):
    """Options of `resize`. Antialiasing gives Pillow's pixels, at ten times the cost."""

    interpolation: str = "bilinear"  # or bicubic
    antialias: bool = False


FAST = Sampling()


def decode(
    data: bytes, channels: int, choose: Callable[[int, int], Box] | None = None, decoder: str = "simplejpeg"
) -> np.ndarray:
    """Decode an image (JPEG, PNG or another that OpenCV reads), upright by its EXIF.

    Returns uint8 [H, W, channels], or with `choose`, which is called once, only the box
    `choose(H, W)`: the same pixels by every decoder. For a box, "turbojpeg" does not decode all of
    a JPEG, and does not notice damage behind it in the file.

    Alpha is dropped; 16 bits become the high 8; CMYK is read as Adobe writes it, inverted. Raises
    ValueError for data that is not an image, or is truncated.
    """
    if choose is None:
        return _decode_whole(data, channels)
    box = None
    if decoder == "turbojpeg" and data[:3] == _JPEG:
        # After an error the full image is decoded below, which raises if it is damaged.
        with contextlib.suppress(ValueError):
            jpeg = Jpeg(data)
            orientation = _jpeg_orientation(data)
            height, width = jpeg.height, jpeg.width
            if orientation in _TRANSPOSED:
                height, width = width, height
            box = choose(height, width)
            pixels = jpeg.region(_as_stored(box, jpeg.height, jpeg.width, orientation), channels)
            return _upright(pixels, orientation)
    image = _decode_whole(data, channels)
    top, left, height, width = box or choose(*image.shape[:2])
    return image[top : top + height, left : left + width]


def _decode_whole(data: bytes, channels: int) -> np.ndarray:
    if data[:3] == _JPEG:
        try:
            image = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
        except ValueError as e:  # CMYK, for one
            # OpenCV would fill the rest of a truncated image with grey.
            if "premature end" in str(e).lower():
                raise ValueError(f"not an image that can be decoded: {e} ({len(data)} bytes)") from None
        else:
            return _upright(image, _jpeg_orientation(data))
    image = None
    with contextlib.suppress(cv2.error):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise ValueError(f"not an image that can be decoded ({len(data)} bytes)")
    return with_channels(image, channels)


def _jpeg_orientation(data: bytes) -> int:
    """Read the orientation, 1 … 8, from a JPEG's EXIF; 1, upright, where it has none."""
    at = 2
    while _BEFORE_IMAGE.match(data, at):
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 4 : at + 10] == b"Exif\0\0":
            return _tiff_orientation(data[at + 10 : end])
        at = end
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], "little" if tiff[:2] == b"II" else "big")

    first = number(4, 4) + 2
    for entry in range(first, min(first + 12 * number(first - 2, 2), len(tiff) - 11), 12):
        if number(entry, 2) == 0x0112:
            orientation = number(entry + 8, 2)
            return orientation if 1 <= orientation <= 8 else 1
    return 1


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation of an image [H, W, C]."""
    if orientation in _TRANSPOSED:
        image = image.swapaxes(0, 1)
    if orientation in _BOTTOM_UP:
        image = image[::-1]
    if orientation in _RIGHT_TO_LEFT:
        image = image[:, ::-1]
    return image if orientation == 1 else np.ascontiguousarray(image)


def _as_stored(box: Box, height: int, width: int, orientation: int) -> Box:
    """Map a box of the upright image to the stored one, of that height and width."""
    top, left, h, w = box
    if orientation in _TRANSPOSED:
        height, width = width, height
    if orientation in _BOTTOM_UP:
        top = height - top - h
    if orientation in _RIGHT_TO_LEFT:
        left = width - left - w
    if orientation in _TRANSPOSED:
        return left, top, w, h
    return top, left, h, w


def with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Convert uint8 [..., 1 or 3] → uint8 [..., channels]: repeat grey, or weight the colours."""
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    return np.round(images.astype(np.float32) @ _LUMA).astype(np.uint8)[..., None]


def resize(image: np.ndarray, height: int, width: int, sampling: Sampling = FAST) -> np.ndarray:
    """Resize uint8 [H, W, C] → uint8 [height, width, C].

    Without antialiasing, an image at least n times as large on both sides is first averaged over
    n × n pixels.
    """
    if image.shape[:2] == (height, width):
        return image
    if sampling.antialias:
        pillow = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        resized = np.asarray(pillow.resize((width, height), Image.Resampling[sampling.interpolation.upper()]))
    else:
        shrunk = image
        n = min(image.shape[0] // height, image.shape[1] // width)
        # OpenCV is fast at integral factors; the rest at the far sides is less than a pixel.
        if n > 1:
            rows, columns = image.shape[0] // n, image.shape[1] // n
            shrunk = cv2.resize(image[: n * rows, : n * columns], (columns, rows), interpolation=cv2.INTER_AREA)
        resized = cv2.resize(shrunk, (width, height), interpolation=_OPENCV[sampling.interpolation])
    return resized.reshape(height, width, image.shape[-1])


def resize_and_center_crop(image: np.ndarray, size: int, crop: float, sampling: Sampling = FAST) -> np.ndarray:
    """Resize the short side to size / crop and crop the central size × size pixels."""
    height, width = image.shape[:2]
    scale = max(size, round(size / crop)) / min(height, width)
    image = resize(image, max(size, round(height * scale)), max(size, round(width * scale)), sampling)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def random_box(
    height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draw a box of random area and aspect in an image (Szegedy et al. 2014, section 6).

    Try ten rectangles, area share uniform, aspect log-uniform, for one that fits; then take the
    largest centred one whose aspect is allowed.
    """
    # For ten numbers, arithmetic in numpy takes ten times as long as in Python.
    draws = rng.random(22).tolist()
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for share, turn in zip(draws[:10], draws[10:20], strict=True):
        pixels = height * width * (area[0] + (area[1] - area[0]) * share)
        aspect = math.exp(low + (high - low) * turn)
        h, w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = max(1, min(height, round(width / aspect))), max(1, min(width, round(height * aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_box(
    height: int, width: int, sides: tuple[float, float], rng: np.random.Generator, *, stretched: bool
) -> Box:
    """Draw the box of an image that becomes a random square crop of the resized image.

    The image's short side is resized to a multiple of the crop's side, at least 1 and uniform in
    `sides` (Simonyan & Zisserman 2014, section 3.1); if `stretched`, both sides (Kolesnikov et al.
    2019). The position is uniform too.
    """
    size, down, right = rng.random(3).tolist()
    multiple = sides[0] + (sides[1] - sides[0]) * size
    resized = (height, width) if stretched else 2 * (min(height, width),)
    h, w = (max(1, round(side / multiple)) for side in resized)
    return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
