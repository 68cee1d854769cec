"""Steps of prompts: what continues at the end of a step gets the numbers of the whole prompt, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import tiny
from helpers.tiny_quantized import write_quantized
from internvl_edge import InternVL, export_bundle
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.model.linear import Scheme
from internvl_edge.runtime.engines.onnxruntime import PREFILL_SIZES, OnnxRuntimeEngine
from internvl_edge.runtime.engines.steps import common_steps, steps, steps_from

LENGTH = 300


@given(st.integers(1, 5000))
def test_steps_cover_a_prompt_and_few_sizes_occur(length: int) -> None:
    found = steps(length, PREFILL_SIZES)
    assert sum(found) == length
    assert found == sorted(found, reverse=True)
    assert set(found[:-1]) <= set(PREFILL_SIZES)


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 2000))
def test_common_steps_are_the_beginning_of_both_and_what_is_left_is_the_rest(one: int, other: int, most: int) -> None:
    first, second = steps(one, PREFILL_SIZES), steps(other, PREFILL_SIZES)
    common = common_steps(first, second, most)
    count = len(common)
    assert common == first[:count] == second[:count]
    assert sum(common) <= most
    assert common + steps_from(first, sum(common)) == first
    if count < min(len(first), len(second)):
        assert first[count] != second[count] or sum(common) + first[count] > most


def test_nothing_is_left_where_no_step_begins() -> None:
    assert steps_from([256, 64, 3], 256) == [64, 3]
    assert steps_from([256, 64, 3], 0) == [256, 64, 3]
    assert steps_from([256, 64, 3], 100) == steps_from([256, 64, 3], 323) == []


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float bundle, and a 4-bit one without and with the graph for prompts."""
    folder = tmp_path_factory.mktemp("steps")
    source = tiny.write_checkpoint(folder / "float")
    quantized, _ = write_quantized(source, folder, method="compressed-tensors", body=Scheme(4, 64, True))
    return {
        "float32": export_bundle(source, folder / "float32"),
        "int4": export_bundle(quantized, folder / "int4"),
        "int8 prompts": export_bundle(quantized, folder / "prompts", int8_prompts=True),
    }


def onnxruntime(bundle: Path) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(Bundle.open(bundle), capacity=700, threads=1)


def standard(bundle: Path) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(Bundle.open(bundle), capacity=700, threads=1, dialect="standard")


def openvino(bundle: Path) -> OnnxRuntimeEngine:
    module = pytest.importorskip("internvl_edge.runtime.engines.openvino")
    if not module.is_available():
        pytest.skip("no OpenVINO that can read the graphs")
    engine: OnnxRuntimeEngine = module.OpenVinoEngine(Bundle.open(bundle), capacity=700, threads=1)
    return engine


@pytest.mark.parametrize("kind", ["float32", "int4", "int8 prompts"])
@pytest.mark.parametrize("load", [onnxruntime, standard, openvino])
def test_a_prompt_that_continues_at_the_end_of_a_step_has_the_same_bits(
    bundles: dict[str, Path], load: Callable[[Path], OnnxRuntimeEngine], kind: str
) -> None:
    """The beginning comes from another prompt, longer or shorter, with an answer behind it."""
    engine = load(bundles[kind])
    random = np.random.default_rng(0)
    width = engine._decoder.hidden_size
    embeds, others = (random.standard_normal((600, width)).astype(np.float32) * 0.5 for _ in range(2))
    expected = engine.prefill(embeds[:LENGTH]).copy()
    cache = {name: array[:, :, :LENGTH].copy() for name, array in engine._buffers.arrays.items()}
    reused = 0
    for earlier in (20, 66, 130, 256, 257, 290, LENGTH, 301, 420, 560):
        planned, computed = engine.steps(LENGTH), engine.steps(earlier)
        start = sum(common_steps(computed[:-1], planned, LENGTH - 1))
        engine.cache.reset()
        engine.prefill(np.concatenate([embeds[:start], others[start:earlier]]))
        engine.decode(others[0])
        engine.cache.reset(start)
        assert np.array_equal(engine.prefill(embeds[start:LENGTH]), expected), earlier
        for name, array in engine._buffers.arrays.items():
            assert np.array_equal(array[:, :, :LENGTH], cache[name]), (earlier, name)
        reused += start
    assert reused > LENGTH
    engine.close()


@pytest.mark.parametrize("kind", ["float32", "int4", "int8 prompts"])
def test_warm_answers_have_the_logits_of_cold_ones(bundles: dict[str, Path], kind: str) -> None:
    questions = ["word " * 30 + end for end in ("a", "b", "and a longer end", "a", "b " * 60)]
    with InternVL.load(bundles[kind], engine="onnxruntime", threads=1) as warm:
        reused = 0
        for question in questions:
            got = warm.trace(question, max_new_tokens=9)
            reused += len(got.reply.prompt_ids) - int(got.reply.timings["prefill_tokens"])
            with InternVL.load(bundles[kind], engine="onnxruntime", threads=1) as cold:
                expected = cold.trace(question, max_new_tokens=9)
            assert got.reply.output_ids == expected.reply.output_ids
            assert np.array_equal(got.logits, expected.logits)
    assert reused
