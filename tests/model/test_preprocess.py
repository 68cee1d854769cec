"""Tiles are byte for byte the original's; bad images are refused with one line before anything large is allocated."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.repository import REPOSITORY
from internvl_edge.base.errors import ImageError
from internvl_edge.model.preprocess import MAX_ASPECT_RATIO, image_size, load_image, tile_grid, tile_image

GRID_ROWS = json.loads((REPOSITORY / "tests" / "oracle" / "tile_grid_table.json").read_text())["rows"]
REMOTE = ("internvl2_5-internlm2-tiny", "internvl2_5-qwen2-tiny")


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Any:
    """Nothing that Pillow would like to say may reach the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG"} | options)
    return buffer.getvalue()


def png(width: int, height: int, scanlines: bytes) -> bytes:
    """A PNG written by hand: 8-bit grey, whatever the header says about its size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", scanlines) + chunk(b"IEND", b"")


def zeros(count: int, blocks: int = 1000) -> bytes:
    """The zlib stream of `count` zero bytes: one block repeated, since a full flush makes blocks independent."""
    squeeze = zlib.compressobj(9, wbits=-15)
    block = squeeze.compress(bytes(count // blocks)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    checksum = count % 65521 << 16 | 1  # Adler-32 of zeros
    return b"\x78\xda" + block * blocks + squeeze.flush() + struct.pack(">I", checksum)


def test_hand_made_zlib_stream_is_a_real_one() -> None:
    assert zlib.decompress(zeros(50_000, blocks=10)) == bytes(50_000)


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The grid


@pytest.mark.parametrize("row", GRID_ROWS, ids=lambda r: f"{r['width']}x{r['height']}-{r['min_num']}-{r['max_num']}")
def test_grid_is_the_originals(row: dict[str, int]) -> None:
    size, least, most = (row["width"], row["height"]), row["min_num"], row["max_num"]
    assert tile_grid(*size, min_tiles=least, max_tiles=most) == (row["cols"], row["rows"])
    tiles = tile_image(Image.new("RGB", size), min_tiles=least, max_tiles=most)
    assert len(tiles) == row["n_tiles_with_thumbnail"]


def test_grid_is_chosen_in_double_precision() -> None:
    assert tile_grid(672, 576) == (4, 3)


def test_oracle_grid_table_is_the_committed_one(full_oracle: Path) -> None:
    assert json.loads((full_oracle / "tile_grid_table.json").read_text())["rows"] == GRID_ROWS


def reference_grid(width: int, height: int, min_tiles: int, max_tiles: int, size: int) -> tuple[int, int]:
    """The rule in exact arithmetic: smallest difference, ties by area against half the grid's pixels."""
    from fractions import Fraction

    ratio = Fraction(width, height)
    best, least = (1, 1), None
    for area in range(min_tiles, max_tiles + 1):
        for columns in (c for c in range(1, area + 1) if area % c == 0):
            difference = abs(ratio - Fraction(columns, area // columns))
            if least is None or difference < least:
                best, least = (columns, area // columns), difference
            elif difference == least and 2 * width * height > size * size * area:
                best = (columns, area // columns)
    return best


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from((1, 2, 4, 6, 9, 12)))
def test_grid_minimizes_the_difference_of_aspect_ratios(width: int, height: int, max_tiles: int) -> None:
    columns, rows = tile_grid(width, height, max_tiles=max_tiles)
    assert columns * rows <= max_tiles
    exact = reference_grid(width, height, 1, max_tiles, 448)
    difference = abs(width / height - columns / rows)
    assert difference == pytest.approx(abs(width / height - exact[0] / exact[1]), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("limits", [(0, 12), (5, 4), (1, 129)])
def test_impossible_tile_limits_are_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"{limits[0]} to {limits[1]}"):
        tile_grid(100, 100, min_tiles=limits[0], max_tiles=limits[1])


# The tiles


@pytest.mark.parametrize("checkpoint", REMOTE)
def test_tiles_are_byte_identical_to_the_original(oracle: Path, checkpoint: str) -> None:
    golden = json.loads((oracle / checkpoint / "golden.json").read_text())
    compared = 0
    for file, entry in golden["preprocess"].items():
        image = load_image(oracle / "images" / file)
        assert image.size == tuple(entry["pil_size"])
        for max_tiles, expected in entry["runs"].items():
            tiles = tile_image(image, max_tiles=int(max_tiles))
            assert [hashlib.sha256(tile.tobytes()).hexdigest() for tile in tiles] == expected["uint8_tile_sha256"], file
            compared += len(tiles)
    assert compared > 40


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 12), st.booleans())
def test_tiles_are_the_resized_image_cut_row_by_row(width: int, height: int, max_tiles: int, thumbnail: bool) -> None:
    image, side = picture(width, height, seed=width), 28
    columns, rows = tile_grid(width, height, image_size=side, max_tiles=max_tiles)
    tiles = tile_image(image, image_size=side, max_tiles=max_tiles, use_thumbnail=thumbnail)
    assert tiles.dtype == np.uint8
    assert tiles.flags.c_contiguous
    assert tiles.shape[1:] == (side, side, 3)
    resized = image.resize((columns * side, rows * side))
    for index in range(columns * rows):
        left, top = index % columns * side, index // columns * side
        assert np.array_equal(tiles[index], np.asarray(resized.crop((left, top, left + side, top + side))))
    extra = tiles[columns * rows :]
    assert len(extra) == (1 if thumbnail and columns * rows > 1 else 0)
    if len(extra):
        assert np.array_equal(extra[0], np.asarray(image.resize((side, side))))


# Decoding


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    image = picture(20, 10)
    data = encoded(image)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source in (path, str(path), data, image):
        assert load_image(source).tobytes() == image.tobytes()


def test_alpha_is_dropped_not_composited() -> None:
    image = picture(9, 7)
    transparent = image.copy()
    transparent.putalpha(0)
    assert load_image(encoded(transparent)).tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_modes_go_through_pillows_conversion(mode: str) -> None:
    image = picture(9, 7, mode)
    assert load_image(image).tobytes() == image.convert("RGB").tobytes()


def test_palette_with_transparency_keeps_its_colours_and_does_not_warn() -> None:
    image = picture(9, 7, "P")
    data = encoded(image, transparency=bytes(range(200)))
    assert load_image(data).tobytes() == image.convert("RGB").tobytes()
    opened = Image.open(io.BytesIO(data))
    load_image(opened)
    assert "transparency" in opened.info  # the caller's image is not changed


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_270),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_90),
    ],
)
def test_photographs_are_turned_upright_on_request(
    tmp_path: Path, orientation: int, upright: Image.Transpose | None, file: bool
) -> None:
    """What each orientation means is in EXIF 2.32, tag 0x0112: where the first row and column of pixels are seen."""
    image = picture(30, 10)
    noted = Image.Exif()
    noted[0x0112] = orientation
    data: bytes | Path = encoded(image, exif=noted)
    if file:
        (tmp_path / "photo.png").write_bytes(data)  # type: ignore[arg-type]
        data = tmp_path / "photo.png"
    expected = image if upright is None else image.transpose(upright)
    assert load_image(data, exif=True).size == expected.size
    assert load_image(data, exif=True).tobytes() == expected.tobytes()
    assert load_image(data).tobytes() == image.tobytes()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_says_the_size_that_is_read(form: str, orientation: int) -> None:
    noted = Image.Exif()
    noted[0x0112] = orientation
    data = encoded(picture(30, 10), format=form, exif=noted)
    assert image_size(data) == load_image(data).size
    assert image_size(data, exif=True) == load_image(data, exif=True).size


def test_oracle_exif_image_is_left_as_stored_and_can_be_turned(oracle: Path) -> None:
    path = oracle / "images" / "exif6_640x480.jpg"
    assert load_image(path).size == (640, 480)
    assert load_image(path, exif=True).size == (480, 640)


def test_only_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


# Refusals


def test_pixel_bomb_is_refused_from_its_header() -> None:
    data = png(50000, 50000, zeros(50000 * 50001))
    assert len(data) < 4_000_000
    tracemalloc.start()
    message = refusal(data)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert "50000x50000 = 2500000000" in message
    assert "100000000" in message


def test_pixel_limit_is_ours_and_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(30, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert load_image(data).size == (30, 20)
    assert "30x20 = 600" in refusal(data, max_pixels=599)
    assert load_image(data, max_pixels=600).size == (30, 20)
    assert "30x20 = 600" in refusal(picture(30, 20), max_pixels=599)


def test_image_larger_than_pillows_warning_level_is_decoded_silently() -> None:
    width, height = 9500, 9500
    assert Image.MAX_IMAGE_PIXELS is not None
    assert width * height > Image.MAX_IMAGE_PIXELS
    assert load_image(png(width, height, zlib.compress(bytes((width + 1) * height), 1))).size == (width, height)


def test_extreme_aspect_ratio_is_refused_before_decoding() -> None:
    assert load_image(Image.new("RGB", (1, MAX_ASPECT_RATIO))).size == (1, MAX_ASPECT_RATIO)
    assert "1x100000" in refusal(png(1, 100000, b"not even pixels"))
    assert "100000x1" in refusal(png(100000, 1, b"not even pixels"))


def test_image_without_pixels_is_refused() -> None:
    assert "0x0" in refusal(Image.new("RGB", (0, 0)))
    assert "0x5" in refusal(Image.new("RGB", (0, 5)))
    assert "no pixels" in refusal(png(0, 0, b""))
    with pytest.raises(ImageError, match="0x5"):
        tile_grid(0, 5)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_truncated_file_is_refused_and_says_so(file_format: str) -> None:
    data = encoded(picture(64, 64), format=file_format)
    for kept in (5, 20, len(data) // 2, len(data) - 64):
        assert str(kept) in refusal(data[:kept])


@given(st.binary(min_size=1, max_size=40), st.integers(0, 400))
def test_damaged_file_is_an_image_or_one_line(noise: bytes, position: int) -> None:
    data = bytearray(encoded(picture(16, 8)))
    data[position : position + len(noise)] = noise
    try:
        outcome = load_image(bytes(data)).mode
    except ImageError as error:
        outcome = str(error)
    assert outcome == "RGB" or (outcome.startswith("image of") and "\n" not in outcome)


def test_things_that_are_no_image_are_refused(tmp_path: Path) -> None:
    assert "is empty" in refusal(b"")
    assert "not an image" in refusal(b"hello, this is text")
    assert "absent.png" in refusal(tmp_path / "absent.png")
    assert str(tmp_path) in refusal(tmp_path)
    assert "int" in refusal(7)
    assert "null" in refusal("a\0b.png")
    # Pillow would start another program for this one.
    assert "not an image" in refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
