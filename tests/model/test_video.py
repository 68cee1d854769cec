"""Frames of a video are those the original takes; what cannot be read is one line."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.base.errors import EdgeError, ImageError
from internvl_edge.model import video
from internvl_edge.model.preprocess import load_image, tile_image
from internvl_edge.model.video import frame_indices, load_video


def original_indices(total: int, count: int) -> list[int]:
    """The model card's rule for a whole video, in numpy."""
    last = total - 1
    offsets = np.round(float(last) / count * np.arange(count))
    return [int(index) for index in float(last) / count / 2 + offsets]


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_frames_are_the_originals(total: int, count: int) -> None:
    indices = frame_indices(total, count)
    assert indices == original_indices(total, count)
    assert indices == sorted(indices)
    assert 0 <= indices[0] <= indices[-1] < total


def test_known_frames_of_a_hundred() -> None:
    assert frame_indices(100, 8) == [6, 18, 31, 43, 56, 68, 80, 93]
    assert frame_indices(1, 3) == [0, 0, 0]


@pytest.mark.parametrize(("total", "count", "named"), [(0, 8, "0 frames"), (5, 0, "0 frames"), (5, 513, "513 frames")])
def test_impossible_numbers_are_refused(total: int, count: int, named: str) -> None:
    with pytest.raises(ImageError, match=named):
        frame_indices(total, count)


# Files


def write_video(path: Path, frames: int, codec: str = "mpeg4") -> Path:
    """A clip whose n-th frame is grey of level 8n."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for level in range(0, 8 * frames, 8):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("name", "codec"), [("clip.mp4", "mpeg4"), ("clip.mkv", "mpeg4"), ("clip.avi", "mjpeg")])
def test_right_frames_are_decoded(tmp_path: Path, name: str, codec: str) -> None:
    """Matroska does not say how many frames it has."""
    images = load_video(write_video(tmp_path / name, 30, codec), 4)
    levels = [float(np.asarray(image).mean()) for image in images]
    assert levels == pytest.approx([8 * index for index in frame_indices(30, 4)], abs=4)
    assert {(image.mode, image.size) for image in images} == {("RGB", (64, 48))}
    tiles = [tile_image(load_image(image), max_tiles=1) for image in images]
    assert [len(tile) for tile in tiles] == [1] * 4


def test_a_short_clip_gives_frames_twice(tmp_path: Path) -> None:
    assert len(load_video(write_video(tmp_path / "short.mp4", 2), 8)) == 8


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_video(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("av")
    assert "absent.mp4" in refusal(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_text("hello, this is text\n" * 50)
    assert "text.mp4" in refusal(tmp_path / "text.mp4")
    whole = write_video(tmp_path / "clip.avi", 30, "mjpeg").read_bytes()
    (tmp_path / "half.avi").write_bytes(whole[: len(whole) // 2])
    assert "half.avi cannot be read" in refusal(tmp_path / "half.avi")


def test_video_shorter_than_it_says_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "clip.mp4", 30)
    monkeypatch.setattr(video, "frame_indices", lambda *_, **__: [0, 40])
    assert "clip.mp4 ends after 30 frames, frame 40 is missing" in refusal(path)


def test_large_frames_are_refused(tmp_path: Path) -> None:
    assert "64x48 = 3072" in refusal(write_video(tmp_path / "clip.mp4", 2), max_pixels=3071)


def test_missing_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse_av(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real_import(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "av", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse_av)
    with pytest.raises(EdgeError, match=r"pip install 'internvl-edge\[video\]'"):
        load_video(tmp_path / "clip.mp4")
