"""Prompts in int8: one scale per token and output, the same cache within rounding, and the decoder's own last token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from helpers import tiny
from helpers.tiny_quantized import write_quantized
from internvl_edge import InternVL, export_bundle
from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.names import PROMPTS
from internvl_edge.export.prompts import round_per_output
from internvl_edge.model.linear import PackedLinear, Scheme
from internvl_edge.runtime.engines import onnxruntime as engine_module
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

BODIES = {"qwen2": Scheme(4, 64, True), "qwen3": Scheme(4, 64, False), "internlm2": Scheme(4, 32, False)}


@pytest.fixture(scope="module", params=list(BODIES))
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same 4-bit decoder without and with the graph for prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    source = tiny.write_checkpoint(folder / "float", text=request.param)
    quantized, _ = write_quantized(source, folder, method="compressed-tensors", body=BODIES[request.param])
    return export_bundle(quantized, folder / "plain"), export_bundle(quantized, folder / "int8", int8_prompts=True)


def _engine(bundle: Path) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(Bundle.open(bundle), capacity=800, threads=1)


def _embeds(engine: OnnxRuntimeEngine, count: int) -> np.ndarray:
    width = engine._decoder.hidden_size
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32) * 0.5


@pytest.mark.parametrize("count", [16, 512, 513, 700])
def test_the_next_token_is_that_of_4_bit_products_within_rounding(bundles: tuple[Path, Path], count: int) -> None:
    expected, engine = map(_engine, bundles)
    prompt = _embeds(engine, count)
    a, b = expected.prefill(prompt).copy(), engine.prefill(prompt).copy()
    assert 0 < np.abs(b - a).max() < 0.3 * a.std()  # 0 would be the 4-bit products themselves
    assert engine.cache.length() == expected.cache.length() == count
    a, b = expected.decode(prompt[0]).copy(), engine.decode(prompt[0]).copy()
    assert np.abs(b - a).max() < 0.3 * a.std()


def test_a_prompt_that_continues_the_cache_is_as_one_prompt(bundles: tuple[Path, Path]) -> None:
    engine = _engine(bundles[1])
    prompt = _embeds(engine, 300)
    whole = engine.prefill(prompt).copy()
    engine.cache.reset()
    engine.prefill(prompt[:100])
    parts = engine.prefill(prompt[100:])
    # Position 99 went through the decoder's 4-bit products in one and through int8 ones in the other.
    assert np.abs(parts - whole).max() < 0.2 * whole.std()


def test_short_prompts_and_cpus_without_exact_products_take_the_decoder(
    bundles: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, engine = map(_engine, bundles)
    short = _embeds(engine, 15)
    np.testing.assert_array_equal(engine.prefill(short), plain.prefill(short))
    monkeypatch.setattr(engine_module, "multiplies_int8_exactly", lambda: False)
    old = _engine(bundles[1])
    long = _embeds(engine, 300)
    plain.cache.reset()
    np.testing.assert_array_equal(old.prefill(long), plain.prefill(long))


def test_a_token_a_thousand_times_as_large_leaves_the_others_alone(bundles: tuple[Path, Path]) -> None:
    """One scale for all tokens would round all others to zero: the first product shows it alone."""
    graph = onnx.load(bundles[1] / PROMPTS)
    name = next(node.output[0] for node in graph.graph.node if node.op_type == "MatMulIntegerToFloat")
    scaled = next(node.output[0] for node in graph.graph.node if node.op_type == "Mul" and name in node.input)
    rounded = next(node.input[0] for node in graph.graph.node if node.op_type == "Abs")
    del graph.graph.output[:]
    graph.graph.output.extend(
        onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None) for value in (rounded, scaled)
    )
    (bundles[1] / "first.onnx").write_bytes(graph.SerializeToString())
    session = onnxruntime.InferenceSession(bundles[1] / "first.onnx", providers=["CPUExecutionProvider"])
    (bundles[1] / "first.onnx").unlink()
    engine = _engine(bundles[1])
    embeds = _embeds(engine, 8)
    width = engine._decoder.head_dim // 2
    feed = {"inputs_embeds": embeds[None], "cos": np.ones((1, 8, width), np.float32)}
    feed |= {"sin": np.zeros((1, 8, width), np.float32), "past_length": np.zeros(1, np.int64)}
    needed = {value.name for value in session.get_inputs()}
    feed |= {
        name: np.zeros((1, engine._decoder.num_key_value_heads, 8, 2 * width), np.float32)
        for name in needed - set(feed)
    }
    before = session.run(None, feed)[1][0]
    feed["inputs_embeds"] = feed["inputs_embeds"].copy()
    feed["inputs_embeds"][0, 0, 3] *= 1000
    after = session.run(None, feed)[1][0]
    np.testing.assert_array_equal(after[1:], before[1:])
    assert np.abs(after[0] - before[0]).max() > 0


def test_the_int8_weights_are_those_of_4_bits_to_half_a_step() -> None:
    random = np.random.default_rng(0)
    values = random.integers(-8, 8, (24, 64)).astype(np.int8)
    linear = PackedLinear(values, random.uniform(0.01, 0.1, (24, 2)).astype(np.float32), None, 4)
    rounded, scale = round_per_output(linear)
    assert np.abs(rounded).max(axis=1).tolist() == [127] * 24
    missed = np.abs(rounded * scale[:, None] - linear.dequantize())
    assert (missed <= scale[:, None] * 0.5001).all()


def test_answers_through_the_whole_model(bundles: tuple[Path, Path]) -> None:
    with InternVL.load(bundles[1], engine="onnxruntime", threads=1) as model:
        question = "What is the total? " * 20
        first = model.chat(question, max_new_tokens=4)
        assert len(first.output_ids) in range(1, 5)
        assert model.chat(question, max_new_tokens=4).output_ids == first.output_ids  # the second from the cache


def test_what_has_no_4_bit_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    source = tiny.write_checkpoint(tmp_path / "float")
    with pytest.raises(EdgeError, match="this decoder has none; quantize it first"):
        export_bundle(source, tmp_path / "bundle", int8_prompts=True)
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(EdgeError, match="--dialect leaves out"):
        export_bundle(source, tmp_path / "bundle", dialects=("standard",), int8_prompts=True)
    quantized, _ = write_quantized(source, tmp_path, method="compressed-tensors", body=BODIES["qwen2"])
    with pytest.raises(EdgeError, match="leave out --activations"):
        export_bundle(quantized, tmp_path / "bundle", activations="float16", int8_prompts=True)
