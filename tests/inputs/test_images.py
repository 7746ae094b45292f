"""Image files of every kind: what they decode to, and which are refused with what reason."""

import io
import os
import pickle
import struct
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import PIL.Image
import pytest

from llave_jax.inputs.images import ImageError, load_image
from tests.data.mmeb_tree import encode, picture

PHOTO = picture(np.random.default_rng(1), 60, 40)
PIXELS = np.asarray(PHOTO)
JPEG = encode(PHOTO, "JPEG", quality=95)
PNG = encode(PHOTO, "PNG")
GRADIENT = np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16)


def png_of(width: int, height: int) -> bytes:
    """A PNG header that claims a size, with hardly any data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def animation(kind: str) -> bytes:
    other = PIL.Image.new("RGB", PHOTO.size, "red")
    return encode(PHOTO, kind, save_all=True, append_images=[other], lossless=True)


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def with_exif_rotation() -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encode(PHOTO, "PNG", exif=exif)


def cmyk() -> bytes:
    return encode(PHOTO.convert("CMYK"), "JPEG", quality=95)


GOOD = {
    "png": (PNG, 0),
    "jpeg": (JPEG, 12),
    "progressive jpeg": (encode(PHOTO, "JPEG", progressive=True, quality=95), 12),
    "cmyk jpeg": (cmyk(), 30),
    "gif": (encode(PHOTO, "GIF"), 60),
    "bmp": (encode(PHOTO, "BMP"), 0),
    "tiff": (encode(PHOTO, "TIFF"), 0),
    "tiff lzw": (encode(PHOTO, "TIFF", compression="tiff_lzw"), 0),
    "cmyk tiff": (encode(PHOTO.convert("CMYK"), "TIFF"), 2),
    "ppm": (encode(PHOTO, "PPM"), 0),
    "webp": (encode(PHOTO, "WEBP", lossless=True), 0),
    "rgba, alpha dropped": (encode(PHOTO.copy().convert("RGBA"), "PNG"), 0),
    "animated gif, first frame": (animation("GIF"), 60),
    "animated png, first frame": (animation("PNG"), 0),
    "animated webp, first frame": (animation("WEBP"), 0),
    "several pages of tiff, first page": (animation("TIFF"), 0),
    "exif rotation not applied": (with_exif_rotation(), 0),
    "bytes after the end": (PNG + b"trailing rubbish", 0),
    "wrong sRGB profile": (encode(PHOTO, "PNG", icc_profile=b"not a profile"), 0),
}

BAD = {
    "empty": (b"", "empty"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
    "json": (b'{"error": "not found"}', "not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "text": (b"hello", "not an image"),
    "zeros": (bytes(1000), "not an image"),
    "one byte": (b"\xff", "not an image"),
    "pdf": (b"%PDF-1.4\n1 0 obj", "not an image"),
    "eps is not run": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "zip": (b"PK\x03\x04" + bytes(100), "not an image"),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "not an image",
    ),
    "jpeg: magic only": (b"\xff\xd8\xff\xe0", "."),
    "jpeg: half": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg: header only": (JPEG[:200], "."),
    "jpeg: last tenth missing": (JPEG[: len(JPEG) * 9 // 10], "truncated"),
    "png: magic only": (PNG[:8], "."),
    "png: half": (PNG[: len(PNG) // 2], "truncated|corrupt"),
    "png: one bit of the data wrong": (flipped(PNG, len(PNG) // 2), "corrupt"),
    "png: header checksum wrong": (flipped(PNG, 20), "."),
    "png: no data": (png_of(60, 40), "truncated|corrupt"),
    "png: bomb": (png_of(60_000, 60_000), "too many pixels"),
    "png: wide bomb": (png_of(2**30, 2), "too many pixels"),
    "png: no width": (png_of(0, 40), "."),
    "gif: header only": (encode(PHOTO, "GIF")[:13], "."),
    "gif: half": (encode(PHOTO, "GIF")[:900], "truncated|corrupt"),
    "gif: size 0": (b"GIF89a\0\0\0\0\0\0\0;", "."),
    "bmp: half": (encode(PHOTO, "BMP")[:3000], "truncated|corrupt"),
    "bmp: no pixels": (encode(PHOTO, "BMP")[:18] + struct.pack("<ii", 0, 0) + bytes(28), "."),
    "tiff: half": (encode(PHOTO, "TIFF")[:3000], "."),
    "webp: half": (GOOD["webp"][0][:200], "."),
    "webp: magic only": (b"RIFF\x10\0\0\0WEBP", "."),
    "float tiff": (encode(PIL.Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "'F'"),
    "32-bit tiff": (encode(PIL.Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "'I'"),
    "ppm: cut": (b"P6\n60 40\n255\n" + bytes(100), "truncated|corrupt"),
    "ppm: header nonsense": (b"P6\nsixty forty\n255\n", "."),
}


@pytest.mark.parametrize("name", GOOD)
def test_usable_files_give_the_picture(name):
    data, tolerance = GOOD[name]
    image = load_image(data, name)
    assert image.mode == "RGB"
    assert image.size == PHOTO.size
    difference = np.abs(np.asarray(image).astype(int) - PIXELS)
    assert difference.max() <= tolerance


@pytest.mark.parametrize("name", BAD)
def test_unusable_files_are_refused_by_name_and_reason(name):
    data, reason = BAD[name]
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(data, "data.json row 17")
    assert str(caught.value).startswith("data.json row 17: ")


@pytest.mark.parametrize(
    "mode", ["L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "1", "HSV"]
)
def test_pillow_images_convert_as_the_authors_do(mode):
    image = PHOTO.convert("P").convert("PA") if mode == "PA" else PHOTO.convert(mode)
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_greyscale_keeps_its_upper_bits(kind):
    data = encode(PIL.Image.fromarray(GRADIENT), kind)
    for channel in np.moveaxis(np.asarray(load_image(data)), -1, 0):
        np.testing.assert_array_equal(channel, GRADIENT >> 8)


def test_golden_images_are_plain_pillow_conversions(golden):
    paths = [p for p in sorted((golden / "images").iterdir()) if p.suffix != ".json"]
    assert len(paths) > 20
    for path in paths:
        expected = np.asarray(PIL.Image.open(path).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(load_image(path)), expected)
        np.testing.assert_array_equal(np.asarray(load_image(path.read_bytes())), expected)


def test_the_content_decides_not_the_name(tmp_path):
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(PNG)
    np.testing.assert_array_equal(np.asarray(load_image(path)), PIXELS)


def test_zero_sized_pillow_image_is_refused():
    with pytest.raises(ImageError, match="no pixels"):
        load_image(PIL.Image.new("RGB", (0, 5)))


def test_large_image_within_the_limit_is_decoded():
    image = load_image(encode(PIL.Image.new("1", (12_000, 12_000)), "PNG"))
    assert image.size == (12_000, 12_000)


def test_pixel_limit_holds_when_pillow_has_none(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="too many pixels"):
        load_image(png_of(60_000, 60_000))


def test_paths_that_are_no_files(tmp_path):
    fifo = tmp_path / "pipe.png"
    os.mkfifo(fifo)
    empty = tmp_path / "empty.png"
    empty.touch()
    cases = {
        tmp_path / "missing.png": "does not exist",
        tmp_path: "not a regular file",
        fifo: "not a regular file",  # opening it would wait for ever
        empty: "empty",
        tmp_path / "no\0name": "cannot be read",
        tmp_path / ("x" * 300): "cannot be read",
        empty / "below_a_file.png": "cannot be read",
    }
    for path, reason in cases.items():
        with pytest.raises(ImageError, match=reason):
            load_image(path, "row 3")


def test_too_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageError, match="bytes; the limit is"):
        load_image(path)


def test_other_types_are_a_programming_error():
    with pytest.raises(TypeError, match="ndarray"):
        load_image(PIXELS)


def test_errors_survive_the_way_from_a_worker_process():
    error = pickle.loads(pickle.dumps(ImageError("rows.json row 2", "too blue")))
    assert (type(error), str(error)) == (ImageError, "rows.json row 2: too blue")


@hypothesis.given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"]),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
)
@hypothesis.settings(max_examples=300)
def test_damaged_files_decode_or_raise_image_error(kind, cut, changes):
    data = bytearray(encode(PHOTO, kind))
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    data = bytes(data[: int(cut * len(data)) + 1])
    try:
        image = load_image(data, "fuzz")
    except ImageError:
        return
    assert image.mode == "RGB"
    assert image.tobytes() == load_image(io.BytesIO(data).getvalue()).tobytes()
