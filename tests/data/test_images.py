"""Decoding, resizing and cropping, against arrays made by hand.

Coordinate images show where pixels come from: channel 0 holds the row, channel 1 the column.
"""

import base64
import contextlib
import io
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from jax_resnet.data.image import decoders, images
from jax_resnet.data.image.decoders import choose_decoder, describe
from jax_resnet.data.image.images import (
    FAST,
    Sampling,
    decode,
    random_box,
    resize,
    resize_and_center_crop,
    resized_box,
    with_channels,
)
from jax_resnet.errors import UserError

# A 16×16 CMYK JPEG of the colour (200, 100, 50), made once with PIL; neither simplejpeg nor OpenCV can write one.
CMYK_JPEG = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwADAgIDAgIDAwMDBAMDBAUIBQUEBAUKBwcGCAwKDAwLCgsLDQ4SEA0OEQ4LCxAWEBETFBUV"
    "FQwPFxgWFBgSFBUU/8AAFAgAEAAQBEMRAE0RAFkRAEsRAP/EABcAAQEBAQAAAAAAAAAAAAAAAAAIBwn/xAAUEAEAAAAAAAAAAAAA"
    "AAAAAAAA/9oADgRDAE0AWQBLAAA/ALAZoi91TAAAAf/Z"
)


def random_resized_crop(
    image: np.ndarray, size: int, area: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator,
    sampling: Sampling = FAST,
) -> np.ndarray:  # fmt: skip
    """A random box of an image, resized to size × size."""
    top, left, height, width = random_box(*image.shape[:2], area, ratio, rng)
    return resize(image[top : top + height, left : left + width], size, size, sampling)


def coordinates(height: int, width: int, step: int = 1) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] * step
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


def smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
    """A colour gradient that JPEG keeps within a few units."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows * 255 / height, columns * 255 / width, np.full(rows.shape, 90)], axis=-1)
    return np.ascontiguousarray(image[..., :channels].astype(np.uint8))


def png(image: np.ndarray) -> bytes:
    """`image` [H, W], RGB or RGBA, as PNG."""
    order = {2: ..., 3: (..., [2, 1, 0]), 4: (..., [2, 1, 0, 3])}[image.shape[-1] if image.ndim == 3 else 2]
    return cv2.imencode(".png", image[order])[1].tobytes()


def luma(image: np.ndarray) -> np.ndarray:
    return (image @ np.array([0.299, 0.587, 0.114]))[..., None]


# ---- decoding --------------------------------------------------------------------------------------------------------


def test_png_is_decoded_exactly():
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(png(image), 3), image)


def test_jpeg_is_decoded_in_the_order_red_green_blue():
    image = smooth(40, 24)
    found = decode(simplejpeg.encode_jpeg(image, quality=95), 3)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found.astype(int), image, atol=6)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_png_and_grey_jpeg_have_as_many_channels_as_asked_for(channels):
    grey = smooth(16, 24, 1)
    np.testing.assert_array_equal(decode(png(grey[..., 0]), channels), grey.repeat(channels, axis=-1))
    found = decode(simplejpeg.encode_jpeg(grey, quality=95, colorspace="GRAY"), channels)
    np.testing.assert_allclose(found.astype(int), grey.repeat(channels, axis=-1), atol=4)


def test_colour_png_and_colour_jpeg_become_grey_by_luma():
    image = smooth(16, 24)
    np.testing.assert_allclose(decode(png(image), 1), luma(image), atol=0.6)
    np.testing.assert_allclose(decode(simplejpeg.encode_jpeg(image, quality=95), 1), luma(image), atol=5)


def test_alpha_is_left_out():
    image = smooth(8, 8)
    transparent = np.concatenate([image, np.full((8, 8, 1), 3, np.uint8)], axis=-1)
    np.testing.assert_array_equal(decode(png(transparent), 3), image)


def test_16_bit_png_keeps_its_high_byte():
    image = smooth(8, 8)
    np.testing.assert_array_equal(decode(png(image.astype(np.uint16) * 257), 3), image)


@pytest.mark.parametrize("suffix", [".bmp", ".tiff", ".webp", ".ppm"])
def test_other_formats_are_decoded(suffix):
    image = smooth(16, 16)
    lossless = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else []
    data = cv2.imencode(suffix, image[..., ::-1], lossless)[1].tobytes()
    np.testing.assert_array_equal(decode(data, 3), image)


def test_cmyk_jpeg_is_decoded():
    found = decode(CMYK_JPEG, 3)
    assert found.shape == (16, 16, 3)
    np.testing.assert_allclose(found.astype(int), np.broadcast_to([200, 100, 50], (16, 16, 3)), atol=4)
    np.testing.assert_allclose(decode(CMYK_JPEG, 1), luma(found), atol=0.6)


@pytest.mark.parametrize("kind", ["grey", "grey and alpha", "palette", "two-tone"])
def test_pngs_of_every_kind_are_read_as_pillow_reads_them(kind):
    mode = {"grey": "L", "grey and alpha": "LA", "palette": "P", "two-tone": "1"}[kind]
    image = Image.fromarray(smooth(16, 24)).convert(mode)
    data = saved(image, "PNG", **({"transparency": 3} if kind == "palette" else {}))
    np.testing.assert_array_equal(decode(data, 3), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_16_bit_grey_png_keeps_its_high_byte():
    values = np.array([[0x0000, 0x01FF, 0x0180, 0xFEFF, 0xFFFF]], np.uint16)
    assert decode(cv2.imencode(".png", values)[1].tobytes(), 1).ravel().tolist() == [0, 1, 1, 254, 255]


# ---- EXIF ------------------------------------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def turned_as_exif_says(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "CMYK JPEG"])
def test_images_are_turned_as_their_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", orientation
    image = Image.fromarray(smooth(16, 40)).convert("CMYK" if kind == "CMYK JPEG" else "RGB")
    how = {"WEBP": {"lossless": True}, "TIFF": {"tiffinfo": {0x0112: orientation}}}.get(kind, {})
    data = saved(image, kind.removeprefix("CMYK "), **{"exif": exif} | how)
    found, expected = decode(data, 3), turned_as_exif_says(data)
    assert found.shape == ((16, 40, 3) if orientation < 5 else (40, 16, 3))
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found.astype(int), expected, atol=1)
    np.testing.assert_allclose(decode(data, 1), luma(expected), atol=2)


def with_exif(tiff: bytes, *, before: bytes = b"") -> bytes:
    """A JPEG of 16×40 pixels that has `before` and an EXIF segment in front of everything else."""
    content = b"Exif\0\0" + tiff
    jpeg = simplejpeg.encode_jpeg(smooth(16, 40), quality=95)
    return jpeg[:2] + before + b"\xff\xe1" + (len(content) + 2).to_bytes(2) + content + jpeg[2:]


def tiff(order: str, entries: list[tuple[int, int]], *, at: int = 8) -> bytes:
    """A TIFF header and a first directory, `at` that offset, of (tag, value) shorts."""
    mark = {"little": b"II", "big": b"MM"}[order] + (42).to_bytes(2, order) + at.to_bytes(4, order)
    directory = len(entries).to_bytes(2, order) + b"".join(
        tag.to_bytes(2, order) + (3).to_bytes(2, order) + (1).to_bytes(4, order) + value.to_bytes(2, order) + b"\0\0"
        for tag, value in entries
    )
    return mark.ljust(at, b"\0") + directory + b"\0" * 4


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("at", [8, 30])
@pytest.mark.parametrize("before", [b"", b"\xff\xfe\0\x05abc", b"\xff\xe1\0\x0ahttp://x\0"[:12]], ids=len)
def test_exif_of_either_byte_order_is_found_behind_other_segments(order, at, before):
    data = with_exif(tiff(order, [(0x0100, 7), (0x0112, 6), (0x0128, 2)], at=at), before=before)
    assert decode(data, 3).shape == (40, 16, 3)
    np.testing.assert_allclose(decode(data, 3).astype(int), turned_as_exif_says(data), atol=1)


BAD_EXIF = {
    "nothing": b"",
    "no such orientation": tiff("big", [(0x0112, 9)]),
    "orientation 0": tiff("little", [(0x0112, 0)]),
    "another tag": tiff("big", [(0x0113, 6)]),
    "directory elsewhere": b"II*\0\xff\xff\xff\x7f",
    "cut off in the entry": tiff("big", [(0x0112, 6)])[:16],
    "many entries, none there": b"MM\0*\0\0\0\x08\xff\xff",
    "noise": bytes(range(200)),
}


@pytest.mark.parametrize("content", BAD_EXIF.values(), ids=BAD_EXIF)
def test_exif_that_says_nothing_sensible_turns_nothing(content):
    np.testing.assert_allclose(decode(with_exif(content), 3).astype(int), smooth(16, 40), atol=6)


@pytest.mark.parametrize("end", range(12, 60, 5))
def test_exif_cut_off_anywhere_is_no_crash(end):
    jpeg = with_exif(tiff("big", [(0x0112, 6)]))
    with pytest.raises(ValueError, match="can be decoded"):
        decode(jpeg[:end], 3)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_truncated_cmyk_jpeg_raises(share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    data = saved(Image.fromarray(noise, "CMYK"), "JPEG")
    assert decode(data, 3).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="can be decoded"):
        decode(data[: int(len(data) * share)], 3)


@pytest.mark.parametrize(
    "data",
    [b"", b"abc", b"\xff\xd8\xff", b"\xff\xd8\xff" + b"x" * 100, b"\x89PNG\r\n\x1a\n" + b"x" * 50, b"\0" * 1000],
    ids=["nothing", "text", "JPEG mark", "JPEG mark and noise", "PNG mark and noise", "zeros"],
)
def test_what_is_no_image_raises(data):
    with pytest.raises(ValueError, match=rf"not an image that can be decoded \({len(data)} bytes\)"):
        decode(data, 3)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("progressive", [0, 1], ids=["baseline", "progressive"])
def test_truncated_jpeg_raises_and_gives_no_grey_rows(share, progressive):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive])[1].tobytes()
    assert decode(data, 3).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="can be decoded"):
        decode(data[: int(len(data) * share)], 3)


def test_jpeg_that_lacks_its_second_half_but_has_an_end_raises():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = simplejpeg.encode_jpeg(image)
    with pytest.raises(ValueError, match=r"decoded|end"):
        decode(data[: len(data) // 2] + b"\xff\xd9", 3)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_truncated_png_raises(share):
    data = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="can be decoded"):
        decode(data[: int(len(data) * share)], 3)


# ---- a part of an image ----------------------------------------------------------------------------------------------

needs_turbojpeg = pytest.mark.skipif(
    choose_decoder("auto") != "turbojpeg", reason="libjpeg-turbo 3 is not installed; pip install turbojpeg"
)
SAMPLINGS = {name: getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}") for name in ("444", "422", "420", "440", "411")}


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blurred noise: neighbours differ, in colour too."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 1.2), None, 0, 255, cv2.NORM_MINMAX)


def jpeg(image: np.ndarray, sampling: str = "420", *, progressive: bool = False, restart: int = 0, **how: int) -> bytes:
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive), cv2.IMWRITE_JPEG_RST_INTERVAL, restart]
    if sampling == "grey":
        image = image[..., 0]
    else:
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling]]
    for name, value in how.items():
        options += [getattr(cv2, f"IMWRITE_JPEG_{name.upper()}"), value]
    return cv2.imencode(".jpg", image, options)[1].tobytes()


def some_boxes(height: int, width: int, count: int, seed: int = 0) -> list[images.Box]:
    """Of every size and place, the whole and single pixels at corners among them."""
    boxes, rng = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1)], np.random.default_rng(seed)
    for _ in range(count):
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        boxes.append((int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w))
    return boxes


def inside(image: np.ndarray, box: images.Box) -> np.ndarray:
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def part(data: bytes, box: images.Box, channels: int = 3, decoder: str = "turbojpeg") -> np.ndarray:
    return decode(data, channels, lambda height, width: box, decoder)


def no_whole(data: bytes, channels: int) -> np.ndarray:
    raise AssertionError("the whole image is decoded")


@needs_turbojpeg
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
@pytest.mark.parametrize("sampling", [*SAMPLINGS, "grey"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_region_has_the_pixels_of_the_whole(sampling, progressive, channels, monkeypatch):
    files = []
    for height, width in [(1, 1), (3, 5), (8, 8), (16, 17), (17, 33), (31, 64), (101, 75)]:
        data = jpeg(textured(height, width), sampling, progressive=progressive, restart=width % 3)
        files.append((data, decode(data, channels), some_boxes(height, width, 30)))
    monkeypatch.setattr(images, "_decode_whole", no_whole)
    for data, whole, boxes in files:
        for box in boxes:
            np.testing.assert_array_equal(part(data, box, channels), inside(whole, box), str((whole.shape, box)))


@needs_turbojpeg
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_region_is_one_of_the_image_turned_as_its_exif_says(orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(textured(40, 75)), "JPEG", exif=exif)
    whole, sizes = decode(data, 3), []
    np.testing.assert_allclose(whole.astype(int), turned_as_exif_says(data), atol=1)
    monkeypatch.setattr(images, "_decode_whole", no_whole)
    for box in some_boxes(*whole.shape[:2], 30):

        def choose(height, width, box=box):
            sizes.append((height, width))
            return box

        np.testing.assert_array_equal(decode(data, 3, choose, "turbojpeg"), inside(whole, box))
    assert set(sizes) == {whole.shape[:2]}


@pytest.mark.parametrize("decoder", ["simplejpeg", pytest.param("turbojpeg", marks=needs_turbojpeg)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "CMYK", "JPEG with bytes behind it", "JPEG damaged above"])
def test_a_box_is_chosen_once_from_any_image_by_any_decoder(kind, decoder):
    data = {
        "JPEG": jpeg(textured(64, 48)),
        "PNG": png(textured(64, 48)),
        "CMYK": saved(Image.fromarray(textured(64, 48)).convert("CMYK"), "JPEG"),
        "JPEG with bytes behind it": jpeg(textured(64, 48)) + b"\0" * 9,
        "JPEG damaged above": damaged(jpeg(textured(64, 48), restart=1)),
    }[kind]
    calls = []

    def choose(height, width):
        calls.append((height, width))
        return 40, 9, 20, 30

    np.testing.assert_array_equal(decode(data, 3, choose, decoder), inside(decode(data, 3), (40, 9, 20, 30)))
    assert calls == [(64, 48)]


def damaged(data: bytes) -> bytes:
    """A JPEG whose first restart marker counts wrong: OpenCV goes on, simplejpeg and a region's decoder stop."""
    at = data.index(b"\xff\xd0")
    return data[: at + 1] + b"\xd3" + data[at + 2 :]


@needs_turbojpeg
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_a_region_of_a_truncated_jpeg_raises_even_where_its_rows_are_there(progressive):
    data = jpeg(textured(120, 90), progressive=progressive)
    for end in range(3, len(data) - 1, 97):
        with pytest.raises(ValueError, match="can be decoded"):
            part(data[:end], (0, 0, 16, 16))


@needs_turbojpeg
def test_a_region_does_not_depend_on_what_was_decoded_before(monkeypatch):
    image = textured(64, 48)
    data = saved(Image.fromarray(image), "JPEG")
    bare = data  # without the Huffman tables, which are the standard's: as in a film's frames
    while (at := bare.find(b"\xff\xc4")) >= 0:
        bare = bare[:at] + bare[at + 2 + int.from_bytes(bare[at + 2 : at + 4]) :]
    table = data.index(b"\xff\xc4") + 2
    cut_short = data[:table] + (3).to_bytes(2) + data[table + 2 :]
    whole = decode(data, 3)
    for before in (jpeg(image, optimize=1), jpeg(image, "444", quality=30), cut_short, b"\xff\xd8\xff\xd9"):
        with contextlib.suppress(ValueError):
            part(before, (0, 0, 8, 8))
        with monkeypatch.context() as patch:
            patch.setattr(images, "_decode_whole", no_whole)
            for after in (bare, data):
                np.testing.assert_array_equal(part(after, (30, 5, 20, 30)), inside(whole, (30, 5, 20, 30)))


@needs_turbojpeg
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_what_the_whole_decoder_takes_for_an_image_a_region_is_too_with_its_pixels(progressive):
    data, rng = jpeg(textured(96, 80), "444", progressive=progressive), np.random.default_rng(0)
    taken = 0
    for box in some_boxes(96, 80, 300):
        flipped = bytearray(data)
        flipped[rng.integers(200, len(data) - 2)] ^= 1 << int(rng.integers(8))
        try:
            whole = decode(bytes(flipped), 3)
        except ValueError:
            continue
        if whole.shape == (96, 80, 3):
            np.testing.assert_array_equal(part(bytes(flipped), box), inside(whole, box))
            taken += 1
    assert taken > 100


@needs_turbojpeg
def test_threads_decode_regions_at_once():
    files = [jpeg(textured(90 + i, 120, i), progressive=i % 2 == 1) for i in range(8)]
    wholes = [decode(data, 3) for data in files]
    work = [(i, box) for i, whole in enumerate(wholes) for box in some_boxes(*whole.shape[:2], 50, i)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: part(files[job[0]], job[1]), work))
    for (i, box), pixels in zip(work, found, strict=True):
        np.testing.assert_array_equal(pixels, inside(wholes[i], box))


def test_without_libjpeg_turbo_3_auto_means_simplejpeg_and_turbojpeg_is_refused(monkeypatch):
    monkeypatch.setattr(decoders, "_library", lambda: None)
    assert choose_decoder("auto") == choose_decoder("simplejpeg") == "simplejpeg"
    assert describe("simplejpeg") == f"simplejpeg {simplejpeg.__version__}"
    with pytest.raises(UserError, match=r"config\.data\.image\.decoder=turbojpeg: .* pip install turbojpeg"):
        choose_decoder("turbojpeg")


@needs_turbojpeg
def test_with_libjpeg_turbo_3_auto_means_that_and_another_can_be_had():
    assert choose_decoder("auto") == choose_decoder("turbojpeg") == "turbojpeg"
    assert choose_decoder("simplejpeg") == "simplejpeg"
    assert describe("turbojpeg").startswith("turbojpeg (regions; ")


def test_a_library_of_another_version_or_kind_is_passed_over(monkeypatch):
    class Older:
        def __getattr__(self, name):
            raise AttributeError(name)  # libturbojpeg.so.0 of version 2 has none of the functions

    monkeypatch.setattr(decoders.ctypes, "CDLL", lambda name: Older())
    assert decoders._library.__wrapped__() is None


def test_an_unknown_decoder_is_a_mistake_with_a_hint():
    with pytest.raises(UserError, match=r"data\.image\.decoder: unknown name 'turbo'; did you mean turbojpeg\?"):
        choose_decoder("turbo")


# ---- channels --------------------------------------------------------------------------------------------------------


def test_as_many_channels_as_there_are_changes_nothing():
    image = smooth(4, 4)
    np.testing.assert_array_equal(with_channels(image, 3), image)


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5)], ids=["image", "batch"])
def test_grey_is_repeated(shape):
    grey = np.random.default_rng(0).integers(0, 256, (*shape, 1), dtype=np.uint8)
    found = with_channels(grey, 3)
    assert found.shape == (*shape, 3)
    assert all(np.array_equal(found[..., c], grey[..., 0]) for c in range(3))


@pytest.mark.parametrize(
    ("colour", "grey"),
    [((255, 255, 255), 255), ((0, 0, 0), 0), ((255, 0, 0), 76), ((0, 255, 0), 150), ((0, 0, 255), 29)],
)
def test_colour_is_weighted_to_grey(colour, grey):
    found = with_channels(np.full((2, 3, 3), colour, np.uint8), 1)
    assert found.dtype == np.uint8
    assert found.shape == (2, 3, 1)
    assert set(found.ravel()) == {grey}


# ---- resize ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_to_its_own_size_changes_nothing(channels):
    image = smooth(5, 7, channels)
    np.testing.assert_array_equal(resize(image, 5, 7), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_halving_averages_over_areas(channels):
    image = np.random.default_rng(0).integers(0, 256, (12, 18, channels), dtype=np.uint8)
    means = image.reshape(4, 3, 6, 3, channels).mean((1, 3))
    found = resize(image, 4, 6)
    assert found.shape == (4, 6, channels)
    np.testing.assert_allclose(found, means, atol=0.6)


def linear(size_in: int, size_out: int) -> np.ndarray:
    """Where bilinear resizing reads, between pixel centres and no further than the last."""
    return np.clip((np.arange(size_out) + 0.5) * size_in / size_out - 0.5, 0, size_in - 1)


@pytest.mark.parametrize(("to_height", "to_width"), [(30, 20), (15, 33), (7, 11), (20, 7)])
def test_other_resizes_are_linear_between_pixel_centres(to_height, to_width):
    image = coordinates(10, 12, step=20)
    found = resize(image, to_height, to_width)
    np.testing.assert_allclose(found[..., 0], np.tile(linear(10, to_height) * 20, (to_width, 1)).T, atol=1)
    np.testing.assert_allclose(found[..., 1], np.tile(linear(12, to_width) * 20, (to_height, 1)), atol=1)


def weights(size_in: int, size_out: int, interpolation: str) -> np.ndarray:
    """[size_out, size_in]: of the filter that antialiases, as wide as the pixels it makes, and whole at the borders."""
    scale = max(1.0, size_in / size_out)
    centres = (np.arange(size_out)[:, None] + 0.5) * size_in / size_out
    x = np.abs(np.arange(size_in) + 0.5 - centres) / scale
    if interpolation == "bilinear":
        kernel = np.clip(1 - x, 0, None)
    else:  # Keys 1981 with a = −½
        kernel = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return kernel / kernel.sum(1, keepdims=True)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("to_height", "to_width"), [(30, 20), (15, 70), (7, 11), (80, 90)])
def test_antialiasing_weights_all_pixels_that_a_new_one_covers(interpolation, to_height, to_width, channels):
    image = textured(60, 50)[..., :channels] // 2 + 60  # far enough from 0 and 255 for bicubic's overshoot
    exact = np.einsum(
        "ih,hwc,jw->ijc", weights(60, to_height, interpolation), image, weights(50, to_width, interpolation)
    )
    found = resize(image, to_height, to_width, Sampling(interpolation, antialias=True))
    assert found.shape == (to_height, to_width, channels)
    np.testing.assert_allclose(found, exact, atol=1.2)  # pixels are rounded after each direction


@pytest.mark.parametrize("channels", [1, 3])
def test_bicubic_without_antialiasing_goes_through_the_pixels(channels):
    image = textured(20, 30)[..., :channels]
    found = resize(image, 60, 90, Sampling("bicubic"))
    assert found.shape == (60, 90, channels)
    np.testing.assert_array_equal(found[1::3, 1::3], image)
    assert not np.array_equal(found, resize(image, 60, 90))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("step", [2, 3, 5])
def test_stripes_finer_than_the_new_pixels_become_grey(step, channels):
    stripes = np.broadcast_to((np.arange(120) % step == 0)[:, None, None] * np.uint8(240), (120, 90, channels))
    for height, width in ((120 // step, 90 // step), (120 // step - 3, 90 // step - 2)):
        found = resize(stripes, height, width)
        np.testing.assert_allclose(found, 240 / step, atol=1)


def test_the_samplings_differ_little_where_the_image_is_smooth():
    image = smooth(120, 90)
    for height, width in ((50, 40), (100, 80), (200, 130)):
        reference = resize(image, height, width, Sampling("bilinear", antialias=True)).astype(int)
        for sampling in (Sampling("bilinear"), Sampling("bicubic"), Sampling("bicubic", antialias=True)):
            inner = np.s_[3:-3, 3:-3]
            np.testing.assert_allclose(resize(image, height, width, sampling)[inner], reference[inner], atol=3)


def test_both_crops_take_the_sampling_asked_for():
    image, sampling = textured(90, 70), Sampling("bicubic", antialias=True)
    box = random_box(90, 70, (0.3, 0.6), (0.8, 1.2), np.random.default_rng(3))
    found = random_resized_crop(image, 24, (0.3, 0.6), (0.8, 1.2), np.random.default_rng(3), sampling)
    np.testing.assert_array_equal(found, resize(inside(image, box), 24, 24, sampling))
    found = resize_and_center_crop(image, 24, 1.0, sampling)
    np.testing.assert_array_equal(found, resize(image, 31, 24, sampling)[3:27])


# ---- the crop of evaluation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "top", "left"),
    [(40, 60, 0, 10), (60, 40, 10, 0), (40, 40, 0, 0), (40, 45, 0, 2), (43, 40, 1, 0)],
    ids=["landscape", "portrait", "square", "odd width", "odd height"],
)
def test_centre_is_cut_out_where_the_short_side_fits(height, width, top, left):
    image = coordinates(height, width)
    found = resize_and_center_crop(image, 40, 1.0)
    np.testing.assert_array_equal(found, image[top : top + 40, left : left + 40])


@pytest.mark.parametrize(("height", "width", "top", "left"), [(32, 48, 2, 10), (48, 32, 10, 2)])
def test_a_margin_is_left_around_the_crop(height, width, top, left):
    image = coordinates(height, width)  # the short side is 28 / 0.875 = 32 already
    np.testing.assert_array_equal(resize_and_center_crop(image, 28, 0.875), image[top : top + 28, left : left + 28])


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64)])
def test_a_large_image_is_averaged_down_then_cut(height, width):
    image = coordinates(height, width, step=2)
    halved = image.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))
    top, left = (height // 2 - 28) // 2, (width // 2 - 28) // 2
    np.testing.assert_array_equal(
        resize_and_center_crop(image, 28, 0.875), halved[top : top + 28, left : left + 28].astype(np.uint8)
    )


@pytest.mark.parametrize(("height", "width", "to"), [(8, 12, (32, 48)), (12, 8, (48, 32)), (24, 24, (32, 32))])
def test_an_image_smaller_than_the_crop_is_enlarged(height, width, to):
    top, left = (to[0] - 28) // 2, (to[1] - 28) // 2
    found = resize_and_center_crop(coordinates(height, width, step=10), 28, 0.875)
    rows, columns = linear(height, to[0])[top : top + 28] * 10, linear(width, to[1])[left : left + 28] * 10
    np.testing.assert_allclose(found[..., 0], np.tile(rows, (28, 1)).T, atol=1)
    np.testing.assert_allclose(found[..., 1], np.tile(columns, (28, 1)), atol=1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 100), (100, 3), (33, 500), (225, 224), (97, 101)])
@pytest.mark.parametrize("crop", [0.875, 1.0, 0.3])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_shape_gives_the_size_asked_for(height, width, crop, channels):
    found = resize_and_center_crop(np.full((height, width, channels), 9, np.uint8), 28, crop)
    assert found.shape == (28, 28, channels)
    assert set(found.ravel()) == {9}


# ---- the crop of training --------------------------------------------------------------------------------------------


def rectangle(out: np.ndarray) -> tuple[int, int, int, int]:
    """top, left, height, width of the crop that an enlarged coordinate image shows: its corners are exact."""
    (top, left), (bottom, right) = out[0, 0, :2].tolist(), out[-1, -1, :2].tolist()
    return top, left, bottom - top + 1, right - left + 1


def crops(height: int, width: int, count: int, area: tuple[float, float], ratio: tuple[float, float]):
    image, size = coordinates(height, width), max(height, width)  # no crop is larger, so each is enlarged
    return [
        rectangle(random_resized_crop(image, size, area, ratio, np.random.default_rng(seed))) for seed in range(count)
    ]


@pytest.mark.parametrize(
    ("area", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.25, 0.5), (1.0, 1.0)), ((0.1, 0.2), (0.5, 3.0))]
)
@pytest.mark.parametrize(("height", "width"), [(60, 80), (80, 60)])
def test_500_random_crops_keep_to_their_area_and_ratio(height, width, area, ratio):
    shares, aspects = [], []
    for top, left, h, w in crops(height, width, 500, area, ratio):
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        assert (h - 0.5) * (w - 0.5) <= area[1] * height * width  # sides are rounded
        assert (h + 0.5) * (w + 0.5) >= area[0] * height * width
        assert (w - 0.5) / (h + 0.5) <= ratio[1]
        assert (w + 0.5) / (h - 0.5) >= ratio[0]
        shares.append(h * w / (height * width))
        aspects.append(w / h)
    low, high = area
    if high < 1:  # every try fits, so that the share is uniform and the aspect log-uniform
        assert np.mean(shares) == pytest.approx((low + high) / 2, abs=0.2 * (high - low))
        middle = math.log(ratio[0] * ratio[1]) / 2
        assert np.mean(np.log(aspects)) == pytest.approx(middle, abs=0.02 + 0.1 * math.log(ratio[1] / ratio[0]))
    assert min(shares) < low + 0.1 * (high - low)
    assert max(shares) > high - 0.2 * (high - low)


def test_random_crops_lie_everywhere_about_equally_often():
    places = [(top, left) for top, left, h, w in crops(8, 8, 500, (9 / 16, 9 / 16), (1.0, 1.0))]
    found, counts = np.unique(places, axis=0, return_counts=True)
    assert found.tolist() == [[top, left] for top in range(3) for left in range(3)]
    assert np.all(np.abs(counts - 500 / 9) < 5 * np.sqrt(500 / 9))


@pytest.mark.parametrize(
    ("height", "width", "area", "ratio", "expected"),
    [
        (10, 200, (0.9, 1.0), (3 / 4, 4 / 3), (0, 93, 10, 13)),  # 4:3 at the full height
        (200, 10, (0.9, 1.0), (3 / 4, 4 / 3), (93, 0, 13, 10)),  # 3:4 at the full width
        (20, 20, (1.0, 1.0), (2.0, 2.0), (5, 0, 10, 20)),
        (20, 20, (1.0, 1.0), (0.5, 0.5), (0, 5, 20, 10)),
    ],
)
def test_when_no_try_fits_the_largest_allowed_centre_is_taken(height, width, area, ratio, expected):
    assert set(crops(height, width, 20, area, ratio)) == {expected}


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.5, 3.0)])
@pytest.mark.parametrize(("height", "width"), [(500, 375), (375, 500), (400, 400)])
def test_boxes_are_drawn_as_area_and_log_ratio_uniform_among_those_that_fit(height, width, ratio):
    area, count = (0.08, 1.0), 4000
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(height, width, area, ratio, rng) for _ in range(count)])
    h, w = boxes[:, 2], boxes[:, 3]
    found = {"share": h * w / (height * width), "log ratio": np.log(w / h)}
    # The same by integration over the rectangle of shares and log ratios.
    shares, logs = np.meshgrid(np.linspace(*area, 1001), np.linspace(*np.log(ratio), 1001))
    fits = (np.sqrt(shares * height * width * np.exp(logs)) <= width) & (
        np.sqrt(shares * height * width * np.exp(-logs)) <= height
    )
    assert (1 - fits.mean()) ** 10 < 1e-3  # hardly ever do ten tries fail
    for name, values in {"share": shares[fits], "log ratio": logs[fits]}.items():
        at = np.quantile(values, [0.1, 0.25, 0.5, 0.75, 0.9])
        below = [(found[name] <= x).mean() for x in at]
        np.testing.assert_allclose(below, [0.1, 0.25, 0.5, 0.75, 0.9], atol=4.5 * 0.5 / math.sqrt(count), err_msg=name)
    for start, room in ((boxes[:, 0], height - h), (boxes[:, 1], width - w)):
        assert start.min() >= 0
        assert (start <= room).all()
        free = room > 20  # where it lies is uniform: its mean share of the room is ½, of variance 1/12
        assert (start / np.maximum(room, 1))[free].mean() == pytest.approx(0.5, abs=4.5 / math.sqrt(12 * free.sum()))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (2, 3)])
def test_random_crop_of_tiny_images(height, width):
    image = np.full((height, width, 1), 9, np.uint8)
    for seed in range(20):
        found = random_resized_crop(image, 6, (0.08, 1.0), (3 / 4, 4 / 3), np.random.default_rng(seed))
        assert found.shape == (6, 6, 1)
        assert set(found.ravel()) == {9}


def test_random_crop_is_a_function_of_its_generator():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)

    def pixels(seed):
        rng = np.random.default_rng(seed)
        return random_resized_crop(image, 16, (0.08, 1.0), (3 / 4, 4 / 3), rng).tobytes()

    assert [pixels(seed) for seed in range(10)] == [pixels(seed) for seed in range(10)]
    assert len({pixels(seed) for seed in range(10)}) == 10


@pytest.mark.parametrize(("height", "width"), [(600, 900), (900, 600)])
@pytest.mark.parametrize("stretched", [False, True])
def test_boxes_of_resized_images_are_squares_of_it_at_sizes_and_places_as_likely_as_others(height, width, stretched):
    sides, rng = (256 / 224, 480 / 224), np.random.default_rng(0)
    boxes = np.array([resized_box(height, width, sides, rng, stretched=stretched) for _ in range(4000)])
    top, left, h, w = boxes.T
    short = min(height, width)
    np.testing.assert_allclose(h / height if stretched else h / short, w / width if stretched else w / short, atol=2e-3)
    times = short / np.where(height < width, h, w) if stretched else short / h
    assert sides[0] - 0.01 < times.min() < sides[0] + 0.01
    assert sides[1] - 0.01 < times.max() < sides[1] + 0.01
    quarters = np.quantile(times, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quarters, np.linspace(*sides, 5)[1:4], atol=0.04)
    for start, room in ((top, height - h), (left, width - w)):
        assert start.min() == 0
        assert (start <= room).all()
        assert (start / room).mean() == pytest.approx(0.5, abs=4.5 / math.sqrt(12 * 4000))


def test_a_box_of_a_resized_image_has_a_pixel_at_least():
    for stretched in (False, True):
        assert resized_box(1, 1, (2.0, 3.0), np.random.default_rng(0), stretched=stretched) == (0, 0, 1, 1)


def test_a_crop_of_an_image_resized_first_is_the_resized_box():
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (120, 180, 3), dtype=np.uint8), (0, 0), 4)
    for stretched, (h, w) in ((False, (80, 120)), (True, (80, 80))):
        top, left, height, width = resized_box(120, 180, (2.0, 2.0), np.random.default_rng(1), stretched=stretched)
        found = resize(image[top : top + height, left : left + width], 40, 40)
        down, right = round(top * h / 120), round(left * w / 180)
        usual = resize(image, h, w)[down : down + 40, right : right + 40]
        assert np.abs(found.astype(int) - usual)[2:-2, 2:-2].mean() < 2  # but for the fraction of a pixel
