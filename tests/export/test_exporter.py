"""An export is whole or not there: interrupted, killed, or out of disk."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tiny
from helpers.commands import start_code
from internvl_edge import export_bundle
from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.names import MANIFEST

# Exports argv[1] to argv[2] and waits in the middle of writing, having said so.
SLOW_EXPORT = """
import sys, time
from internvl_edge.export import export_bundle, weights
convert, count = weights.convert_blocks, 0

def slow(*arguments):
    global count
    count += 1
    if count == 20:
        print("half way", flush=True)
        time.sleep(60)
    return convert(*arguments)

weights.convert_blocks = slow
export_bundle(sys.argv[1], sys.argv[2])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def start_and_stop(checkpoint: Path, out: Path, number: signal.Signals) -> None:
    with start_code(SLOW_EXPORT, checkpoint, out) as started:
        assert started.stdout.readline() == "half way\n"
        assert any(out.parent.iterdir())  # something is being written
        os.kill(started.process.pid, number)
        assert started.process.wait(30) != 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(checkpoint: Path, tmp_path: Path, number: signal.Signals) -> None:
    start_and_stop(checkpoint, tmp_path / "bundle", number)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_looks_like_a_bundle(checkpoint: Path, tmp_path: Path) -> None:
    start_and_stop(checkpoint, tmp_path / "bundle", signal.SIGKILL)
    assert not (tmp_path / "bundle").exists()
    assert not any((folder / MANIFEST).exists() for folder in tmp_path.iterdir())
    export_bundle(checkpoint, tmp_path / "bundle")  # and does not stand in the way of the next
    Bundle.open(tmp_path / "bundle")


def test_an_interrupted_replacement_keeps_the_old_bundle(checkpoint: Path, tmp_path: Path) -> None:
    export_bundle(checkpoint, tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()}
    start_and_stop(checkpoint, tmp_path / "other", signal.SIGTERM)
    assert {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()} == before


def test_a_disk_that_fills_up_is_one_line_and_nothing_is_left(checkpoint: Path, tmp_path: Path) -> None:
    """The kernel refuses the bytes in the middle of a file, as a full disk does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from internvl_edge.cli import main; main()",
            "export",
            checkpoint,
            "-o",
            tmp_path / "b",
        ],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "is full" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_found_before_weights_are_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(EdgeError, match=r"has 0\.00 GB free"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeError, match="cannot write"):
        export_bundle(checkpoint, tmp_path / "file" / "bundle")


def test_the_same_export_is_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_bundle(checkpoint, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
