"""What each TensorRT takes: every graph of every recipe against every version, and the settings for known faults."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from helpers import tiny
from helpers.commands import run_script
from helpers.kv_scales import write_scales
from helpers.repository import REPOSITORY
from helpers.tiny_quantized import write_quantized
from internvl_edge import export_bundle
from internvl_edge.base.errors import EngineError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.compiler.bundle_engines import headers
from internvl_edge.compiler.operators import operators, require_operators
from internvl_edge.model.linear import Scheme
from internvl_edge.planning.versions import (
    COMPILER_SETTINGS,
    MISCOMPILATIONS,
    ROWS,
    RTX,
    TENSORRT,
    VERSIONS,
    Version,
    compiler_settings,
    has_new_layers,
    keeps_int8_cache,
    numbers,
    reads_decomposable,
    since,
)
from internvl_edge.runtime.engines.tensorrt import flavour as flavour_module
from internvl_edge.runtime.engines.tensorrt.flavour import avoid_miscompilations, compiler, load_flavour
from internvl_edge.runtime.engines.tensorrt.record import BuildOptions

INT8_TOWER = REPOSITORY / "benchmarks" / "int8_tower.py"
TARGETS = [(flavour, version) for flavour, versions in VERSIONS.items() for version in versions]
# What the shipped recipes make. `test_demo.py` does the same with the recipes themselves.
KINDS: dict[str, dict[str, Any]] = {
    "floats": {},
    "int8 tower": {"tower": True},
    "int4, zero points": {"quantized": {"body": Scheme(4, 64, False), "head": Scheme(8, None, False)}},
    "int4, int8 head": {"quantized": {"body": Scheme(4, 64, True), "head": Scheme(8, None, True)}},
    "int8 cache": {"quantized": {"body": Scheme(4, 64, True), "head": Scheme(8, None, True)}, "scales": True},
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A tiny bundle of each kind."""
    return {kind: made(tmp_path_factory.mktemp("versions"), **choices) for kind, choices in KINDS.items()}


def made(folder: Path, quantized: dict[str, Any] | None = None, tower: bool = False, scales: bool = False) -> Bundle:
    checkpoint = tiny.write_checkpoint(folder / "plain", vision_hidden_size=128)
    if tower:
        assert run_script(INT8_TOWER, checkpoint, folder / "tower").returncode == 0
        checkpoint = folder / "tower"
    if quantized:
        checkpoint, _ = write_quantized(checkpoint, folder / "made", method="compressed-tensors", **quantized)
    if scales:
        write_scales(checkpoint)
    return Bundle.open(export_bundle(checkpoint, folder / "bundle", "float16", dialects=["standard"]))


def tailored(bundle: Bundle, dtype: str, flavour: str, version: Version) -> dict[str, bytes]:
    """The headers that `build` makes for a version."""
    return {
        path.name: header
        for header, path in headers(
            bundle,
            BuildOptions(dtype, capacity=64, chunk=16),
            not has_new_layers(flavour, version),
            decomposable=reads_decomposable(flavour, version),
            wide_cache=not keeps_int8_cache(flavour),
        ).values()
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("flavour", "version"), TARGETS)
def test_every_version_takes_the_graphs_that_it_is_given(
    bundles: dict[str, Bundle], kind: str, dtype: str, flavour: str, version: Version
) -> None:
    for name, header in tailored(bundles[kind], dtype, flavour, version).items():
        require_operators(header, name, flavour, version)


def test_a_planted_newer_operator_is_named_with_its_version(bundles: dict[str, Bundle]) -> None:
    modern = tailored(bundles["floats"], "bfloat16", TENSORRT, (10, 16))["decoder.onnx"]
    with pytest.raises(EngineError) as refused:
        require_operators(modern, "decoder.onnx", TENSORRT, (10, 3))
    message = str(refused.value)
    assert message.startswith(
        "decoder.onnx needs Attention for plain data, and tensorrt has it since 10.14; this is 10.3."
    )
    assert len(message) <= 400
    assert "\n" not in message
    old = onnx.load_from_string(tailored(bundles["floats"], "bfloat16", TENSORRT, (10, 3))["vision.onnx"])
    require_operators(old.SerializeToString(), "vision.onnx", TENSORRT, (10, 3))
    old.graph.node.append(onnx.helper.make_node("Swish", [old.graph.node[0].output[0]], ["planted"]))
    with pytest.raises(EngineError, match="needs Swish for plain data, and tensorrt does not list it in any version"):
        require_operators(old.SerializeToString(), "vision.onnx", TENSORRT, (10, 3))


def test_an_int8_cache_is_refused_where_it_is_not_listed(bundles: dict[str, Bundle]) -> None:
    options = BuildOptions("bfloat16", capacity=64, chunk=16)
    narrow = headers(bundles["int8 cache"], options)["decoder"][0]
    require_operators(narrow, "decoder.onnx", RTX, (1, 7))
    with pytest.raises(EngineError, match=r"needs Concat for int8 data, and tensorrt does not list it"):
        require_operators(narrow, "decoder.onnx", TENSORRT, (10, 16))
    assert not keeps_int8_cache(TENSORRT)
    assert keeps_int8_cache(RTX)
    wide = headers(bundles["int8 cache"], options, wide_cache=True)["decoder"][0]
    assert ("Slice", "int8") not in operators(wide)
    inputs = {value.name: value.type.tensor_type.elem_type for value in onnx.load_from_string(wide).graph.input}
    assert inputs["past_key_values.0.key"] == inputs["inputs_embeds"] == onnx.TensorProto.BFLOAT16


def test_bytes_become_float16_first(bundles: dict[str, Bundle]) -> None:
    """TensorRT does not list a conversion of uint8 to bfloat16."""
    for dtype in ("bfloat16", "float16"):
        found = operators(tailored(bundles["floats"], dtype, TENSORRT, (10, 16))["vision.onnx"])
        assert ("Cast", "uint8 to float16") in found
        assert ("Cast", "uint8 to bfloat16") not in found
    assert since("Cast", "uint8 to bfloat16", TENSORRT) is None


def test_attention_may_be_decomposed_where_the_importer_reads_it(bundles: dict[str, Bundle]) -> None:
    for version, marked in (((10, 14), False), ((10, 15), True), ((10, 16), True)):
        for header in tailored(bundles["floats"], "bfloat16", TENSORRT, version).values():
            nodes = [node for node in onnx.load_from_string(header).graph.node if node.op_type == "Attention"]
            names = {attribute.name for node in nodes for attribute in node.attribute}
            assert ("TRT_decomposable" in names) == marked
            assert bool(nodes) == marked
    for header in tailored(bundles["floats"], "bfloat16", RTX, (1, 7)).values():
        assert b"TRT_decomposable" not in header


def test_every_row_has_a_source_and_one_place() -> None:
    assert all(row.source for row in ROWS)
    assert all(fault.source and fault.fault for fault in MISCOMPILATIONS)
    listed = [(operator, row.kind) for row in ROWS for operator in row.operators]
    assert len(listed) == len(set(listed))
    assert {flavour for row in ROWS for flavour in row.since} == VERSIONS.keys()


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ((10, 3), ()),
        ((10, 7), ()),
        ((10, 13), ("-peep:fc_h_fusion=off", "-peep:match_dual_gemm=off")),
        ((10, 14), ("-peep:fc_h_fusion=off", "-peep:match_dual_gemm=off")),
        ((10, 16), ("-peep:fc_h_fusion=off",)),
        ((11, 2), ("-peep:fc_h_fusion=off",)),
    ],
)
def test_known_miscompilations_are_avoided_by_version(version: Version, expected: tuple[str, ...]) -> None:
    assert compiler_settings(TENSORRT, version) == expected
    assert compiler_settings(RTX, version) == ()


def test_joined_products_of_int8_weights_are_avoided_for_one_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMPILER_SETTINGS, raising=False)
    settings = compiler_settings(RTX, (1, 7), int8_body=True)
    for before in (None, "-thread_pool_size=2"):
        if before:
            monkeypatch.setenv(COMPILER_SETTINGS, before)
        with compiler(settings):
            assert os.environ[COMPILER_SETTINGS].split()[-1] == "-peep:fc_h_fusion=off"
        assert os.environ.get(COMPILER_SETTINGS) == before


def test_settings_are_there_before_the_library_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def load(name: str) -> Any:
        seen.append(os.environ.get(COMPILER_SETTINGS))
        return SimpleNamespace(__version__="10.13.3.9", ILogger=type("ILogger", (), {}))

    monkeypatch.delenv(COMPILER_SETTINGS, raising=False)
    monkeypatch.setattr(flavour_module, "_installed_version", lambda module: "10.13.3.9")
    monkeypatch.setattr(flavour_module.importlib, "import_module", load)
    load_flavour(TENSORRT)
    assert seen == ["-peep:fc_h_fusion=off -peep:match_dual_gemm=off"]
    # JetPack's package may be unknown to Python: the loaded library says its version, before anything is compiled.
    monkeypatch.delenv(COMPILER_SETTINGS)
    monkeypatch.setattr(flavour_module, "_installed_version", lambda module: None)
    load_flavour(TENSORRT)
    assert seen[1] is None
    assert os.environ[COMPILER_SETTINGS] == seen[0]


def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPILER_SETTINGS, "-thread_pool_size=2 -peep:fc_h_fusion=on")
    for _ in range(2):
        avoid_miscompilations(TENSORRT, (10, 13))
        expected = "-thread_pool_size=2 -peep:fc_h_fusion=on -peep:match_dual_gemm=off"
        assert os.environ[COMPILER_SETTINGS] == expected


def test_versions_are_read() -> None:
    assert numbers("10.16.1.11") == (10, 16)
    assert numbers("1.7.1") == (1, 7)
    assert numbers("11") == (11, 0)
