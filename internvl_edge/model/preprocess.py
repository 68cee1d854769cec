"""Turn an image into tiles as the original does: decode it within limits, choose a grid, resize and cut.

This module knows Pillow and arithmetic. It does not know the model: the pixels stay uint8, and the vision graph
normalises them. Method: `load_image` and `dynamic_preprocess` as published on the InternVL 2.5 model cards.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from internvl_edge.base.errors import ImageError

MAX_PIXELS = 100_000_000
MAX_ASPECT_RATIO = 1000
MAX_TILES = 128

# Formats that have their size in the header and are decoded in this process. EPS and WMF are missing because Pillow
# passes them to other programs, and ICO because it holds images of another size than its own.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")


def load_image(
    source: str | Path | bytes | Image.Image,
    *,
    exif: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
) -> Image.Image:
    """Decode an image to RGB. Like the original, drop alpha and take the first frame of an animation.

    Args:
        source: a file, the bytes of a file, or a Pillow image (which is not changed).
        exif: apply the EXIF orientation; the original never does.
        max_pixels: most pixels (width x height) of an image; read from the header before any memory is allocated.
        max_aspect_ratio: greatest longer side / shorter side.

    Raises:
        ImageError: missing, damaged or unsupported file, no pixels, or beyond a limit.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "image", exif, max_pixels, max_aspect_ratio)
    if isinstance(source, bytes):
        name = f"image of {len(source)} bytes"
        return _decode(_open(io.BytesIO(source), name), name, exif, max_pixels, max_aspect_ratio)
    if not isinstance(source, str | Path):
        raise ImageError(f"an image is a {type(source).__name__}, expected a path, bytes or a Pillow image")
    try:
        with open(source, "rb") as stream:
            return _decode(_open(stream, str(source)), str(source), exif, max_pixels, max_aspect_ratio)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{source} cannot be read ({reason}); check the path") from None


def tile_grid(
    width: int, height: int, *, image_size: int = 448, max_tiles: int = 12, min_tiles: int = 1
) -> tuple[int, int]:
    """Return the grid (columns, rows) with the shape nearest to width / height, in IEEE double like the original.

    On an exact tie the later (larger) grid wins if the image has more than half of that grid's pixels.

    Raises:
        ImageError: an image without pixels, or tile limits outside 1 <= min_tiles <= max_tiles <= 128.
    """
    if width < 1 or height < 1:
        raise ImageError(f"the image has {width}x{height} pixels; give one with at least 1x1")
    if not 1 <= min_tiles <= max_tiles <= MAX_TILES:
        raise ImageError(f"tile limits are {min_tiles} to {max_tiles}, expected 1 <= minimum <= maximum <= {MAX_TILES}")
    ratio = width / height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _grids(min_tiles, max_tiles):
        difference = abs(ratio - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and width * height > 0.5 * image_size * image_size * columns * rows:
            best = (columns, rows)
    return best


def tile_image(
    image: Image.Image, *, image_size: int = 448, max_tiles: int = 12, min_tiles: int = 1, use_thumbnail: bool = True
) -> NDArray[np.uint8]:
    """Resize an RGB image to its grid and cut it: uint8 [tiles, image_size, image_size, 3], row-major, thumbnail last.

    A single tile gets no thumbnail. The resize is Pillow's antialiased bicubic and ignores the aspect ratio.

    Raises:
        ImageError: as `tile_grid`.
    """
    columns, rows = tile_grid(
        image.width, image.height, image_size=image_size, max_tiles=max_tiles, min_tiles=min_tiles
    )
    resized = _resize(image, columns * image_size, rows * image_size)
    tiles = resized.reshape(rows, image_size, columns, image_size, 3).swapaxes(1, 2)
    tiles = tiles.reshape(-1, image_size, image_size, 3)
    if use_thumbnail and columns * rows != 1:
        tiles = np.concatenate([tiles, _resize(image, image_size, image_size)[None]])
    return np.ascontiguousarray(tiles)


@lru_cache
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return every grid within the limits by increasing area. Equal areas keep the order of the original's Python set.

    That order can decide a tie when few areas are allowed (minimum = maximum = 6 at 13:12), so the set is filled in the
    same sequence. Hashes of integers do not vary between runs.
    """
    sides = range(1, max_tiles + 1)
    grids = {
        (columns, rows)
        for limit in range(min_tiles, max_tiles + 1)
        for columns in sides[:limit]
        for rows in sides[:limit]
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def _resize(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.uint8)


def _open(stream: BinaryIO, name: str) -> Image.Image:
    """Find the plugin of a stream and read the header.

    `Image.open` is not used, because it compares with a process-wide pixel limit and warns. Here the limit is an
    argument that the caller checks, and two threads can use different limits.
    """
    Image.init()
    prefix = stream.read(16)
    for label in FORMATS:
        if label not in Image.OPEN:
            continue
        factory, accepts = Image.OPEN[label]
        if accepts is None or isinstance(accepted := accepts(prefix), str) or not accepted:
            continue  # a string means that the decoder is not built in
        stream.seek(0)
        try:
            return factory(stream, "")
        except Exception:  # plugins raise nearly every built-in type on a header they cannot parse
            continue
    size = stream.seek(0, os.SEEK_END)
    found = "is empty" if size == 0 else f"({size} bytes) is damaged, has no pixels or is not an image"
    raise ImageError(f"{name} {found}; give one of {', '.join(FORMATS)}")


def _decode(image: Image.Image, name: str, exif: bool, max_pixels: int, max_aspect_ratio: float) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has {width}x{height} pixels; give one with at least 1x1")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width}x{height} = {width * height} pixels, the limit is {max_pixels}; make it smaller"
        )
    if max(width, height) > max_aspect_ratio * min(width, height):
        raise ImageError(f"{name} has {width}x{height} pixels, the limit is {max_aspect_ratio:g}:1; crop it")
    with _decoding(name):
        if exif:
            image = ImageOps.exif_transpose(image)
        if isinstance(image.info.get("transparency"), bytes):
            image = image.copy()
            del image.info["transparency"]  # it does not affect RGB, but Pillow would warn
        return image.convert("RGB")


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn any error of Pillow about damaged pixels into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be decoded ({reason}); the file is damaged or incomplete") from None
