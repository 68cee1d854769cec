"""Turn a video into a few still images at even distances, like `load_video` on the InternVL model cards.

This module knows PyAV (the `video` extra) and which frames to take. `preprocess` (with one tile each) and
`prompt.video_question` use the frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from internvl_edge.base.errors import EdgeError, ImageError
from internvl_edge.base.extras import requires

from .preprocess import MAX_PIXELS

MAX_FRAMES = 512


def frame_indices(total: int, count: int) -> list[int]:
    """Return the indices of the frames that represent a video: the middle of each of `count` equal parts.

    Rounding follows the original (to even, then down), so a video shorter than `count` gives some frames twice.

    Args:
        total: frames in the video.
        count: frames to take, 1 to 512.

    Raises:
        ImageError: no frames, or a count out of range.
    """
    if not 1 <= count <= MAX_FRAMES:
        raise ImageError(f"{count} frames are asked for, expected 1 to {MAX_FRAMES}")
    if total < 1:
        raise ImageError("the video has 0 frames; give one with at least 1")
    part = (total - 1) / count
    return [int(part / 2 + round(part * index)) for index in range(count)]


def load_video(path: str | Path, count: int = 8, *, max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
    """Decode `count` frames of a video as RGB images, in order. Use `prompt.video_question` to ask about them.

    Args:
        path: the file.
        count: frames to take.
        max_pixels: most pixels (width x height) of one frame.

    Raises:
        EdgeError: PyAV is not installed.
        ImageError: missing or damaged file, no video in it, or beyond a limit.
    """
    with requires("video", "reading a video"):
        import av
    with _reading(path):
        with av.open(str(path)) as container:
            stream = _video_stream(container, path, max_pixels)
            total = stream.frames
        if not total:  # not every format gives the number of frames
            with av.open(str(path)) as container:
                total = sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
        wanted = frame_indices(total, count)
        with av.open(str(path)) as container:
            stream = _video_stream(container, path, max_pixels)
            stream.thread_type = "AUTO"
            return _take(container.decode(stream), wanted, path, max_pixels)


def _video_stream(container: Any, path: str | Path, max_pixels: int) -> Any:
    if not container.streams.video:
        raise ImageError(f"{path} has no video in it; give a video file")
    stream = container.streams.video[0]
    _check_size(stream, path, max_pixels)
    return stream


def _check_size(frame: Any, path: str | Path, max_pixels: int) -> None:
    if frame.width * frame.height > max_pixels:
        raise ImageError(
            f"{path} has frames of {frame.width}x{frame.height} = {frame.width * frame.height} pixels, "
            f"the limit is {max_pixels}; make them smaller"
        )


def _take(frames: Iterator[Any], wanted: list[int], path: str | Path, max_pixels: int) -> list[Image.Image]:
    """Return the wanted frames, and keep no others in memory. `wanted` does not decrease."""
    images: list[Image.Image] = []
    read = 0
    for index, frame in enumerate(frames):
        read = index + 1
        if index == wanted[len(images)]:
            _check_size(frame, path, max_pixels)  # a stream can change its size
            image = Image.fromarray(frame.to_ndarray(format="rgb24"))
            images += [image] * wanted.count(index)
            if len(images) == len(wanted):
                return images
    raise ImageError(f"{path} ends after {read} frames, frame {wanted[len(images)]} is missing; the file is incomplete")


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Turn errors of FFmpeg, for which PyAV has many types, into one line."""
    try:
        yield
    except EdgeError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path} cannot be read as a video ({reason}); check the file") from None
