"""Whole models with the native operators: the same tokens, and rows, prompts and stops as without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers import tiny
from helpers.engines import assert_interruptible
from helpers.repository import REPOSITORY
from helpers.tiny_quantized import write_quantized
from internvl_edge import InternVL, export_bundle
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.demo import CHECKPOINT, demo_questions
from internvl_edge.model.linear import Scheme
from internvl_edge.runtime.engines import onnxruntime as engine_module
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from internvl_edge.runtime.native.choice import SWITCH, Attention

ROWS = 4
READERS = {"qwen2": CHECKPOINT, "internlm2": REPOSITORY / "examples" / "reader" / "internlm2"}


@pytest.fixture
def native(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, str(library))


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "internlm2"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """4-bit weights, with the int8 graph for prompts."""
    folder = tmp_path_factory.mktemp("native")
    source = tiny.write_checkpoint(folder / "float", text=request.param)
    body = Scheme(4, 32, symmetric=False)
    quantized, _ = write_quantized(source, folder, method="compressed-tensors", body=body)
    return Bundle.open(export_bundle(quantized, folder / "bundle", dialects=["onnxruntime"], int8_prompts=True))


def engine_of(bundle: Bundle, rows: int = 1, threads: int = 1) -> OnnxRuntimeEngine:
    engine = OnnxRuntimeEngine(bundle, capacity=700, rows=rows, threads=threads)
    assert engine.attention.file is not None
    return engine


def embeds_of(bundle: Bundle, count: int, seed: int) -> np.ndarray:
    width = bundle.manifest.model.decoder.hidden_size
    return (np.random.default_rng(seed).standard_normal((count, width)) * 0.3).astype(np.float32)


@pytest.mark.parametrize("reader", READERS)
def test_whole_models_answer_token_for_token(
    reader: str, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The readers in floats, all of whose graphs have the operators here; images of one tile and of several."""
    bundle = export_bundle(READERS[reader], tmp_path / "bundle", dialects=["onnxruntime"])
    answers = []
    for library_used in (None, library):
        graphs = {names.VISION: 192, names.DECODERS["onnxruntime"]: 256}
        monkeypatch.setattr(engine_module, "choose_attention", lambda *_: Attention(library_used, "", graphs))  # noqa: B023
        with InternVL.load(bundle, engine="onnxruntime", threads=1) as model:
            asked = demo_questions()
            whole = [model.chat(each.question, [each.image]) for each in asked]
            small = [model.chat(each.question * 9, [each.image], max_tiles=1) for each in asked]
            assert [each.text for each in whole] == [each.expected for each in asked]
            answers.append([each.output_ids for each in (*whole, *small)])
    assert answers[0] == answers[1]


def test_logits_are_those_of_the_graphs_own_operators_within_rounding(bundle: Bundle, native: None) -> None:
    engine, own = engine_of(bundle), OnnxRuntimeEngine(bundle, capacity=700, threads=1, exact=True)
    assert own.attention.file is None
    embeds = embeds_of(bundle, 650, seed=1)
    for length in (9, 600):
        engine.cache.reset(), own.cache.reset()
        for found, expected in (
            (engine.prefill(embeds[:length]), own.prefill(embeds[:length])),
            *((engine.decode(embed), own.decode(embed)) for embed in embeds[length : length + 5]),
        ):
            assert 0 < np.abs(found - expected).max() < 0.1 * expected.std()  # 0 would be the own operators


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_unequal_length_are_as_alone(bundle: Bundle, native: None, threads: int) -> None:
    engine = engine_of(bundle, ROWS, threads)
    prompts = [3, 200, 64, 129, 17, 300]
    embeds = [embeds_of(bundle, prompt + 12, seed) for seed, prompt in enumerate(prompts)]
    alone = []
    for each, prompt in zip(embeds, prompts, strict=True):
        engine.cache.reset(0, 2)
        engine.prefill(each[:prompt], 2)
        alone.append([engine.decode(embed, 2).copy() for embed in each[prompt:]])
    for chosen in ([0, 1, 2, 3], [5, 4], [1, 5, 3]):
        for row, index in enumerate(chosen):
            engine.cache.reset(0, row)
            engine.prefill(embeds[index][: prompts[index]], row)
        for turn in range(12):
            rows = list(range(len(chosen)))[:: -1 if turn % 2 else 1]
            step = np.stack([embeds[chosen[row]][prompts[chosen[row]] + turn] for row in rows])
            for row, logits in zip(rows, engine.decode_rows(step, rows), strict=True):
                np.testing.assert_array_equal(logits, alone[chosen[row]][turn])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_prompt_goes_on_at_the_end_of_a_step_as_in_one_piece(bundle: Bundle, native: None, threads: int) -> None:
    engine = engine_of(bundle, threads=threads)
    for total in (65, 129, 200, 577):
        embeds = embeds_of(bundle, total, seed=total)
        engine.cache.reset()
        whole = engine.prefill(embeds).copy()
        for start in np.cumsum(engine.steps(total))[:-1].tolist():
            engine.cache.reset(start)
            np.testing.assert_array_equal(engine.prefill(embeds[start:]), whole)


def test_the_number_of_threads_changes_no_bit_of_attention(bundle: Bundle, native: None) -> None:
    """Not all of ONNX Runtime's own operators keep this, so one model is compared with itself in two orders."""
    engine = engine_of(bundle, threads=2)
    embeds = embeds_of(bundle, 400, seed=7)
    first = engine.prefill(embeds).copy()
    for _ in range(5):
        engine.cache.reset()
        np.testing.assert_array_equal(engine.prefill(embeds), first)


def test_an_interrupted_call_ends_and_the_next_one_is_right(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = {names.DECODERS["onnxruntime"]: 256}
    monkeypatch.setattr(engine_module, "choose_attention", lambda *_: Attention(library, "", graphs))
    monkeypatch.setattr(engine_module, "PREFILL_SIZES", (3000,))
    opened = Bundle.open(export_bundle(CHECKPOINT, tmp_path / "bundle", dialects=["onnxruntime"]))
    engine = OnnxRuntimeEngine(opened, capacity=3000, threads=1)
    embeds = embeds_of(opened, 3000, seed=0)
    assert_interruptible(engine, embeds)
