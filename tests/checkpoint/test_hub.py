"""CHECKPOINT as a folder never touches the network; as a hub id it is downloaded, preferably as safetensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from internvl_edge.base.errors import CheckpointError
from internvl_edge.checkpoint.hub import resolve_checkpoint, resolve_configuration


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Replaces the download; what was asked for. The fake hub has the files in `tmp_path / "hub"`."""
    asked: list[list[str]] = []
    (tmp_path / "hub").mkdir()

    def download(repo: str, allow_patterns: list[str], **options: Any) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_local_folder_is_itself(downloads: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "OpenGVLab" / "InternVL2_5-1B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("OpenGVLab/InternVL2_5-1B") == Path("OpenGVLab/InternVL2_5-1B")
    assert downloads == []


def test_a_hub_id_is_downloaded_without_pickles(downloads: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "hub" / "model.safetensors").touch()
    assert resolve_checkpoint("OpenGVLab/InternVL2_5-1B") == tmp_path / "hub"
    assert len(downloads) == 1
    assert not any(pattern.endswith((".bin", ".pth", ".pkl")) for pattern in downloads[0])


def test_a_plan_needs_the_configuration_and_whether_the_cache_is_in_8_bits(downloads: list[list[str]]) -> None:
    resolve_configuration("OpenGVLab/InternVL2_5-1B")
    resolve_checkpoint("OpenGVLab/InternVL2_5-1B")
    assert downloads[0] == ["config.json", "kv_cache_scales.npz"]
    assert "kv_cache_scales.npz" in downloads[1]


def test_bin_shards_are_fetched_only_where_there_is_nothing_else(downloads: list[list[str]]) -> None:
    resolve_checkpoint("OpenGVLab/InternVL2_5-8B-AWQ")
    assert "pytorch_model*.bin" not in downloads[0]
    assert "pytorch_model*.bin" in downloads[1]


@pytest.mark.parametrize("text", ["nowhere", "./nowhere", "../a/b", "a/b/c", "/absolute/nowhere", "two words/x"])
def test_what_is_neither_is_refused_without_asking(downloads: list[list[str]], text: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(text)
    assert downloads == []


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as raised:
        resolve_checkpoint("OpenGVLab/InternVL2_5-1B")
    assert "no route" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_only_a_download_needs_the_package_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert resolve_checkpoint(str(tmp_path)) == resolve_configuration(str(tmp_path)) == tmp_path
    for resolve in (resolve_checkpoint, resolve_configuration):
        with pytest.raises(CheckpointError) as raised:
            resolve("OpenGVLab/InternVL2_5-1B")
        assert str(raised.value) == (
            "downloading OpenGVLab/InternVL2_5-1B needs the package huggingface_hub: pip install 'internvl-edge[hub]', "
            "or give a checkpoint folder"
        )
