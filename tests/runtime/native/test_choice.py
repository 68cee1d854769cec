"""When the operators are used, how they are compiled, and that every failure leaves a bundle with its own."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from helpers import tiny
from helpers.commands import internvl_edge
from helpers.tiny_quantized import write_quantized
from internvl_edge import export_bundle
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.cli import cli
from internvl_edge.model.linear import INT8
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from internvl_edge.runtime.native import build, choice
from internvl_edge.runtime.native.build import NativeError, ensure_library
from internvl_edge.runtime.native.choice import SWITCH, Attention, choose_attention, find_library

MakeSources = Callable[..., Path]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with 4-bit weights in the decoder and a tower in floats."""
    folder = tmp_path_factory.mktemp("quantized")
    checkpoint, _ = write_quantized(tiny.write_checkpoint(folder / "float"), folder)
    return Bundle.open(export_bundle(checkpoint, folder / "bundle", dialects=["onnxruntime"]))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and kernels of one level, which compile fast."""
    monkeypatch.delenv(SWITCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "LEVELS", {kind: {"baseline": ()} for kind in build.LEVELS})
    try:
        build.find_compiler(), build.machine_kind()
    except NativeError as error:
        pytest.skip(str(error))
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeSources:
    """Makes the library's sources with something replaced in a file."""

    def make(file: str, old: str, new: str) -> Path:
        folder = tmp_path / "sources"
        folder.mkdir()
        for path in build._sources():
            shutil.copy(path, folder)
        text = (folder / file).read_text(encoding="utf-8")
        assert old in text
        (folder / file).write_text(text.replace(old, new), encoding="utf-8")
        monkeypatch.setattr(build, "_SOURCES", folder)
        return folder

    return make


def runs_without(bundle: Bundle, reason: str) -> None:
    """An engine loads with ONNX Runtime's own attention, answers, and says why."""
    engine = OnnxRuntimeEngine(bundle, capacity=64, threads=1)
    assert engine.attention.file is None
    assert reason in engine.attention.reason
    assert "\n" not in str(engine.attention)
    width = bundle.manifest.model.decoder.hidden_size
    assert np.isfinite(engine.prefill(np.ones((5, width), np.float32))).all()


def test_a_quantized_bundle_takes_them(quantized: Bundle, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, str(library))
    found = choose_attention(quantized.manifest)
    assert found.file == library
    assert str(found).startswith("native (")
    assert names.DECODERS["onnxruntime"] in found.graphs
    assert names.VISION not in found.graphs  # its linears are floats
    engine = OnnxRuntimeEngine(quantized, capacity=64, threads=1)
    assert engine.attention == found


def test_commands_say_what_computes_attention(
    quantized: Bundle, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = ("run", quantized.folder, "Hello", "--max-new-tokens", 1)
    assert "attention:" not in internvl_edge(*question, "--exact").stderr
    monkeypatch.setenv(SWITCH, str(library.with_name("missing.so")))
    assert "attention: onnxruntime (INTERNVL_EDGE_NATIVE names" in internvl_edge(*question).stderr
    monkeypatch.setenv(SWITCH, str(library))
    assert "attention: native (" in internvl_edge(*question).stderr
    facts = json.loads(internvl_edge("doctor", quantized.folder, "--json").stdout)
    assert facts["native attention"].endswith(f"({library})")
    assert facts["auto"]["attention"].startswith("native (")


@pytest.mark.parametrize(
    ("change", "exact", "reason"),
    [
        ({"linears": {}}, False, "no linear of the bundle is quantized"),
        ({"activations": "float16"}, False, "the bundle computes in float16"),
        ({}, True, "exact numbers"),
    ],
)
def test_numbers_that_must_not_be_rounded_are_not(
    quantized: Bundle, library: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], exact: bool, reason: str
) -> None:
    monkeypatch.setenv(SWITCH, str(library))
    found = choose_attention(replace(quantized.manifest, **change), exact)
    assert (found.file, found.graphs) == (None, {})
    assert reason in found.reason


def test_each_graph_has_its_own_permission(quantized: Bundle, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, str(library))
    tower = replace(quantized.manifest, linears={"vision.layers.0.mlp.fc1": INT8})
    assert set(choose_attention(tower).graphs) == {names.VISION}
    decoder = replace(quantized.manifest.model.decoder, head_dim=24)
    odd = replace(quantized.manifest, model=replace(quantized.manifest.model, decoder=decoder))
    assert choose_attention(odd).graphs == {}


def test_it_can_be_turned_off(quantized: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    runs_without(quantized, "INTERNVL_EDGE_NATIVE is 0")
    assert not cache.exists()


def test_the_first_start_compiles_and_later_ones_do_not(
    quantized: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not compiled yet" in choose_attention(quantized.manifest, builds=False).reason
    found = choose_attention(quantized.manifest)
    assert (found.file, found.reason) == (build.cached_library(), "baseline")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert choose_attention(quantized.manifest) == choose_attention(quantized.manifest, builds=False) == found
    assert [path.name for path in (cache / "internvl-edge" / build.FOLDER).iterdir()] == [found.file.name]


def test_without_a_compiler(quantized: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    runs_without(quantized, "no C++ compiler was found")


def test_on_a_machine_without_kernels(quantized: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    runs_without(quantized, "no native kernels for Linux on riscv64")


def test_without_a_cache_that_can_be_used(
    quantized: Bundle, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    runs_without(quantized, "cannot be used (Not a directory)")
    monkeypatch.setattr(build, "cache_folder", lambda: None)
    runs_without(quantized, "there is no cache folder")


def test_a_compiler_that_fails_is_asked_once(
    quantized: Bundle, cache: Path, sources: MakeSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources("kernels.cpp", "namespace internvl_edge", "nonsense internvl_edge")
    runs_without(quantized, "the compiler fails: ")
    monkeypatch.setattr(build, "find_compiler", lambda: pytest.fail("it was asked again"))
    runs_without(quantized, "internvl-edge native tries again")


def test_wrong_numbers_are_found_by_the_self_test(quantized: Bundle, cache: Path, sources: MakeSources) -> None:
    sources("kernels.cpp", "1.44269504f", "1.45f")
    runs_without(quantized, "fails its self-test: error: attended differs from ONNX Runtime's by")
    assert not build.cached_library().exists()


def test_a_crash_is_found_by_the_self_test(quantized: Bundle, cache: Path, sources: MakeSources) -> None:
    sources(
        "kernels.cpp",
        "void merge(const Attention& a, size_t task, const float* scratch) {",
        "void merge(const Attention& a, size_t task, const float* scratch) { __builtin_trap();",
    )
    runs_without(quantized, "fails its self-test: ")


def test_a_library_that_is_none(quantized: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, str(tmp_path / "missing.so"))
    runs_without(quantized, "which is no file")
    (tmp_path / "broken.so").write_bytes(b"\x7fELF nothing")
    monkeypatch.setenv(SWITCH, str(tmp_path / "broken.so"))
    runs_without(quantized, "it does not run")


def test_a_library_that_others_may_write_is_not_loaded(
    quantized: Bundle, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copy(library, tmp_path / "copy.so"))
    monkeypatch.setenv(SWITCH, str(copy))
    assert choose_attention(quantized.manifest).file == copy
    copy.chmod(0o777)
    runs_without(quantized, "can be written by every user")
    copy.chmod(0o755)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    if copy.stat().st_uid != 0:
        runs_without(quantized, "belongs to another user")


def test_a_level_that_the_cpu_lacks(quantized: Bundle, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice.check.cache_clear()
    monkeypatch.setenv(SWITCH, str(library))
    monkeypatch.setenv("INTERNVL_EDGE_NATIVE_LEVEL", "avx9000")
    runs_without(quantized, "has no kernels for this CPU")
    choice.check.cache_clear()


def test_a_graph_that_cannot_be_read_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / names.VISION
    path.write_bytes(b"\x3a\xff")
    assert Attention(tmp_path, "", {names.VISION: 64}).graph(path) is None


def test_processes_that_start_together_compile_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, make = [], build.build
    monkeypatch.setattr(build, "build", lambda path: (built.append(path), make(path)))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(ensure_library())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert found == [build.cached_library()] * 4


def test_the_command_compiles_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.cached_library()
    library.parent.mkdir(parents=True)
    library.with_suffix(".failed").write_text("it failed before")
    with pytest.raises(NativeError, match="it failed before; internvl-edge native tries again"):
        find_library()
    result = CliRunner().invoke(cli, ["native"])
    assert result.exit_code == 0
    assert f"library  {library}" in result.stdout
    assert find_library() == library
    assert not library.with_suffix(".failed").exists()
    written = tmp_path / "written.so"
    assert CliRunner().invoke(cli, ["native", "-o", str(written)]).exit_code == 0
    monkeypatch.setenv(SWITCH, str(written))
    assert find_library() == written
    monkeypatch.setenv("CXX", "no-such-compiler")
    failed = CliRunner().invoke(cli, ["native"])
    assert isinstance(failed.exception, NativeError)
