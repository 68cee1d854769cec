"""The forms in which people have images, and greyscale with more than 8 bits, transparency and damaged sources."""

from __future__ import annotations

import base64
import io
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_edge.base.errors import ImageError
from internvl_edge.model.preprocess import load_image

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def forms(folder: Path) -> dict[str, Any]:
    data = png(Image.fromarray(PIXELS))
    path = folder / "a picture with späces.png"
    path.write_bytes(data)
    encoded = base64.b64encode(data).decode()
    return {
        "path": path,
        "text": str(path),
        "file address": path.as_uri(),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "BytesIO": io.BytesIO(data),
        "open file": path.open("rb"),
        "array": PIXELS,
        "transposed array": np.ascontiguousarray(PIXELS.transpose(1, 0, 2)).transpose(1, 0, 2),
        "Pillow image": Image.fromarray(PIXELS),
        "data address": f"data:image/png;base64,{encoded}",
        "data address in percent signs": f"data:image/png;base64,{encoded.replace('+', '%2B').replace('/', '%2F')}",
    }


def test_every_form_gives_the_same_pixels(tmp_path: Path) -> None:
    for name, source in forms(tmp_path).items():
        np.testing.assert_array_equal(np.asarray(load_image(source)), PIXELS, err_msg=name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/" + "x" * 500, "is an address; images are not fetched"),
        ("HTTP://example.org/a.png", "is an address"),
        ("data:image/png;base64,%%%", "a data: address of 25 characters is damaged"),
        ("data:image/png", "it has no comma"),
        ("data:image/png;base64," + "QUJD" * 50_000, "is damaged, has no pixels"),
        ("file:///no/such/file.png", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        (np.zeros((4, 4), np.uint8), r"uint8 \[4, 4\], expected pixels as uint8 \[height, width, 3\]"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((0, 4, 3), np.uint8), "expected pixels"),
        (io.StringIO("text"), "open it in binary mode"),
        (io.BytesIO(b""), "is empty"),
        (3, "an image is a int, expected"),
        (None, "an image is a NoneType, expected"),
    ],
)
def test_what_is_no_image_is_one_short_line(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load_image(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 400


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    """To open one waits until somebody writes: a batch with one among its images would never end."""
    pipe = tmp_path / "a.png"
    os.mkfifo(pipe)
    writer = threading.Timer(5, lambda: os.open(pipe, os.O_RDWR | os.O_NONBLOCK))  # ends the wait of a failing test
    writer.start()
    with pytest.raises(ImageError, match=r"a\.png is a pipe and no file; check the path"):
        load_image(pipe)
    writer.cancel()


# ---- more than 8 bits ----

SIXTEEN = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF"])
def test_16_bit_greyscale_is_scaled(kind: str) -> None:
    file = io.BytesIO()
    if kind == "big-endian TIFF":
        Image.frombytes("I;16B", (64, 64), SIXTEEN.astype(">u2").tobytes()).save(file, "TIFF")
    else:
        Image.fromarray(SIXTEEN).save(file, kind)
    found = np.asarray(load_image(file.getvalue()))
    np.testing.assert_allclose(found[:, :, 0], SIXTEEN / 257, atol=0.51)
    assert (found == found[:, :, :1]).all()


def test_8_bit_values_widened_to_16_come_back() -> None:
    wide = Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257)
    np.testing.assert_array_equal(np.asarray(load_image(png(wide)))[:, :, 0], PIXELS[:, :, 0])


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 70_000]], np.int32),
        np.array([[-5, 9]], np.int32),
        np.array([[0.0, 1.0]], np.float32),
        np.array([[0.0, 300.0]], np.float32),
        np.array([[np.nan, 3.0]], np.float32),
        np.array([[np.inf, 3.0]], np.float32),
    ],
)
def test_32_bit_greyscale_of_unknown_range_is_refused(values: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ImageError, match="convert it to 8 or 16 bits"):
        load_image(Image.fromarray(values))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_greyscale_that_fits_8_bits_is_as_pillow_has_it(dtype: Any) -> None:
    image = Image.fromarray(PIXELS[:, :, 0].astype(dtype))
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(image.convert("RGB")))


# ---- transparency ----


def test_transparency_is_dropped_as_in_the_original_unless_a_background_is_given() -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[0, 0] = 200, 100, 50, 255
    pixels[1, 1] = 0, 0, 0, 128
    data = png(Image.fromarray(pixels))
    assert np.asarray(load_image(data))[3, 3].tolist() == [0, 0, 0]
    white = np.asarray(load_image(data, background="white"))
    assert white[3, 3].tolist() == [255, 255, 255]
    assert white[0, 0].tolist() == [200, 100, 50]
    assert white[1, 1].tolist() == [127, 127, 127]
    assert np.asarray(load_image(data, background="#ff0000"))[3, 3].tolist() == [255, 0, 0]


def test_a_palette_with_a_transparent_colour_gets_the_background_too() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0)
    assert np.asarray(load_image(file.getvalue(), background="white"))[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_opaque_images_do_not_change_with_a_background() -> None:
    np.testing.assert_array_equal(np.asarray(load_image(Image.fromarray(PIXELS), background="white")), PIXELS)


def test_a_background_that_is_no_colour_is_named() -> None:
    with pytest.raises(ImageError, match="background 'whit' is no color"):
        load_image(Image.fromarray(PIXELS), background="whit")
