"""JPEG decoders: simplejpeg for full images and, if it is installed, libjpeg-turbo 3 for regions.

A decoder is known by its name, which can be sent to a worker process. The choice changes no pixel
of an intact file.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np
import simplejpeg

from jax_resnet.errors import UserError, choose

DECODERS = ("auto", "simplejpeg", "turbojpeg")
_NOT_FOUND = (
    "config.data.image.decoder=turbojpeg: libjpeg-turbo 3 is not found; pip install turbojpeg, or the system's "
    "libturbojpeg.so.0 of that version; auto does without"
)

# Constants of turbojpeg.h, version 3.
_DECOMPRESS = 1
_SUBSAMPLING, _WIDTH, _HEIGHT = 4, 5, 6  # parameters that a header sets
# Pixels, for 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0, 4:1:1, 4:4:1.
_UNIT_WIDTHS = (8, 16, 16, 8, 8, 32, 8)
_PIXEL_FORMATS = {3: 0, 1: 6}  # by channels: RGB, grey


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("left", "top", "width", "height")]


def choose_decoder(name: str) -> str:
    """Choose "simplejpeg" or "turbojpeg" by config.data.image.decoder.

    "auto" takes libjpeg-turbo 3 if it is installed. Raises UserError for another name, or when
    libjpeg-turbo 3 is asked for and not found.
    """
    choose("config.data.image.decoder", name, DECODERS)
    if name == "turbojpeg" and _library() is None:
        raise UserError(_NOT_FOUND)
    if name != "auto":
        return name
    return "turbojpeg" if _library() else "simplejpeg"


def describe(decoder: str) -> str:
    """Describe a chosen decoder for a log line: its name, and its version or library file."""
    library = _library()
    if decoder == "turbojpeg" and library:
        return f"turbojpeg (regions; {Path(library._name).name})"
    return f"simplejpeg {simplejpeg.__version__}"


class Jpeg:
    """A JPEG whose header libjpeg-turbo 3 has read.

    Raises ValueError for unusual subsampling, and for a file without a JPEG's end marker: the rows
    below a region are not decoded, so nothing else would show that they are missing.
    """

    _handle: int | None = None

    def __init__(self, data: bytes):
        if (library := _library()) is None:
            raise UserError(_NOT_FOUND)
        # Each JPEG has a handle: tables, and after errors a marker, stay in it and affect the next.
        self._handle = library.tj3Init(_DECOMPRESS)
        self._library = library
        self._data = data
        self._check(library.tj3DecompressHeader(self._handle, data, len(data)))
        self.height, self.width = self._get(_HEIGHT), self._get(_WIDTH)  # pixels, as stored
        if self._get(_SUBSAMPLING) < 0 or not data.endswith(b"\xff\xd9"):
            raise ValueError("only the whole of it")

    def __del__(self) -> None:
        if self._handle:
            self._library.tj3Destroy(self._handle)

    def region(self, box: tuple[int, int, int, int], channels: int) -> np.ndarray:
        """Decode a box of the image as stored, (top, left, height, width), to uint8.

        Returns [height, width, channels], the same pixels as in the full image. Raises ValueError
        for CMYK, or if the file cannot be decoded down to the box's end.
        """
        top, left, height, width = box
        # Regions begin at a unit. With subsampled chroma, pixels at a border need their neighbours.
        unit = _UNIT_WIDTHS[self._get(_SUBSAMPLING)]
        margin = 2 if unit > 8 else 0
        first = max(0, left - margin) // unit * unit
        end = min(left + width + margin, self.width)
        region = _Region(first, top, end - first, height)
        self._check(self._library.tj3SetCroppingRegion(self._handle, region))
        pixels = np.empty((height, end - first, channels), np.uint8)
        source = self._handle, self._data, len(self._data)
        target = pixels.ctypes.data, 0, _PIXEL_FORMATS[channels]
        self._check(self._library.tj3Decompress8(*source, *target))
        return pixels[:, left - first : left - first + width]

    def _get(self, parameter: int) -> int:
        return self._library.tj3Get(self._handle, parameter)

    def _check(self, status: int) -> None:
        if status:
            raise ValueError(self._library.tj3GetErrorStr(self._handle).decode(errors="replace"))


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Load libjpeg-turbo, version 3 or later: the system's, or that of the wheel turbojpeg."""
    names = ["libturbojpeg.so.0", "libturbojpeg.0.dylib"]
    wheel = importlib.util.find_spec("turbojpeg")
    if wheel and wheel.origin:
        names.append(wheel.origin)
    for name in names:
        try:
            library = ctypes.CDLL(name)
            handle, data, size, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
            library.tj3Init.argtypes, library.tj3Init.restype = [number], handle
            library.tj3Destroy.argtypes, library.tj3Destroy.restype = [handle], None
            library.tj3Get.argtypes = [handle, number]
            library.tj3GetErrorStr.argtypes, library.tj3GetErrorStr.restype = [handle], data
            library.tj3DecompressHeader.argtypes = [handle, data, size]
            library.tj3SetCroppingRegion.argtypes = [handle, _Region]
            library.tj3Decompress8.argtypes = [handle, data, size, ctypes.c_void_p, number, number]
        except (OSError, AttributeError):  # not installed, or older
            continue
        return library
    return None
