"""The openvino engine: the same numbers as ONNX Runtime's, and its cache handed over at every seam."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import tiny
from helpers.tiny_quantized import write_quantized
from internvl_edge import InternVL, export_bundle
from internvl_edge.base import machine
from internvl_edge.base.errors import EngineError
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.model.linear import Scheme
from internvl_edge.runtime.engines import choice, openvino
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

CAPACITY = 1400
needs_openvino = pytest.mark.skipif(not openvino.is_available(), reason="openvino 2026.3 or newer is not installed")


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "internlm2"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openvino")
    return export_bundle(tiny.write_checkpoint(folder / "checkpoint", text=request.param), folder / "bundle")


@pytest.fixture
def engines(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """ONNX Runtime's and OpenVINO's, both in float32."""
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: False)
    opened = Bundle.open(bundle)
    pair = OnnxRuntimeEngine(opened, capacity=CAPACITY, threads=1), _engine(opened)
    yield pair
    for engine in pair:
        engine.close()


def _engine(opened: Bundle) -> openvino.OpenVinoEngine:
    return openvino.OpenVinoEngine(opened, capacity=CAPACITY, threads=1)


def _embeds(bundle: Path, count: int) -> np.ndarray:
    width = Bundle.open(bundle).manifest.model.decoder.hidden_size
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32) * 0.5


@needs_openvino
def test_tiles_become_the_same_tokens(engines: tuple[Any, Any], bundle: Path) -> None:
    size = Bundle.open(bundle).manifest.model.vision.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    expected, found = (engine.encode(pixels) for engine in engines)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@needs_openvino
def test_prompts_answers_and_longer_prompts_follow_each_other_as_in_one_engine(
    engines: tuple[Any, Any], bundle: Path
) -> None:
    """A prompt of several chunks, answers, a further long prompt, a short one, several tokens at once, a way back."""
    parts = [_embeds(bundle, count) for count in (openvino.PREFILL_SIZES[0] + 130, 1, 200, 7)]

    def walk(engine: Any) -> list[np.ndarray]:
        found = [np.array(engine.prefill(parts[0])), np.array(engine.decode(parts[1][0]))]
        found += [np.array(engine.prefill(part)) for part in parts[2:]]
        found += [engine.score(parts[3])]
        engine.cache.reset(300)
        return [*found, np.array(engine.prefill(parts[2])), np.array(engine.decode(parts[1][0]))]

    expected, found = (walk(engine) for engine in engines)
    assert engines[0].cache.length() == engines[1].cache.length() == 300 + 200 + 1
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-3)


@needs_openvino
def test_bfloat16_stays_near_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: True)
    bundle = export_bundle(tiny.write_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", dtype="float16")
    prompt = _embeds(bundle, 128)
    exact, rounded = OnnxRuntimeEngine(Bundle.open(bundle), capacity=CAPACITY), _engine(Bundle.open(bundle))
    expected, found = exact.prefill(prompt), rounded.prefill(prompt)
    assert 0 < np.abs(found - expected).max() < 0.2 * expected.std()


@needs_openvino
def test_a_bundle_without_the_graph_for_prompts_leaves_them_to_onnx_runtime(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    bundle = export_bundle(checkpoint, tmp_path / "bundle", dialects=("standard",))
    engine, expected = _engine(Bundle.open(bundle)), OnnxRuntimeEngine(Bundle.open(bundle), capacity=CAPACITY)
    prompt = _embeds(bundle, 100)
    np.testing.assert_allclose(engine.prefill(prompt), expected.prefill(prompt), atol=1e-5)


@needs_openvino
@pytest.mark.skipif(not machine.multiplies_int8_exactly(), reason="this CPU does not add int8 products exactly")
def test_the_int8_graph_for_prompts_runs_in_openvino_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime does not hold it, a rest is padded, and a continued prompt gets the numbers of the whole one."""
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(machine, "multiplies_int8_tiles", lambda: True)
    source = tiny.write_checkpoint(tmp_path / "float")
    body = Scheme(4, 64, symmetric=True)
    quantized, _ = write_quantized(source, tmp_path, method="compressed-tensors", body=body, negative=True)
    opened = Bundle.open(export_bundle(quantized, tmp_path / "bundle", int8_prompts=True))
    reference, engine = OnnxRuntimeEngine(opened, capacity=CAPACITY), _engine(opened)
    assert reference._prompts is not None
    assert engine._prompts is None
    monkeypatch.setattr(machine, "multiplies_int8_tiles", lambda: False)
    assert _engine(opened)._prompts is not None, "without AMX, ONNX Runtime computes prompts"
    for count in (openvino.PREFILL_SIZES[0] + 131, 64, 65, 20, 16, 15, 2):
        prompt = _embeds(tmp_path / "bundle", count)
        expected, found = np.array(reference.prefill(prompt)), np.array(engine.prefill(prompt))
        assert reference.cache.length() == engine.cache.length() == count
        np.testing.assert_allclose(found, expected, atol=0.05 * expected.std(), err_msg=f"{count} tokens")
        whole = [np.array(array[0, :, :count]) for array in engine._buffers.arrays.values()]
        for end in np.cumsum(engine.steps(count))[:-1].tolist():
            engine.cache.reset(end)
            np.testing.assert_array_equal(engine.prefill(prompt[end:]), found)
            again = [array[0, :, :count] for array in engine._buffers.arrays.values()]
            assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True)), "the cache is another one"
        reference.cache.reset()
        engine.cache.reset()


@needs_openvino
def test_it_answers_as_the_other_engine_does(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: False)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 150, 3), np.uint8))
    answers = []
    for name in ("onnxruntime", "openvino"):
        with InternVL.load(bundle, engine=name, threads=1) as model:
            answers.append(model.chat("What is this? " * 20, [picture], max_new_tokens=12).output_ids)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("bfloat16", "installed", "activations", "memory", "expected"),
    [
        (True, True, "float16", 10**12, "openvino"),
        (True, True, "float16", None, "openvino"),
        (False, True, "float16", 10**12, "onnxruntime"),
        (True, False, "float16", 10**12, "onnxruntime"),
        (True, True, "float32", 10**12, "onnxruntime"),
        (True, True, "float16", 10**6, "onnxruntime"),
    ],
)
def test_openvino_is_chosen_where_it_is_installed_faster_and_fits(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    bfloat16: bool,
    installed: bool,
    activations: str,
    memory: int | None,
    expected: str,
) -> None:
    made: list[str] = []
    opened = Bundle.open(bundle)
    opened = replace(opened, manifest=replace(opened.manifest, activations=activations))
    monkeypatch.setattr(machine, "memory", lambda *fields: memory)
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(openvino, "is_available", lambda: installed)
    monkeypatch.setattr(openvino, "OpenVinoEngine", lambda *a, **k: made.append("openvino"))
    monkeypatch.setattr(choice, "OnnxRuntimeEngine", lambda *a, **k: made.append("onnxruntime"))
    choice.cpu_engine(opened, capacity=8)
    assert made == [expected]


@needs_openvino
@pytest.mark.parametrize(("activations", "hint"), [("float16", "bf16"), ("float32", "f32")])
def test_a_float32_bundle_is_computed_in_float32(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, activations: str, hint: str
) -> None:
    asked = []
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: True)
    opened = Bundle.open(bundle)
    engine = _engine(opened)
    monkeypatch.setattr(
        engine, "_core", SimpleNamespace(compile_model=lambda path, device, properties: asked.append(properties))
    )
    engine._compiled(replace(opened, manifest=replace(opened.manifest, activations=activations)), "vision.onnx", 1)
    assert [properties["INFERENCE_PRECISION_HINT"] for properties in asked] == [hint]


@needs_openvino
def test_a_graph_is_compiled_once_when_it_is_first_needed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, compiled = Bundle.open(bundle), []
    made = openvino.OpenVinoEngine._compiled
    monkeypatch.setattr(
        openvino.OpenVinoEngine, "_compiled", lambda self, *what: compiled.append(what[1]) or made(self, *what)
    )
    engine, size = _engine(opened), opened.manifest.model.vision.image_size
    assert engine.steps(130) == [128, 2]
    engine.prefill(_embeds(bundle, 63))
    engine.decode(_embeds(bundle, 1)[0])
    assert compiled == []
    for _ in range(2):
        engine.cache.reset()
        engine.prefill(_embeds(bundle, 200))
    assert compiled == [names.DECODERS["onnxruntime"]]
    for _ in range(2):
        engine.encode(np.zeros((1, size, size, 3), np.uint8))
    assert compiled == [names.DECODERS["onnxruntime"], names.VISION]


@needs_openvino
def test_prompts_of_every_length_are_computed_in_few_sizes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO keeps memory for each length that it has seen: hundreds of lengths would fill the memory of a device."""
    engine, seen = _engine(Bundle.open(bundle)), set()
    inputs = engine._inputs
    monkeypatch.setattr(engine, "_inputs", lambda chunk, *rest: seen.add(len(chunk)) or inputs(chunk, *rest))
    for length in range(1, 700, 23):
        engine.cache.reset(0)
        engine.prefill(_embeds(bundle, length))
        assert engine.cache.length() == length
    assert seen == set(openvino.PREFILL_SIZES)


def test_what_cannot_be_is_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle)
    with pytest.raises(EngineError, match="is not one of auto, onnxruntime, openvino"):
        choice.cpu_engine(opened, "tflite", capacity=8)
    with pytest.raises(EngineError, match="runs the onnxruntime dialect alone"):
        choice.cpu_engine(opened, "openvino", dialect="standard", capacity=8)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert not openvino.is_available()
    with pytest.raises(EngineError, match=r"pip install 'internvl-edge\[openvino\]'"):
        choice.cpu_engine(opened, "openvino", capacity=8)


@pytest.mark.parametrize(
    ("bfloat16", "installed", "activations", "memory", "options", "expected"),
    [
        (True, True, "float16", 10**12, {}, "openvino (faster images and prompts, in bfloat16; --exact avoids"),
        (True, True, "float16", 10**12, {"exact": True}, "onnxruntime (exact numbers)"),
        (True, True, "float16", 10**12, {"dialect": "standard"}, "onnxruntime (the dialect standard was asked for)"),
        (True, True, "float32", 10**12, {}, "onnxruntime (the bundle computes in float32"),
        (False, True, "float16", 10**12, {}, "onnxruntime (this CPU does not multiply bfloat16)"),
        (True, False, "float16", 10**12, {}, "onnxruntime (OpenVINO is not installed)"),
        (True, True, "float16", 10**6, {}, "onnxruntime (OpenVINO may need "),
    ],
)
def test_the_choice_comes_with_its_reason(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    bfloat16: bool,
    installed: bool,
    activations: str,
    memory: int,
    options: dict[str, Any],
    expected: str,
) -> None:
    opened = Bundle.open(bundle)
    opened = replace(opened, manifest=replace(opened.manifest, activations=activations))
    monkeypatch.setattr(machine, "memory", lambda *fields: memory)
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(openvino, "is_available", lambda: installed)
    found = str(choice.choose(opened.manifest, **options))
    assert found.startswith(expected)
    assert "\n" not in found


@needs_openvino
def test_exact_does_not_round_to_bfloat16(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: True)
    opened = Bundle.open(bundle)
    for exact in (False, True):
        engine = openvino.OpenVinoEngine(opened, capacity=CAPACITY, threads=1, exact=exact)
        core = SimpleNamespace(compile_model=lambda path, device, properties: asked.append(properties))
        monkeypatch.setattr(engine, "_core", core)
        engine._compiled(replace(opened, manifest=replace(opened.manifest, activations="float16")), "vision.onnx", 1)
    assert [properties["INFERENCE_PRECISION_HINT"] for properties in asked] == ["bf16", "f32"]


def test_exact_takes_onnx_runtime_and_no_tensorrt(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(openvino, "is_available", lambda: True)
    with InternVL.load(bundle, exact=True, threads=1) as model:
        assert type(model.engine) is OnnxRuntimeEngine
    with pytest.raises(EngineError, match="leave out --exact"):
        InternVL.load(bundle, "tensorrt", exact=True)
