"""Rows of the KV cache in ONNX Runtime and OpenVINO: each row computes what it would compute alone, to the bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers import kv_scales, tiny, tiny_quantized
from helpers.engines import assert_interruptible
from internvl_edge import InternVL, export_bundle
from internvl_edge.base.errors import EngineError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from internvl_edge.runtime.engines.openvino import OpenVinoEngine

ROWS = 8


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "internlm2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), text=request.param)


@pytest.fixture(scope="module", params=["float32", "int4", "int8 cache"])
def bundle(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    if request.param == "int4":
        checkpoint, _ = tiny_quantized.write_quantized(checkpoint, folder)
    if request.param == "int8 cache":
        checkpoint = Path(shutil.copytree(checkpoint, folder / "scales"))
        kv_scales.write_scales(checkpoint)
    return export_bundle(checkpoint, folder / "bundle", dtype="float32")


def engine_of(bundle: Path, dialect: str, rows: int = ROWS, threads: int = 1) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(Bundle.open(bundle), dialect=dialect, capacity=384, rows=rows, threads=threads)


def embeds_of(engine: OnnxRuntimeEngine, count: int, seed: int) -> np.ndarray:
    hidden = engine._decoder.hidden_size
    return (np.random.default_rng(seed).standard_normal((count, hidden)) * 0.3).astype(np.float32)


class Alone:
    """What one sequence gives when nothing else is in the cache of an engine with as many rows."""

    def __init__(self, engine: OnnxRuntimeEngine, prompt: int, seed: int) -> None:
        self.embeds = embeds_of(engine, prompt + 40, seed)
        self.prompt = prompt
        self.logits = [engine.prefill(self.embeds[:prompt], 0).copy()]
        self.logits += [engine.decode(row, 0).copy() for row in self.embeds[prompt:]]
        self.done = 0
        engine.cache.reset()


@pytest.mark.parametrize("dialect", ["standard", "onnxruntime"])
def test_rows_of_unequal_length_are_as_alone(bundle: Path, dialect: str) -> None:
    """Random sets of 1 to 8 rows decode; rows leave and others begin in their place."""
    engine = engine_of(bundle, dialect)
    alone = [Alone(engine, prompt, seed) for seed, prompt in enumerate((3, 30, 17, 64, 1, 45, 8, 22, 31, 5, 50, 12))]
    waiting, running = list(alone), dict[int, Alone]()
    choice = random.Random(0)
    sizes = set()
    while waiting or running:
        if waiting and len(running) < ROWS and choice.random() < 0.4:
            row = choice.choice([each for each in range(ROWS) if each not in running])
            one = running[row] = waiting.pop()
            engine.cache.reset(0, row)
            np.testing.assert_array_equal(engine.prefill(one.embeds[: one.prompt], row), one.logits[0])
        rows = [row for row in running if choice.random() < 0.8]
        choice.shuffle(rows)
        if rows:
            sizes.add(len(rows))
            ones = [running[row] for row in rows]
            found = engine.decode_rows(np.stack([one.embeds[one.prompt + one.done] for one in ones]), rows)
            for one, logits in zip(ones, found, strict=True):
                one.done += 1
                np.testing.assert_array_equal(logits, one.logits[one.done])
        for row in [row for row, one in running.items() if one.done == 40]:
            del running[row]
    assert sizes == set(range(1, ROWS + 1))


def test_guesses_are_scored_in_their_row(bundle: Path) -> None:
    """A step of several tokens rounds otherwise than several steps, but it is the same in every row."""
    engine = engine_of(bundle, "onnxruntime")
    one = Alone(engine, 20, seed=3)
    engine.prefill(one.embeds[:20], 5)
    found = engine.score(one.embeds[20:33], 5)
    assert np.abs(found - np.stack(one.logits[1:14])).max() < 0.1 * found.std()
    engine.prefill(one.embeds[:20], 2)
    np.testing.assert_array_equal(engine.score(one.embeds[20:33], 2), found)


@pytest.mark.parametrize("dialect", ["standard", "onnxruntime"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_prompt_goes_on_at_the_end_of_a_step_as_in_one_piece(bundle: Path, dialect: str, threads: int) -> None:
    engine = engine_of(bundle, dialect, threads=threads)
    for total in (65, 127, 128, 200, 321):
        embeds = embeds_of(engine, total, seed=total)
        engine.cache.reset()
        whole = engine.prefill(embeds).copy()
        for start in np.cumsum(engine.steps(total))[:-1].tolist():
            engine.cache.reset(start)
            np.testing.assert_array_equal(engine.prefill(embeds[start:]), whole)


@pytest.mark.parametrize("dialect", ["standard", "onnxruntime"])
def test_a_copied_prefix_is_the_prefix(bundle: Path, dialect: str) -> None:
    engine = engine_of(bundle, dialect)
    one = Alone(engine, 48, seed=9)
    engine.prefill(one.embeds[:48], 2)
    engine.copy(2, 6, 48)
    assert (engine.cache.length(2), engine.cache.length(6)) == (48, 48)
    for step in range(3):
        found = engine.decode_rows(np.stack([one.embeds[48 + step]] * 2), [6, 2])
        for logits in found:
            np.testing.assert_array_equal(logits, one.logits[1 + step])


def test_a_full_row_is_refused_before_any_row_changes(bundle: Path) -> None:
    engine = engine_of(bundle, "onnxruntime", rows=2)
    embeds = embeds_of(engine, 384, seed=1)
    engine.prefill(embeds, 0)
    engine.prefill(embeds[:5], 1)
    with pytest.raises(EngineError, match="1 tokens do not fit the cache, 384 of 384 are used"):
        engine.decode_rows(embeds[:2], [1, 0])
    assert (engine.cache.length(0), engine.cache.length(1)) == (384, 5)


def test_openvino_prompts_go_to_their_rows(tmp_path: Path, checkpoint: Path) -> None:
    opened = Bundle.open(export_bundle(checkpoint, tmp_path / "bundle", dtype="float32"))
    engine = OpenVinoEngine(opened, capacity=512, rows=3, threads=1)
    embeds = embeds_of(engine, 300, seed=0)
    alone = engine.prefill(embeds[:200], 0).copy()
    steps = engine.prefill_steps(embeds[:290], 2)
    next(steps)
    found = [engine.decode(embed, 0).copy() for embed in embeds[200:204]]
    assert sum(1 for _ in steps)
    engine.prefill(embeds[:200], 1)
    for embed, logits in zip(embeds[200:204], found, strict=True):
        np.testing.assert_array_equal(engine.decode_rows(embed[None], [1])[0], logits)
    np.testing.assert_array_equal(engine.prefill(embeds[:200], 1) if engine.cache.reset(0, 1) else alone, alone)


def test_an_interrupted_call_ends_and_the_next_one_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from internvl_edge.demo import CHECKPOINT

    monkeypatch.setattr("internvl_edge.runtime.engines.onnxruntime.PREFILL_SIZES", (4000,))
    opened = Bundle.open(export_bundle(CHECKPOINT, tmp_path / "bundle"))
    engine = OnnxRuntimeEngine(opened, capacity=4000, threads=1)
    embeds = embeds_of(engine, 4000, seed=0)
    assert_interruptible(engine, embeds)


def test_what_cannot_have_rows_says_so(bundle: Path) -> None:
    with pytest.raises(EngineError, match="rows is 0, expected 1 to 64"):
        InternVL.load(bundle, rows=0)
