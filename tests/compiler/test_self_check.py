"""`build` compares what it built with ONNX Runtime, and leaves no wrong engine. Engines are graphs over a fake GPU."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from helpers import tiny
from helpers.fake_gpu import FakeCuda, FakeTensorRT
from helpers.kv_scales import write_scales
from helpers.recorded_progress import RecordedProgress
from helpers.tensorrt_engines import FLAVOURS
from internvl_edge import export_bundle
from internvl_edge.base import machine
from internvl_edge.base.errors import EngineError
from internvl_edge.bundle.bundle import Bundle, sha256
from internvl_edge.compiler import bundle_engines
from internvl_edge.compiler.bundle_engines import build_engines, options_for
from internvl_edge.compiler.engine import Build, Built
from internvl_edge.planning.devices import Target
from internvl_edge.runtime.engines.tensorrt import self_check
from internvl_edge.runtime.engines.tensorrt.record import EngineRecord, engine_folder
from internvl_edge.runtime.engines.tensorrt.runtime_cache import DeviceCache

TARGET = Target("board", "a board", "tensorrt", ("8.6",))
Change = Callable[[ir.Graph], None]


@pytest.fixture(scope="module", params=["float cache", "int8 cache"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("check")
    checkpoint = tiny.write_checkpoint(folder / "checkpoint")
    if request.param == "int8 cache":
        # Ranges that clip nothing, as calibrated ones: TensorRT keeps this cache in 16 bits and does not clip.
        write_scales(checkpoint, least=12, most=16)
    return Bundle.open(export_bundle(checkpoint, folder / "bundle", "float16"))


def unchanged(graph: ir.Graph) -> None:
    """Leave the graph as it is."""


class Builder:
    """Stands in for the builder: an engine is the header, changed as a faulty compiler would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bundle: Bundle, sm: int = 86, profiles: int = 1) -> None:
        self.cuda, self.changes = FakeCuda(sm), dict[str, Change]()
        self.loaded = 0
        self.api = FakeTensorRT(self.cuda, bundle.folder, FLAVOURS["tensorrt"], profiles)
        monkeypatch.setitem(sys.modules, "tensorrt", self.api)
        monkeypatch.setattr("internvl_edge.runtime.engines.tensorrt.cuda._import_runtime", lambda: self.cuda)
        monkeypatch.setattr(bundle_engines, "build_engine", self.build)
        monkeypatch.setattr(bundle_engines, "_check_device", lambda target: None)

    def build(self, flavour: Any, build: Build, progress: Any, stop: threading.Event) -> Built:
        model = ir.serde.deserialize_model(__import__("onnx").ModelProto.FromString(build.header))
        self.changes.get(build.path.name, unchanged)(model.graph)
        build.output.write_bytes(ir.to_proto(model).SerializeToString())
        return Built(build.output.stat().st_size, sha256(build.output), 1.0, 1, 1)


def options(**further: int) -> Any:
    return options_for(TARGET, "float16", capacity=256, chunk=64, kept=4, tiles=2, **further)


def exchanged_weights(graph: ir.Graph) -> None:
    """Two products with weights of one shape exchange them, as in a fusion that mixes up its parts."""
    products = [node for node in graph if node.op_type == "MatMul"]
    for one, other in itertools.combinations(products, 2):
        a, b = one.inputs[1], other.inputs[1]
        if a is not None and b is not None and a.is_initializer() and b.is_initializer() and a.shape == b.shape:
            one.replace_input_with(1, b)
            other.replace_input_with(1, a)
            return
    raise AssertionError("no such products")


def no_mask(graph: ir.Graph) -> None:
    """Attention sees all slots that are read, those after the present token too."""
    for attention in [node for node in graph if node.op_type == "Attention"]:
        mask = attention.inputs[3]
        assert mask is not None
        hidden = ir.node("Not", [mask])
        everything = ir.node("Or", [mask, hidden.outputs[0]])
        graph.insert_before(attention, [hidden, everything])
        attention.replace_input_with(3, everything.outputs[0])


def late_positions(graph: ir.Graph) -> None:
    """cos and sin exchanged: rotations of other positions."""
    for node in graph:
        if node.op_type == "RotaryEmbedding":
            cos, sin = node.inputs[1], node.inputs[2]
            node.replace_input_with(1, sin)
            node.replace_input_with(2, cos)


def nothing_but_nan(graph: ir.Graph) -> None:
    """Logits that are no numbers."""
    logits = next(value for value in graph.outputs if value.name == "logits")
    node = logits.producer()
    assert node is not None
    narrow = node.inputs[0]
    assert narrow is not None
    wrong = ir.node("Sqrt", [narrow])
    graph.insert_before(node, wrong)
    node.replace_input_with(0, wrong.outputs[0])


def test_right_engines_are_kept_with_what_was_compared(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    builder = Builder(monkeypatch, bundle)
    progress = RecordedProgress()
    record, built = build_engines(bundle, TARGET, options(), force=True, progress=progress)
    assert built
    assert record.check["vision_cosine"] > 0.99
    assert record.check["logits_cosine"] > 0.99
    assert record.check["tokens"] > 64  # more than one step
    shown = [step.label for step in progress.steps]
    assert shown[-3:] == ["comparing the engines with ONNX Runtime", "ONNX Runtime", "TensorRT"]
    assert EngineRecord.read(engine_folder(bundle, "board")) == record
    assert builder.cuda.leaks == {}
    assert build_engines(bundle, TARGET, options()) == (record, False)


def test_engines_for_several_rows_are_checked_in_two_of_them(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    builder = Builder(monkeypatch, bundle, profiles=2)
    record, _ = build_engines(bundle, TARGET, options(rows=3), force=True)
    assert record.options.rows == 3
    assert record.check["logits_cosine"] > 0.99
    used = [dict(shape) for context in builder.api.contexts for shape in context.shapes]
    assert {shape["past_length"][0] for shape in used if "past_length" in shape} == {1, 3}
    monkeypatch.setattr(DeviceCache, "copy", lambda *arguments: None)
    with pytest.raises(EngineError, match=r"compute wrong logits .*none were kept"):
        build_engines(bundle, TARGET, options(rows=3), force=True)
    assert EngineRecord.read(engine_folder(bundle, "board")) == record
    assert builder.cuda.leaks == {}


@pytest.mark.parametrize("change", [exchanged_weights, no_mask, late_positions, nothing_but_nan])
def test_a_wrong_decoder_is_refused_and_removed(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, change: Change
) -> None:
    builder = Builder(monkeypatch, bundle)
    builder.changes["decoder.onnx"] = change
    target = Target("wrong", "a board", "tensorrt", ("8.6",))
    with pytest.raises(EngineError, match=r"engines for wrong compute wrong logits .*cosine.*none were kept"):
        build_engines(bundle, target, options())
    assert not engine_folder(bundle, "wrong").exists()
    assert [path.name for path in (bundle.folder / "engines").iterdir() if "wrong" in path.name] == []
    assert builder.cuda.leaks == {}


def test_a_wrong_tower_is_refused_and_the_engines_of_before_stay(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle
) -> None:
    builder = Builder(monkeypatch, bundle)
    before, _ = build_engines(bundle, TARGET, options(), force=True)
    builder.changes["vision.onnx"] = exchanged_weights
    with pytest.raises(EngineError, match="compute wrong image tokens"):
        build_engines(bundle, TARGET, options(), force=True)
    assert EngineRecord.read(engine_folder(bundle, "board")) == before


def test_the_user_can_leave_the_comparison_out(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    builder = Builder(monkeypatch, bundle)
    builder.changes["decoder.onnx"] = no_mask
    record, _ = build_engines(bundle, TARGET, options(), force=True, check=False)
    assert record.check == {}


@pytest.mark.parametrize(
    ("sm", "modules", "available", "capacity", "reason"),
    [
        (89, {}, None, 256, "the GPU here has compute capability 8.9"),
        (86, {"cuda.bindings.runtime": None}, None, 256, "no GPU: "),
        (86, {"onnxruntime": None}, None, 256, "ONNX Runtime is not installed"),
        (86, {}, 1000, 256, "ONNX Runtime needs about "),
        (86, {}, None, 40, "a context of 40 tokens has no room for the question"),
    ],
)
def test_what_cannot_be_compared_says_why(
    monkeypatch: pytest.MonkeyPatch,
    bundle: Bundle,
    sm: int,
    modules: dict[str, None],
    available: int | None,
    capacity: int,
    reason: str,
) -> None:
    builder = Builder(monkeypatch, bundle, sm)
    if "cuda.bindings.runtime" in modules:
        monkeypatch.undo()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(machine, "memory", lambda *fields: available)
    record = EngineRecord("board", "tensorrt", "1", (86,), options_for(TARGET, "float16", capacity=capacity), {})
    found = self_check.check_engines(bundle, record, Path())
    assert found["skipped"].startswith(reason)
    assert builder.cuda.leaks == {}


def test_the_least_row_decides() -> None:
    a = np.array([[[1, 0], [0, 1]], [[1, 1], [1, 1]]], np.float32)
    assert self_check._least_cosine(a, a) == 1
    assert self_check._least_cosine(a, a * np.float32(3)) == 1
    b = a.copy()
    b[1] = [[1, -1], [1, -1]]
    assert self_check._least_cosine(a, b) == 0
    assert np.isnan(self_check._least_cosine(a, a * np.nan))
