"""One image at a time, on the host: bytes to uint8 pixels, crops, sizes."""

import contextlib
import math

import cv2
import numpy as np
import simplejpeg

cv2.setNumThreads(0)  # the loader's own threads work on different batches

# ITU-R BT.601 luma, the weights that PIL, OpenCV and TensorFlow use for grey.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def decode(data: bytes, channels: int) -> np.ndarray:
    """An encoded image (JPEG, PNG, or what else OpenCV reads) as uint8 [H, W, channels].

    Raises ValueError if it is none.
    """
    if data[:3] == b"\xff\xd8\xff":
        try:
            return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
        except ValueError as e:
            if "premature end" in str(e).lower():  # OpenCV would fill up with grey
                raise ValueError(f"not an image that can be decoded: {e} ({len(data)} bytes)") from None
    image = None
    with contextlib.suppress(cv2.error):
        # simplejpeg does not turn images as their EXIF says, so nothing else may.
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise ValueError(f"not an image that can be decoded ({len(data)} bytes)")
    return with_channels(image, channels)


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
