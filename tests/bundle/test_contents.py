"""What belongs to a bundle, in every format that is read, and what `--force` therefore keeps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.repository import REPOSITORY
from helpers.tiny import write_checkpoint
from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.contents import bundle_files, engine_files
from internvl_edge.export import export_bundle


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    return export_bundle(write_checkpoint(folder / "checkpoint"), folder / "bundle")


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "bundle")
    return tmp_path / "bundle"


def add_engines(bundle: Path, record: str = json.dumps({"files": {"decoder.engine": {}}})) -> Path:
    folder = bundle / "engines" / "rtx"
    folder.mkdir(parents=True)
    (folder / "engine.json").write_text(record)
    for name in ("decoder.engine", "decoder.runtime.cache"):
        (folder / name).touch()
    return folder


@pytest.fixture
def force(exported: Path) -> Callable[[Path], Path]:
    """Exports again over a bundle."""
    return lambda bundle: export_bundle(exported.parent / "checkpoint", bundle, force=True)


def test_a_bundle_and_its_engines_are_replaced(bundle: Path, force: Callable[[Path], Path]) -> None:
    add_engines(bundle)
    force(bundle)
    Bundle.open(bundle)
    assert not (bundle / "engines").exists()
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_bundles_of_format_1_have_contents() -> None:
    for path in sorted((REPOSITORY / "tests" / "data").glob("**/manifest.json")):
        assert bundle_files(path.parent) >= {"manifest.json", "vision.onnx", "engines/"}


@pytest.mark.parametrize("name", ["notes.txt", "engines/notes.txt", "engines/rtx/mine.engine", "vision.onnx.backup"])
def test_what_a_user_put_into_a_bundle_is_named_and_nothing_is_replaced(
    bundle: Path, name: str, force: Callable[[Path], Path]
) -> None:
    add_engines(bundle)
    (bundle / name).write_text("years of work")
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    with pytest.raises(EdgeError, match=rf"{bundle / name} is not part of it; remove that file or choose another"):
        force(bundle)
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before


@pytest.mark.parametrize(
    "manifest", ["{}", "[]", "{", '{"format_version": 99}', '{"format_version": 2, "name": "app"}']
)
def test_a_manifest_of_something_else_makes_no_bundle(
    bundle: Path, manifest: str, force: Callable[[Path], Path]
) -> None:
    (bundle / "manifest.json").write_text(manifest)
    with pytest.raises(EdgeError, match=rf"--force replaces a bundle alone: .*; remove {bundle} or choose another --o"):
        force(bundle)
    assert (bundle / "manifest.json").read_text() == manifest


def test_a_file_that_appears_while_an_export_runs_is_kept(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, force: Callable[[Path], Path]
) -> None:
    from internvl_edge.export import exporter

    original = exporter.build_tokenizer

    def meanwhile(*arguments: object) -> bytes:
        (bundle / "notes.txt").write_text("years of work")
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(exporter, "build_tokenizer", meanwhile)
    with pytest.raises(EdgeError, match=r"notes.txt is not part of it"):
        force(bundle)
    assert (bundle / "notes.txt").read_text() == "years of work"
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("record", ["", "[]", '{"files": 3}', "{}"])
def test_engines_with_a_damaged_record_are_not_ours(bundle: Path, record: str) -> None:
    folder = add_engines(bundle, record)
    with pytest.raises(EdgeError, match=r"engine\.json is damaged"):
        engine_files(folder)
    with pytest.raises(EdgeError, match=r"no engine\.json in it"):
        engine_files(bundle)
