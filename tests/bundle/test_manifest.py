"""The manifest is protected by a digest of itself, holds plain file names, and lists every file that is opened."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.manifests import change_manifest
from helpers.repository import REPOSITORY
from internvl_edge.base.errors import BundleError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import FileEntry, Manifest
from internvl_edge.bundle.names import VISION


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(REPOSITORY / "tests" / "data" / "format-1" / "mixed", tmp_path / "bundle"))
    Manifest.read(folder).write(folder)
    return folder


def test_it_reads_back_as_it_was_written(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    manifest.write(bundle)
    assert Manifest.read(bundle) == manifest


@pytest.mark.parametrize("name", ["../vision.onnx", "a/b", "/etc/passwd", "..", ""])
def test_names_of_files_are_plain(bundle: Path, name: str) -> None:
    def add(values: dict[str, Any]) -> None:
        values["files"][name] = {"bytes": 1, "sha256": "0"}

    change_manifest(bundle, add)
    with pytest.raises(BundleError, match="is not the plain name of a file"):
        Manifest.read(bundle)


def test_a_file_that_is_not_listed_is_not_opened(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    files = {name: entry for name, entry in manifest.files.items() if name != VISION}
    replace(manifest, files=files).write(bundle)
    with pytest.raises(BundleError, match=r"the manifest lists no vision\.onnx"):
        Bundle.open(bundle).path(VISION)


def test_a_listed_file_that_is_missing_is_named(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    replace(manifest, files={**manifest.files, "more.data": FileEntry(3, "0")}).write(bundle)
    with pytest.raises(BundleError, match=r"more\.data is missing"):
        Bundle.open(bundle)
