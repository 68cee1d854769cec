"""Which of the engines in a repository are downloaded: those that this GPU and this TensorRT can run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.tensorrt_engines import CAPACITY
from internvl_edge.base.errors import EngineError
from internvl_edge.runtime import find
from internvl_edge.runtime.engines.tensorrt import flavour
from internvl_edge.runtime.engines.tensorrt.record import ENGINES, BuildOptions, EngineRecord

FILES = {name: {"bytes": 3, "sha256": "0" * 64} for name in (*ENGINES.values(), "timing.cache")}
RTX = EngineRecord("rtx", "tensorrt_rtx", "1.7.1", (86, 89), BuildOptions("float16", CAPACITY), {}, FILES)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The records of three devices, without their engines; TensorRT for RTX 1.7.1 is installed."""
    orin = replace(RTX, target="orin", flavour="tensorrt", version="10.16", compute_capabilities=(87,))
    newer = replace(RTX, target="newer", version="1.8.0", compute_capabilities=(89,))
    for record in (RTX, orin, newer):
        (tmp_path / "engines" / record.target).mkdir(parents=True)
        record.write(tmp_path / "engines" / record.target)

    def load(name: str) -> SimpleNamespace:
        if name != "tensorrt_rtx":
            raise EngineError(f"{name} cannot be imported")
        return SimpleNamespace(version="1.7.1")

    monkeypatch.setattr(flavour, "load_flavour", load)
    return tmp_path


@pytest.mark.parametrize(("sm", "expected"), [(89, sorted(FILES)), (86, sorted(FILES)), (87, []), (120, [])])
def test_only_what_runs_here_is_named(folder: Path, sm: int, expected: list[str]) -> None:
    assert sorted(find._engine_files(folder, sm)) == [f"engines/rtx/{name}" for name in expected]


def test_a_record_that_cannot_be_read_is_passed_over(folder: Path) -> None:
    (folder / "engines" / "newer" / "engine.json").write_text("{")
    assert find._engine_files(folder, 89)
    (folder / "engines" / "rtx" / "engine.json").write_text('{"format_version": 99}')
    assert find._engine_files(folder, 89) == []


def test_without_a_gpu_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from internvl_edge.runtime.engines.tensorrt import cuda

    def missing(*arguments: object) -> None:
        raise EngineError("CUDA finds no GPU here")

    monkeypatch.setattr(cuda, "Cuda", missing)
    assert find._present_gpu() is None
