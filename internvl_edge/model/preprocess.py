"""Turn an image into tiles as the original does: decode it within limits, choose a grid, resize and cut.

This module knows Pillow and arithmetic. It does not know the model: the pixels stay uint8, and the vision graph
normalizes them. Method: `load_image` and `dynamic_preprocess` as published on the InternVL model cards.
"""

from __future__ import annotations

import io
import os
import stat
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageColor, ImageOps

from internvl_edge.base.errors import ImageError
from internvl_edge.base.text import one_line, shown

MAX_PIXELS = 100_000_000
MAX_ASPECT_RATIO = 1000
MAX_TILES = 128

# Formats that have their size in the header and are decoded in this process. EPS and WMF are missing because Pillow
# passes them to other programs, and ICO because it holds images of another size than its own.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
# How the names of such files end, in lower case.
IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".j2k", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


# A path, `file://` or `data:` address, the bytes of a file, an open file, a Pillow image, or pixels uint8 [h, w, 3].
ImageSource = str | Path | bytes | bytearray | memoryview | BinaryIO | Image.Image | NDArray[np.uint8]
_SHOWN = 80
# The EXIF orientations that swap width and height.
_QUARTER_TURNS = (5, 6, 7, 8)


def is_image_source(value: Any) -> bool:
    """Whether a value is one image in any of the forms that `load_image` takes."""
    forms = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)
    return isinstance(value, forms) or hasattr(value, "read")


def load_image(
    source: ImageSource,
    *,
    exif: bool = False,
    background: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
) -> Image.Image:
    """Decode an image to RGB. Like the original, drop alpha and take the first frame of an animation.

    One difference is announced: greyscale with 16 bits is scaled to 8, where the original clips it to white.

    Args:
        source: see `ImageSource`. A Pillow image is not changed; addresses on the network are not fetched.
        exif: apply the EXIF orientation, as vLLM does; the original leaves pixels as they are stored.
        background: a color to put behind transparent pixels; None drops transparency as the original does.
        max_pixels: most pixels (width x height) of an image; read from the header before any memory is allocated.
        max_aspect_ratio: greatest longer side / shorter side.

    Raises:
        ImageError: missing, damaged or unsupported file, no pixels, or beyond a limit.
    """
    limits = (exif, background, max_pixels, max_aspect_ratio)
    if isinstance(source, Image.Image):
        return _decode(source, "image", *limits)
    if isinstance(source, np.ndarray):
        return _decode(_from_pixels(source), "image", *limits)
    if isinstance(source, str):
        source = _from_address(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode_bytes(bytes(source), *limits)
    if hasattr(source, "read"):
        return _decode_bytes(_read(source), *limits)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"an image is a {type(source).__name__}, expected a path, bytes, a file or a Pillow image")
    name = one_line(str(source), _SHOWN)
    try:
        if stat.S_ISFIFO(os.stat(source).st_mode):  # to open one waits for a writer
            raise ImageError(f"{name} is a pipe and no file; check the path")
        with open(source, "rb") as stream:
            return _decode(_open(stream, name), name, *limits)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} cannot be read ({reason}); check the path") from None


def _from_address(text: str) -> str | bytes:
    """The bytes of a `data:` address, the path of a `file://` one, or the text as it is."""
    scheme, _, rest = text.partition(":")
    if scheme.lower() == "data":
        header, comma, data = rest.partition(",")
        if not comma:
            raise ImageError(f"a data: address of {len(text)} characters is damaged (it has no comma)")
        try:
            return b64decode(unquote_to_bytes(data), validate=True) if ";base64" in header else unquote_to_bytes(data)
        except ValueError:
            raise ImageError(
                f"a data: address of {len(text)} characters is damaged (its base64 is not valid)"
            ) from None
    if rest.startswith("//") and scheme.lower() in ("http", "https", "ftp", "s3", "gs"):
        raise ImageError(
            f"{one_line(text, _SHOWN)} is an address; images are not fetched, download it and give the file"
        )
    return file_path(text)


def file_path(text: str) -> str:
    """The path in a `file://` address, or the text as it is."""
    return unquote(urlsplit(text).path) if text[:7].lower() == "file://" else text


def _from_pixels(pixels: NDArray[Any]) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ImageError(
            f"an array is {pixels.dtype} {list(pixels.shape)}, expected pixels as uint8 [height, width, 3]"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def _read(stream: Any) -> bytes:
    """The whole content of an open file; from its beginning where it can go back, as Pillow reads."""
    try:
        if hasattr(stream, "seekable") and stream.seekable():
            stream.seek(0)
        data = stream.read()
    except (OSError, ValueError) as error:
        raise ImageError(f"an image file cannot be read ({error})") from None
    if not isinstance(data, bytes):
        raise ImageError(f"an image file gives {type(data).__name__}, expected bytes; open it in binary mode")
    return data


def image_size(data: bytes, *, exif: bool = False) -> tuple[int, int]:
    """Return the width and height that `load_image` will find in an image file, from its header alone.

    Raises:
        ImageError: damaged or unsupported content.
    """
    name = f"image of {len(data)} bytes"
    image = _open(io.BytesIO(data), name)
    width, height = image.size
    if exif and image.format != "TIFF":  # Pillow turns these by itself, and its size says so already
        with _decoding(name):
            # The method of its class for PNG files would decode the pixels, to find a note behind them.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        if orientation in _QUARTER_TURNS:
            return height, width
    return width, height


def _decode_bytes(data: bytes, *limits: Any) -> Image.Image:
    name = f"image of {len(data)} bytes"
    return _decode(_open(io.BytesIO(data), name), name, *limits)


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


def tile_count(
    width: int,
    height: int,
    *,
    image_size: int = 448,
    max_tiles: int = 12,
    min_tiles: int = 1,
    use_thumbnail: bool = True,
) -> int:
    """Return the number of tiles that `tile_image` makes of an image of this size. Raises as `tile_grid`."""
    columns, rows = tile_grid(width, height, image_size=image_size, max_tiles=max_tiles, min_tiles=min_tiles)
    return columns * rows + (use_thumbnail and columns * rows != 1)


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


def _decode(
    image: Image.Image, name: str, exif: bool, background: str | None, max_pixels: int, max_aspect_ratio: float
) -> Image.Image:
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
        image = _eight_bits(image, name)
        if background is not None:
            return _on_background(image, background)
        if isinstance(image.info.get("transparency"), bytes):
            image = image.copy()
            del image.info["transparency"]  # it does not affect RGB, but Pillow would warn
        return image.convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit greyscale to 8 bits; Pillow's conversion would clip nearly all of it to white.

    Integers and floats of 32 bits have no range of their own: those that fit 8 bits are taken as they are.
    """
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        least, most = float(values.min()), float(values.max())
        if not (least >= 0 and most <= 255) or (image.mode == "F" and 0 < most <= 1):
            raise ImageError(
                f"{name} has 32-bit greyscale from {least:g} to {most:g}, of which nobody knows what is white; "
                "convert it to 8 or 16 bits"
            )
    return image


def require_color(text: str) -> tuple[int, ...]:
    """Return red, green, blue, and alpha where the text says one, 0 to 255. Raises ImageError: it is no color."""
    try:
        return ImageColor.getrgb(text)
    except ValueError:
        raise ImageError(f"background {shown(text)} is no color; give one such as white or #f0f0f0") from None


def _on_background(image: Image.Image, color: str) -> Image.Image:
    """The image over a color, where it has transparent pixels."""
    base = Image.new("RGBA", image.size, require_color(color))
    base.alpha_composite(image.convert("RGBA"))
    return base.convert("RGB")


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn any error of Pillow about damaged pixels into one line of ours.

    Pillow's own texts stay out of it: a server hands messages to strangers, and such a text has held an address in
    memory (CVE-2026-22778).
    """
    try:
        yield
    except ImageError:
        raise
    except Exception:
        raise ImageError(f"{name} cannot be decoded; the file is damaged or incomplete") from None
