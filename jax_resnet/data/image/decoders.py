"""JPEG decoders: simplejpeg for whole images and, where libjpeg-turbo 3 is installed, that for a part of one.

A decoder is known by its name, so that a worker process can be told which to use. Which it is changes no pixel of a
file that is whole.
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

# Of turbojpeg.h, version 3.
_DECOMPRESS = 1
_SUBSAMPLING, _WIDTH, _HEIGHT = 4, 5, 6  # parameters that a header sets
_UNIT_WIDTHS = (8, 16, 16, 8, 8, 32, 8)  # pixels, of 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0, 4:1:1, 4:4:1
_PIXEL_FORMATS = {3: 0, 1: 6}  # by channels: red, green, blue; grey


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("left", "top", "width", "height")]


def choose_decoder(name: str) -> str:
    """What `config.data.image.decoder` means here, "simplejpeg" or "turbojpeg": for auto, the latter if there is one.

    Raises UserError for another name, or when libjpeg-turbo 3 is asked for and not found.
    """
    choose("config.data.image.decoder", name, DECODERS)
    if name == "turbojpeg" and _library() is None:
        raise UserError(_NOT_FOUND)
    return ("turbojpeg" if _library() else "simplejpeg") if name == "auto" else name


def describe(decoder: str) -> str:
    """A chosen decoder in a line's end: its name, and its version or the file it is."""
    library = _library()
    if decoder == "turbojpeg" and library:
        return f"turbojpeg (regions; {Path(library._name).name})"
    return f"simplejpeg {simplejpeg.__version__}"


class Jpeg:
    """A JPEG of which libjpeg-turbo 3 has read the header.

    Raises ValueError for unusual subsampling, and for one that does not end as a JPEG does: the rows below a region
    are not looked at, so that nothing else would show that they are missing.
    """

    _handle: int | None = None

    def __init__(self, data: bytes):
        if (library := _library()) is None:
            raise UserError(_NOT_FOUND)
        # A handle keeps tables, and after some errors a marker, which would change what is read next: one for each.
        self._handle = library.tj3Init(_DECOMPRESS)
        self._library, self._data = library, data
        self._check(library.tj3DecompressHeader(self._handle, data, len(data)))
        self.height, self.width = self._get(_HEIGHT), self._get(_WIDTH)  # pixels, as stored
        if self._get(_SUBSAMPLING) < 0 or not data.endswith(b"\xff\xd9"):
            raise ValueError("only the whole of it")

    def __del__(self) -> None:
        if self._handle:
            self._library.tj3Destroy(self._handle)

    def region(self, box: tuple[int, int, int, int], channels: int) -> np.ndarray:
        """The pixels uint8 [height, width, channels] in the box (top, left, height, width) of the image as stored.

        They are those of the whole image, exactly. Raises ValueError for what is CMYK, or cannot be decoded down
        to the box's end.
        """
        top, left, height, width = box
        # Columns come in whole units. Where chroma lies between them, a border's pixel needs what is beyond it.
        unit = _UNIT_WIDTHS[self._get(_SUBSAMPLING)]
        beyond = 2 if unit > 8 else 0
        first = max(0, left - beyond) // unit * unit
        end = min(left + width + beyond, self.width)
        region = _Region(first, top, end - first, height)
        self._check(self._library.tj3SetCroppingRegion(self._handle, region))
        pixels = np.empty((height, end - first, channels), np.uint8)
        where, kind = pixels.ctypes.data, _PIXEL_FORMATS[channels]
        self._check(self._library.tj3Decompress8(self._handle, self._data, len(self._data), where, 0, kind))
        return pixels[:, left - first : left - first + width]

    def _get(self, parameter: int) -> int:
        return self._library.tj3Get(self._handle, parameter)

    def _check(self, status: int) -> None:
        if status:
            raise ValueError(self._library.tj3GetErrorStr(self._handle).decode(errors="replace"))


@functools.cache
def _library() -> ctypes.CDLL | None:
    """TurboJPEG's library, of version 3 or later: the system's, or the one that the wheel turbojpeg is linked to."""
    wheel = importlib.util.find_spec("turbojpeg")
    for name in ("libturbojpeg.so.0", "libturbojpeg.0.dylib", *([wheel.origin] if wheel and wheel.origin else [])):
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
        except (OSError, AttributeError):  # not there, or older
            continue
        return library
    return None
