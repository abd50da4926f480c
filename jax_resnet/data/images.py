"""One image at a time, on the host: bytes to uint8 pixels, crops, sizes."""

import contextlib
import math
import re

import cv2
import numpy as np
import simplejpeg

cv2.setNumThreads(0)  # the loader's own threads work on different batches

# ITU-R BT.601 luma, the weights that PIL, OpenCV and TensorFlow use for grey.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

_BEFORE_IMAGE = re.compile(rb"\xff[\xe0-\xef\xfe]")  # marks of a JPEG's applications and comments: EXIF is one


def decode(data: bytes, channels: int) -> np.ndarray:
    """An encoded image (JPEG, PNG, or what else OpenCV reads) as uint8 [H, W, channels], turned as its EXIF says.

    Alpha is left out, whatever it hides; of 16 bits a PNG keeps the high 8; CMYK is taken as Adobe writes it, inverted.
    Raises ValueError for what is no image, or only a part of one.
    """
    if data[:3] == b"\xff\xd8\xff":
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


def with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [..., 1 or 3] → uint8 [..., channels]: grey is repeated, colour weighted to grey."""
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    return np.round(images.astype(np.float32) @ _LUMA).astype(np.uint8)[..., None]


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C] → uint8 [height, width, C]: bilinear; averaging over areas when it halves the image or more."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] >= 2 * height and image.shape[1] >= 2 * width
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return resized.reshape(height, width, image.shape[-1])


def resize_and_center_crop(image: np.ndarray, size: int, crop: float) -> np.ndarray:
    """Resizes the short side to size / crop, keeps the size × size pixels at the centre: the usual evaluation."""
    height, width = image.shape[:2]
    scale = max(size, round(size / crop)) / min(height, width)
    image = resize(image, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def random_resized_crop(
    image: np.ndarray, size: int, area: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A rectangle of random area and aspect, resized to size × size (Szegedy et al. 2014, section 6).

    Ten tries at a rectangle that fits, area share uniform, aspect log-uniform; then the largest centred one whose
    aspect is allowed.
    """
    height, width = image.shape[:2]
    shares = rng.uniform(*area, size=10)
    aspects = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), size=10))
    corner = rng.uniform(size=2)
    widths = np.round(np.sqrt(height * width * shares * aspects)).astype(int)
    heights = np.round(np.sqrt(height * width * shares / aspects)).astype(int)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    if fits.any():
        h, w = int(heights[fits.argmax()]), int(widths[fits.argmax()])
        top, left = int(corner[0] * (height - h + 1)), int(corner[1] * (width - w + 1))
    else:
        aspect = min(max(width / height, ratio[0]), ratio[1])
        h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
        h, w = max(h, 1), max(w, 1)
        top, left = (height - h) // 2, (width - w) // 2
    return resize(image[top : top + h, left : left + w], size, size)
