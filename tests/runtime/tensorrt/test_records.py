"""`engine.json`: only what `build` writes is read, and no name in it becomes a path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.parsers import Record, outcomes
from internvl_edge.base.errors import EngineError
from internvl_edge.runtime.engines.tensorrt.record import ENGINES, BuildOptions, EngineRecord


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "fake"
    folder.mkdir()
    for name in ENGINES.values():
        (folder / name).write_bytes(b"engine")
    files = {name: {"bytes": 6, "sha256": "0" * 64} for name in ENGINES.values()}
    record = EngineRecord(
        "fake", "tensorrt_rtx", "1.7.1", (86, 89), BuildOptions("float16"), {"vision.onnx": "0" * 64}, files
    )
    record.write(folder)
    assert EngineRecord.read(folder) == record
    return folder


def values_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    return values


def refusal(folder: Path, text: str) -> str:
    (folder / "engine.json").write_text(text, encoding="utf-8")
    with pytest.raises(EngineError) as raised:
        EngineRecord.read(folder)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 400
    return str(raised.value)


MISTAKES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "'../../x' is no plain name": lambda v: v.update(target="../../x"),
    "'.hidden' is no plain name": lambda v: v.update(target=".hidden"),
    "rename its folder": lambda v: v.update(target="another"),
    "'../vision.engine' is no plain name": lambda v: v["files"].update({"../vision.engine": {}}),
    "files is 7, expected an object": lambda v: v.update(files=7),
    "files.vision.engine is 7": lambda v: v["files"].update({"vision.engine": 7}),
    "files.vision.engine: bytes is '6'": lambda v: v["files"]["vision.engine"].update(bytes="6"),
    "files.vision.engine: sha256 is missing": lambda v: v["files"]["vision.engine"].pop("sha256"),
    "files.decoder.engine is missing": lambda v: v["files"].pop("decoder.engine"),
    "options.wings is not known": lambda v: v["options"].update(wings=2),
    "options.capacity is 0": lambda v: v["options"].update(capacity=0),
    "options.capacity is 1000000000": lambda v: v["options"].update(capacity=10**9),
    "options.tiles is True": lambda v: v["options"].update(tiles=True),
    "options.profiles is 4": lambda v: v["options"].update(profiles=4),
    "dtype 'int3' is not known": lambda v: v["options"].update(dtype="int3"),
    "flavour 'tensorflow'": lambda v: v.update(flavour="tensorflow"),
    "compute_capabilities is ()": lambda v: v.update(compute_capabilities=[]),
    "compute_capabilities[0] is '86'": lambda v: v.update(compute_capabilities=["86"]),
    "figures.vision.seconds is 'x'": lambda v: v.update(figures={"vision": {"seconds": "x"}}),
    "format_version is None": lambda v: v.pop("format_version"),
    "format_version is '1'": lambda v: v.update(format_version="1"),
    "format_version is 0": lambda v: v.update(format_version=0),
    "target is missing": lambda v: v.pop("target"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_no_build_writes_is_named(folder: Path, message: str) -> None:
    values = values_of(folder)
    MISTAKES[message](values)
    assert message in refusal(folder, json.dumps(values))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "3", "NaN", "[" * 9000, '{"a": 1, "a": 1}', '"\\ud800"', '{"format_version": NaN}']
)
def test_what_is_no_record_is_damaged(folder: Path, text: str) -> None:
    assert "is damaged" in refusal(folder, text)


def test_mutated_records_are_read_or_refused() -> None:
    read = sum(line is None for _, _, line in outcomes(Record, 2000))
    assert 20 < read < 1000
