"""One image at a time, on the host: bytes to uint8 pixels, crops, sizes."""

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
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # what cannot be decoded is reported by its name

# ITU-R BT.601 luma, the weights that PIL, OpenCV and TensorFlow use for grey.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

_OPENCV = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}

_JPEG = b"\xff\xd8\xff"
_BEFORE_IMAGE = re.compile(rb"\xff[\xe0-\xef\xfe]")  # marks of a JPEG's applications and comments: EXIF is one


Box = tuple[int, int, int, int]  # top, left, height, width


class Sampling(NamedTuple):
    """How pixels are taken from an image of another size."""

    interpolation: str = "bilinear"  # or bicubic
    antialias: bool = False  # as Pillow does it, whose very pixels these are then, at ten times the cost


FAST = Sampling()


def decode(
    data: bytes, channels: int, choose: Callable[[int, int], Box] | None = None, decoder: str = "simplejpeg"
) -> np.ndarray:
    """An encoded image (JPEG, PNG, or what else OpenCV reads) as uint8 [H, W, channels], turned as its EXIF says.

    With `choose`, called once, only the box `choose(H, W)` of that: the same pixels by every decoder. "turbojpeg" does
    not decode all of a JPEG for them, and does not notice damage that lies behind them in the file.

    Alpha is left out, whatever it hides; of 16 bits a PNG keeps the high 8; CMYK is taken as Adobe writes it, inverted.
    Raises ValueError for what is no image, or only a part of one.
    """
    if choose is None:
        return _decode_whole(data, channels)
    box = None
    if decoder == "turbojpeg" and data[:3] == _JPEG:
        with contextlib.suppress(ValueError):  # the whole of it will tell whether it is an image
            jpeg, orientation = Jpeg(data), _jpeg_orientation(data)
            turned = orientation >= 5
            box = choose(jpeg.width, jpeg.height) if turned else choose(jpeg.height, jpeg.width)
            pixels = jpeg.region(_as_stored(box, jpeg.height, jpeg.width, orientation), channels)
            return _upright(pixels, orientation)
    image = _decode_whole(data, channels)
    top, left, height, width = box or choose(*image.shape[:2])
    return image[top : top + height, left : left + width]


def _decode_whole(data: bytes, channels: int) -> np.ndarray:
    if data[:3] == _JPEG:
        try:
            image = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
        except ValueError as e:  # for one, that it is CMYK
            if "premature end" in str(e).lower():  # OpenCV would fill up with grey
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
    """What a JPEG's EXIF says of its orientation, 1 … 8; where it says nothing, 1: upright."""
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
    """Undoes an EXIF orientation of an image [H, W, C]."""
    if orientation == 1:
        return image
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    rows, columns = (-1 if orientation in which else 1 for which in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return np.ascontiguousarray(image[::rows, ::columns])


def _as_stored(box: Box, height: int, width: int, orientation: int) -> Box:
    """Where a box of the upright image lies in the stored one, of that height and width."""
    top, left, h, w = box
    if orientation >= 5:
        height, width = width, height
    if orientation in (3, 4, 7, 8):
        top = height - top - h
    if orientation in (2, 3, 6, 7):
        left = width - left - w
    return (left, top, w, h) if orientation >= 5 else (top, left, h, w)


def with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [..., 1 or 3] → uint8 [..., channels]: grey is repeated, colour weighted to grey."""
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    return np.round(images.astype(np.float32) @ _LUMA).astype(np.uint8)[..., None]


def resize(image: np.ndarray, height: int, width: int, sampling: Sampling = FAST) -> np.ndarray:
    """uint8 [H, W, C] → uint8 [height, width, C].

    Without antialiasing, an image that is n times as large on both sides, or more, is first averaged over n × n pixels.
    """
    if image.shape[:2] == (height, width):
        return image
    if sampling.antialias:
        pillow = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        resized = np.asarray(pillow.resize((width, height), Image.Resampling[sampling.interpolation.upper()]))
    else:
        shrunk, n = image, min(image.shape[0] // height, image.shape[1] // width)
        if n > 1:  # OpenCV is fast at whole numbers; what is left over at the far sides is less than a pixel
            rows, columns = image.shape[0] // n, image.shape[1] // n
            shrunk = cv2.resize(image[: n * rows, : n * columns], (columns, rows), interpolation=cv2.INTER_AREA)
        resized = cv2.resize(shrunk, (width, height), interpolation=_OPENCV[sampling.interpolation])
    return resized.reshape(height, width, image.shape[-1])


def resize_and_center_crop(image: np.ndarray, size: int, crop: float, sampling: Sampling = FAST) -> np.ndarray:
    """Resizes the short side to size / crop, keeps the size × size pixels at the centre: the usual evaluation."""
    height, width = image.shape[:2]
    scale = max(size, round(size / crop)) / min(height, width)
    image = resize(image, max(size, round(height * scale)), max(size, round(width * scale)), sampling)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def random_box(
    height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A box of random area and aspect in an image of that size (Szegedy et al. 2014, section 6).

    Ten tries at a rectangle that fits, area share uniform, aspect log-uniform; then the largest centred one whose
    aspect is allowed.
    """
    draws = rng.random(22).tolist()  # numpy on ten numbers costs ten times what Python does
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
    """What a random square is, before resizing, of an image that is first resized to some number of times its side.

    That number, at least 1, is uniform in `sides`, for the image's short side (Simonyan & Zisserman 2014, section 3.1);
    `stretched`: for both (Kolesnikov et al. 2019). The place is uniform too.
    """
    size, down, right = rng.random(3).tolist()
    times = sides[0] + (sides[1] - sides[0]) * size
    h, w = (max(1, round(side / times)) for side in ((height, width) if stretched else 2 * (min(height, width),)))
    return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
