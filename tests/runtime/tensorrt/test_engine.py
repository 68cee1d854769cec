"""The TensorRT engine's host side over a fake GPU: what is bound, copied, waited for, counted and given back."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.fake_gpu import FakeContext, FakeCuda, FakeEngine, FakeTensorRT
from helpers.recorded_progress import RecordedProgress
from helpers.tensorrt_engines import CAPACITY, FLAVOURS, OLD, open_engine, write_engines
from internvl_edge.base.errors import EngineError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from internvl_edge.runtime.engines.tensorrt import engine as tensorrt
from internvl_edge.runtime.engines.tensorrt.buffers import HALVES
from internvl_edge.runtime.engines.tensorrt.cuda import Cuda
from internvl_edge.runtime.engines.tensorrt.engine import TensorRTEngine
from internvl_edge.runtime.engines.tensorrt.flavour import Flavour, load_flavour, make_log
from internvl_edge.runtime.engines.tensorrt.record import (
    engine_folder,
    find_engines,
)

pytestmark = pytest.mark.usefixtures("small_windows")
# These may fail without an error: decoding then goes on without a CUDA graph.
CAPTURING = {"cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"}


def rows(bundle: Bundle, count: int, seed: int = 3) -> np.ndarray[Any, Any]:
    width = bundle.manifest.model.decoder.hidden_size
    return (0.6 * np.random.default_rng(seed).standard_normal((count, width))).astype(np.float32)


# -- what goes where ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flavour", "version"), [*FLAVOURS.items(), ("tensorrt", OLD)])
@pytest.mark.parametrize("profiles", [1, 2, 3])
@pytest.mark.parametrize(("cache", "tolerance"), [("exported", 0.03), ("rounded", 0.2)])
def test_every_call_puts_the_right_numbers_in_the_right_places(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    flavour: str,
    version: str,
    cache: str,
    tolerance: float,
    profiles: int,
) -> None:
    """Prompts in chunks, single tokens, guessed tokens and a shortened cache follow the CPU engine step by step.

    In 16 bits some keys fall to the other side of the middle between two integers: 0.02 to 0.12 of the deviation here.
    """
    monkeypatch.setitem(FLAVOURS, flavour, version)
    exported: Bundle = request.getfixturevalue(cache)
    write_engines(exported, flavour, profiles)
    expected = OnnxRuntimeEngine(exported, capacity=CAPACITY)
    embeds = rows(exported, CAPACITY)
    with open_engine(exported, FakeCuda(), flavour, profiles)[0] as engine:
        assert engine.cache.capacity == CAPACITY

        def same(mine: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> None:
            assert mine.shape == theirs.shape
            assert np.abs(mine - theirs).max() < tolerance * theirs.std()
            assert engine.cache.length() == expected.cache.length()

        same(engine.prefill(embeds[:37]), expected.prefill(embeds[:37]))
        for n in range(37, 45):
            same(engine.decode(embeds[n]), expected.decode(embeds[n]))
        same(engine.score(embeds[45:52]), expected.score(embeds[45:52]))
        for n in range(52, 56):
            assert engine.decode_token(embeds[n]) == expected.decode(embeds[n]).argmax()
        for target in (engine, expected):
            target.cache.reset(20)
        same(engine.prefill(embeds[60:70]), expected.prefill(embeds[60:70]))
        for n in range(66):
            same(engine.decode(embeds[n]), expected.decode(embeds[n]))
        assert engine.cache.length() == CAPACITY
        with pytest.raises(EngineError, match="1 tokens do not fit the cache, 96 of 96 are used"):
            engine.decode(embeds[0])
        with pytest.raises(EngineError, match="2 tokens do not fit"):
            engine.score(embeds[:2])


@pytest.mark.parametrize(("flavour", "version"), [*FLAVOURS.items(), ("tensorrt", OLD)])
@pytest.mark.parametrize("capacity", [61, 63])
@pytest.mark.parametrize(("cache", "tolerance"), [("exported", 0.03), ("rounded", 0.2)])
def test_addresses_of_the_cache_are_aligned_whatever_the_context(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    flavour: str,
    version: str,
    capacity: int,
    cache: str,
    tolerance: float,
) -> None:
    """TensorRT takes addresses at multiples of 256 bytes, which the fake checks; gaps must not move the entries."""
    monkeypatch.setitem(FLAVOURS, flavour, version)
    bundle: Bundle = request.getfixturevalue(cache)
    decoder = bundle.manifest.model.decoder
    itemsize = 1 if cache == "rounded" else 2
    assert decoder.num_key_value_heads * capacity * decoder.head_dim * itemsize % 256  # a part of the cache alone
    write_engines(bundle, flavour, capacity=capacity)
    expected = OnnxRuntimeEngine(bundle, capacity=capacity)
    embeds = rows(bundle, capacity)
    with open_engine(bundle, FakeCuda(), flavour)[0] as engine:
        found, wanted = engine.prefill(embeds[:41]), expected.prefill(embeds[:41])
        assert np.abs(found - wanted).max() < tolerance * wanted.std()
        for row in embeds[41:]:
            found, wanted = engine.decode(row), expected.decode(row)
            assert np.abs(found - wanted).max() < tolerance * wanted.std()


def test_prompts_of_all_lengths_have_few_shapes(exported: Bundle) -> None:
    """A shape costs a compilation on an RTX card, and a prompt that follows another one starts anywhere."""
    write_engines(exported, "tensorrt_rtx")
    expected = OnnxRuntimeEngine(exported, capacity=CAPACITY)
    embeds = rows(exported, CAPACITY)
    with open_engine(exported, FakeCuda(), "tensorrt_rtx")[0] as engine:
        context = engine._prefill.context._context
        for start in (0, 7, 40):
            for count in range(1, CAPACITY - start - 3, 3):
                for each in (engine, expected):
                    each.cache.reset()
                    if start:
                        each.prefill(embeds[:start])
                found, wanted = (
                    engine.prefill(embeds[start : start + count]),
                    expected.prefill(embeds[start : start + count]),
                )
                assert np.abs(found - wanted).max() < 0.03 * wanted.std(), (start, count)
                assert engine.cache.length() == start + count
        # 4, 8 and 16 rows, and 1 and 2 at the end of the cache, with three windows each.
        assert {dict(shapes)["inputs_embeds"][1] for shapes in context.shapes} <= {1, 2, 4, 8, 16}
        assert len(context.shapes) <= 5 * 3
        guesses = set(context.shapes)
        for count in (2, 3):
            engine.cache.reset(10)
            engine.score(embeds[:count])
        assert len(set(context.shapes) - guesses) == 1


def test_prompts_have_no_padding_where_nothing_is_compiled(exported: Bundle) -> None:
    write_engines(exported, "tensorrt")
    with open_engine(exported, FakeCuda())[0] as engine:
        context = engine._prefill.context._context
        engine.prefill(rows(exported, 37))
        assert {dict(shapes)["inputs_embeds"][1] for shapes in context.shapes} == {16, 5}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_prompt_that_continues_at_the_end_of_a_step_takes_the_same_shapes(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    """Then it gets the same numbers, to the bit, as in an empty cache; the scheduler relies on it."""
    write_engines(exported, flavour)
    embeds = rows(exported, CAPACITY)
    with open_engine(exported, FakeCuda(), flavour)[0] as engine:
        shapes: list[tuple[int, ...]] = []
        reshape = engine._prefill.reshape
        monkeypatch.setattr(engine._prefill, "reshape", lambda *shape: (shapes.append(shape), reshape(*shape)))

        def computed(total: int) -> tuple[list[tuple[int, ...]], np.ndarray[Any, Any]]:
            shapes.clear()
            logits = engine.prefill(embeds[engine.cache.length() : total]).copy()
            return shapes.copy(), logits

        for total in (9, 37, 64, 93, CAPACITY):
            engine.cache.reset()
            planned = engine.steps(total)
            whole, logits = computed(total)
            assert (sum(planned), len(whole)) == (total, len(planned))
            for done in range(1, len(planned)):
                engine.cache.reset()
                engine.prefill(embeds[: sum(planned[:done]) + 1])
                engine.cache.reset(sum(planned[:done]))
                again, same = computed(total)
                assert again == whole[done:]
                np.testing.assert_array_equal(same, logits)


def test_tiles_are_encoded_in_batches(exported: Bundle) -> None:
    write_engines(exported, "tensorrt")
    size = exported.manifest.model.vision.image_size
    pixels = np.random.default_rng(4).integers(0, 256, (5, size, size, 3), np.uint8)
    expected = OnnxRuntimeEngine(exported, capacity=CAPACITY).encode(pixels)
    engine, api = open_engine(exported, FakeCuda())
    found = engine.encode(pixels)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 0.03 * expected.std()
    assert [context.runs for context in api.contexts] == [0, 0, 3]
    with pytest.raises(EngineError, match="expected uint8"):
        engine.encode(pixels.astype(np.float32))


def test_an_image_is_encoded_while_another_answer_is_decoded(exported: Bundle) -> None:
    """Each in a thread of its own, as a program with a queue of images would: streams and memory are not shared."""
    write_engines(exported, "tensorrt")
    size = exported.manifest.model.vision.image_size
    pixels = np.random.default_rng(4).integers(0, 256, (6, size, size, 3), np.uint8)
    embeds = rows(exported, 30)
    cuda = FakeCuda()
    with open_engine(exported, cuda)[0] as engine:
        expected = engine.encode(pixels), [engine.decode(row).copy() for row in embeds]
        engine.cache.reset()
        with ThreadPoolExecutor(2) as pool:
            seeing = pool.submit(lambda: [engine.encode(pixels) for _ in range(5)])
            answering = pool.submit(lambda: [engine.decode(row).copy() for row in embeds])
        for found in seeing.result():
            np.testing.assert_array_equal(found, expected[0])
        np.testing.assert_array_equal(answering.result(), expected[1])
        assert engine._stream != engine._vision._stream
    assert cuda.leaks == {}


def test_attention_sees_multiples_of_the_window(exported: Bundle) -> None:
    write_engines(exported, "tensorrt")
    engine, api = open_engine(exported, FakeCuda())
    engine.prefill(rows(exported, 30))
    for row in rows(exported, 5):
        engine.decode(row)
    decode, prefill, _ = api.contexts
    assert prefill.windows == [32, 32]
    assert decode.windows == [32, 32, 64, 64, 64]


def test_a_step_late_in_the_cache_reads_the_whole_of_it_in_place(exported: Bundle) -> None:
    """Of three programs, the second reads all slots, where a copy of the window would move more bytes."""
    write_engines(exported, "tensorrt", 3, capacity=160)
    engine, api = open_engine(exported, FakeCuda(), profiles=3, warm=True)
    part, whole, prefill, _ = api.contexts
    assert [context.profile for context in (part, whole, prefill)] == [0, 1, 2]
    warm = len(part.windows), len(whole.windows)
    engine.prefill(rows(exported, 30))
    for row in rows(exported, 10):
        engine.decode(row)
    assert part.windows[warm[0] :] == [32, 32]
    assert whole.windows[warm[1] :] == [160] * 8
    engine.close()


# -- CUDA graphs and copies --------------------------------------------------------------------------------------------


def test_one_graph_is_captured_per_window_and_launched_again(exported: Bundle) -> None:
    write_engines(exported, "tensorrt")
    cuda = FakeCuda()
    engine, api = open_engine(exported, cuda)
    engine.prefill(rows(exported, 8))
    for row in rows(exported, 40):
        engine.decode_token(row)
    # 24 steps in the first window, 16 in the second: each runs once plainly, is captured once, then launched.
    assert cuda.calls["cudaGraphInstantiate"] == 2
    assert cuda.calls["cudaGraphLaunch"] == 23 + 15
    assert api.contexts[0].runs == 2 * 2
    assert len(cuda.graphs) == 1
    engine.close()
    assert cuda.graphs == {}


def test_rtx_is_asked_to_keep_graphs_itself(exported: Bundle) -> None:
    write_engines(exported, "tensorrt_rtx")
    cuda = FakeCuda()
    engine, api = open_engine(exported, cuda, "tensorrt_rtx")
    for row in rows(exported, 4):
        engine.decode_token(row)
    assert [context.strategy for context in api.contexts] == ["whole graph", None, None]
    assert cuda.calls["cudaStreamBeginCapture"] == 0


def test_a_refused_capture_costs_speed_alone(exported: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    write_engines(exported, "tensorrt")
    cuda = FakeCuda()
    engine, api = open_engine(exported, cuda)
    embeds = rows(exported, 6)
    engine.decode(embeds[0])
    api.refused = "run"
    with caplog.at_level(logging.WARNING), pytest.raises(EngineError, match="the fake was told to refuse"):
        engine.decode(embeds[1])
    assert "without a CUDA graph" in caplog.text
    assert cuda.captures == {}
    api.refused = None
    engine.cache.reset(0)
    expected = OnnxRuntimeEngine(exported, capacity=CAPACITY)
    for row in embeds:
        logits = expected.decode(row)
        assert np.abs(engine.decode(row) - logits).max() < 0.03 * logits.std()
    assert cuda.calls["cudaGraphLaunch"] == 0


@pytest.mark.parametrize("function", sorted(CAPTURING))
def test_a_capture_that_fails_anywhere_costs_speed_alone(
    exported: Bundle, caplog: pytest.LogCaptureFixture, function: str
) -> None:
    """The library must not find the error of the capture later; the fake refuses to run while CUDA has one noted."""
    write_engines(exported, "tensorrt")
    cuda = FakeCuda(fail=(function, 0))
    embeds = rows(exported, 40)
    expected = OnnxRuntimeEngine(exported, capacity=CAPACITY)
    with caplog.at_level(logging.WARNING), open_engine(exported, cuda)[0] as engine:
        for row in embeds:
            logits = expected.decode(row)
            assert np.abs(engine.decode(row) - logits).max() < 0.03 * logits.std()
    assert [record.message for record in caplog.records] == [
        f"decoding without a CUDA graph: CUDA: {function} failed: unknown error"
    ]
    assert cuda.calls["cudaGraphLaunch"] == 0
    assert cuda.calls[function] == 1
    assert cuda.captures == {}
    assert cuda.leaks == {}


def test_only_a_token_comes_back_unless_logits_are_asked_for(exported: Bundle) -> None:
    write_engines(exported, "tensorrt")
    cuda = FakeCuda()
    engine, _ = open_engine(exported, cuda)
    engine.prefill(rows(exported, 4))
    embeds, decoder = rows(exported, 2), exported.manifest.model.decoder
    before = cuda.copied.copy()
    engine.decode_token(embeds[0])
    moved = cuda.copied - before
    assert moved["to host"] == 8 * 3
    # One embedding and its angles in 16 bits, two numbers, and what aligns them.
    assert moved["to device"] <= 2 * (decoder.hidden_size + decoder.head_dim) + 5 * 256
    before = cuda.copied.copy()
    logits = engine.last_logits().copy()
    assert (cuda.copied - before)["to host"] == 4 * decoder.vocab_size
    engine.cache.reset(4)
    np.testing.assert_array_equal(logits, engine.decode(embeds[0]))
    before = cuda.copied.copy()
    engine.decode(embeds[1])
    assert (cuda.copied - before)["to host"] == 8 * 3 + 4 * decoder.vocab_size


@pytest.mark.parametrize(
    ("flavour", "expected"),
    [
        ("tensorrt", {"cudaGraphLaunch": 1, "cudaStreamSynchronize": 1}),
        ("tensorrt_rtx", {"cudaMemcpyAsync": 2, "cudaStreamSynchronize": 1}),
    ],
)
def test_a_token_takes_few_calls(exported: Bundle, flavour: str, expected: dict[str, int]) -> None:
    """Each call takes about a microsecond of the host, for which the GPU waits."""
    write_engines(exported, flavour)
    cuda = FakeCuda()
    engine, _ = open_engine(exported, cuda, flavour)
    embeds = rows(exported, 4)
    for row in embeds[:3]:
        engine.decode_token(row)
    before = cuda.calls.copy()
    engine.decode_token(embeds[3])
    assert cuda.calls - before == expected


# -- lifetimes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", list(FLAVOURS))
def test_everything_is_given_back_once(exported: Bundle, flavour: str) -> None:
    write_engines(exported, flavour)
    cuda = FakeCuda()
    engine, _ = open_engine(exported, cuda, flavour)
    engine.prefill(rows(exported, 20))
    for row in rows(exported, 3):
        engine.decode(row)
    assert cuda.leaks
    engine.close()
    engine.close()
    assert cuda.leaks == {}
    forgotten, _ = open_engine(exported, cuda, flavour)
    del forgotten
    gc.collect()
    assert cuda.leaks == {}


def test_every_failure_is_one_error_and_leaves_nothing(exported: Bundle) -> None:
    """Each call of an opening, a prompt, an image and three steps fails once; the engine's memory is all given back."""
    write_engines(exported, "tensorrt")
    sound = FakeCuda()
    _work(exported, sound)
    releases = {"cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaGraphDestroy", "cudaGraphExecDestroy"}
    asked = {"cudaMemGetInfo", "cudaGetErrorString", "cudaGetLastError", "cudaStreamIsCapturing"}
    failed = 0
    for function in sorted(sound.calls.keys() - releases - asked - CAPTURING):
        count = sound.calls[function]
        for before in {0, 1, count // 2, count - 1} & set(range(count)):
            cuda = FakeCuda(fail=(function, before))
            with pytest.raises(EngineError, match=function) as error:
                _work(exported, cuda)
            assert "\n" not in str(error.value)
            # What a failed call should have made is not there; all else is gone.
            assert cuda.leaks == {}, (function, before)
            failed += 1
    assert failed > 20


def _work(bundle: Bundle, cuda: FakeCuda) -> None:
    size = bundle.manifest.model.vision.image_size
    engine, _ = open_engine(bundle, cuda)
    try:
        engine.encode(np.zeros((1, size, size, 3), np.uint8))
        engine.prefill(rows(bundle, 20))
        for row in rows(bundle, 3):
            engine.decode(row)
    finally:
        engine.close()


def test_too_little_memory_says_for_what_and_how_much_is_free(exported: Bundle) -> None:
    write_engines(exported, "tensorrt")
    cuda = FakeCuda(memory=30_000)
    with pytest.raises(EngineError, match=r"the GPU has \d+ of 1074 MB free; \d+ MB are needed for .*out of memory"):
        open_engine(exported, cuda)
    assert cuda.leaks == {}


@pytest.mark.parametrize("refused", ["inputs_embeds", "pixels", "present.0.key"])
def test_refused_addresses_name_the_tensor(exported: Bundle, refused: str) -> None:
    write_engines(exported, "tensorrt")
    cuda = FakeCuda()
    api = FakeTensorRT(cuda, exported.folder)
    api.refused = refused
    with pytest.raises(EngineError, match=f"refuses address of {refused}"):
        TensorRTEngine(exported, cuda=Cuda(cuda), flavour=Flavour("tensorrt", api, make_log(api)))
    assert cuda.leaks == {}


@pytest.mark.parametrize("cache", ["exported", "rounded"])
def test_shapes_run_before_the_first_answer_needs_them(request: pytest.FixtureRequest, cache: str) -> None:
    bundle: Bundle = request.getfixturevalue(cache)
    write_engines(bundle, "tensorrt_rtx")
    progress = RecordedProgress()
    engine, api = open_engine(bundle, FakeCuda(), "tensorrt_rtx", warm=True, progress=progress)
    decode, prefill, vision = api.contexts
    assert [context.specialization for context in api.contexts] == ["eager", "lazy", "eager"]
    assert decode.windows == [32, 64, 96]
    assert {dict(shapes)["inputs_embeds"][1] for shapes in prefill.shapes} == {4, 8, 16}
    assert {dict(shapes)["pixels"][0] for shapes in vision.shapes} == {1, 2}
    assert [(step.label, step.done, step.total) for step in progress.steps] == [
        ("compiling kernels for this GPU", 8, 8)
    ]
    assert engine.cache.length() == 0
    known = {id(context): set(context.shapes) for context in (decode, vision)}
    cold, _ = open_engine(bundle, FakeCuda(), "tensorrt_rtx")
    embeds = rows(bundle, CAPACITY)
    np.testing.assert_array_equal(engine.prefill(embeds[:20]), cold.prefill(embeds[:20]))
    for row in embeds[20:]:
        np.testing.assert_array_equal(engine.decode(row), cold.decode(row))
    size = bundle.manifest.model.vision.image_size
    engine.encode(np.zeros((5, size, size, 3), np.uint8))
    assert {id(context): set(context.shapes) for context in (decode, vision)} == known
    engine.close()
    open_engine(bundle, FakeCuda(), "tensorrt_rtx", warm=True, progress=progress)
    assert progress.steps[1].label == "warming up"


def test_one_run_of_each_kind_warms_what_compiles_nothing(exported: Bundle) -> None:
    write_engines(exported, "tensorrt")
    _, api = open_engine(exported, FakeCuda(), warm=True)
    assert [context.runs for context in api.contexts] == [1, 1, 1]


def test_too_many_compiled_kernels_are_neither_saved_nor_loaded(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_engines(exported, "tensorrt_rtx")
    engine, api = open_engine(exported, FakeCuda(), "tensorrt_rtx")
    engine.close()
    folder = engine_folder(exported, "fake")
    kept = folder / "decoder.runtime.cache"
    assert kept.read_bytes() == b"kernels"
    monkeypatch.setattr(tensorrt, "_LARGEST_KERNELS", 10)
    engine, api = open_engine(exported, FakeCuda(), "tensorrt_rtx")
    api.kernels = bytes(11)
    engine.close()
    assert kept.read_bytes() == b"kernels"
    kept.write_bytes(bytes(11))
    engine, api = open_engine(exported, FakeCuda(), "tensorrt_rtx")
    assert api.loaded_caches == [b"kernels"]  # the vision engine's
    engine.close()
    assert kept.read_bytes() == b"kernels"


def test_compiled_kernels_are_kept_for_the_next_start(exported: Bundle) -> None:
    write_engines(exported, "tensorrt_rtx")
    first, api = open_engine(exported, FakeCuda(), "tensorrt_rtx")
    assert api.loaded_caches == []
    first.close()
    second, api = open_engine(exported, FakeCuda(), "tensorrt_rtx")
    assert api.loaded_caches == [b"kernels", b"kernels"]
    second.close()


# -- which engines -----------------------------------------------------------------------------------------------------


def test_engines_must_be_for_this_gpu_this_bundle_and_this_library(exported: Bundle) -> None:
    record = write_engines(exported, "tensorrt")
    assert find_engines(exported, 86) == record
    with pytest.raises(EngineError, match=r"no engines for compute capability 8\.9 \(found: fake \(86\)\)"):
        open_engine(exported, FakeCuda(sm=89))
    write_engines(exported, "tensorrt", version="10.15.1")
    with pytest.raises(EngineError, match=r"10\.15\.1, installed is 10\.16\.1; build them again"):
        open_engine(exported, FakeCuda())
    write_engines(exported, "tensorrt", inputs=record.inputs | {"vision.onnx": "0" * 64})
    with pytest.raises(EngineError, match="built from other files"):
        open_engine(exported, FakeCuda())
    write_engines(exported, "tensorrt")
    path = engine_folder(exported, "fake") / "decoder.engine"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineError, match="was changed"):
        open_engine(exported, FakeCuda())
    path.write_bytes(data[:-1])
    with pytest.raises(EngineError, match="missing or incomplete"):
        open_engine(exported, FakeCuda())


def test_damaged_records_are_one_line(exported: Bundle) -> None:
    write_engines(exported, "tensorrt")
    path = engine_folder(exported, "fake") / "engine.json"
    values = json.loads(path.read_text())
    for broken in ("{", "[]", "{}", json.dumps(values | {"options": {"dtype": "float16", "wings": 2}})):
        path.write_text(broken)
        with pytest.raises(EngineError, match="is damaged"):
            find_engines(exported, 86)
    path.write_text(json.dumps(values | {"format_version": 99}))
    with pytest.raises(EngineError, match="newer version"):
        find_engines(exported, 86)


def test_sound_engines_are_found_beside_damaged_newer_stale_and_interrupted_ones(exported: Bundle) -> None:
    sound = write_engines(exported, "tensorrt")
    folder = engine_folder(exported, "fake")
    text = (folder / "engine.json").read_text(encoding="utf-8")
    engines = folder.parent
    stale = json.dumps(json.loads(text) | {"target": "an-old-one", "inputs": {"vision.onnx": "0" * 64}})
    beside = {
        ".fake.partial-x.old": text,
        "a-damaged-one": "{",
        "a-newer-one": text.replace('"format_version": 1', '"format_version": 99'),
        "an-old-one": stale,
    }
    try:
        for name, content in beside.items():
            shutil.copytree(folder, engines / name)
            (engines / name / "engine.json").write_text(content, encoding="utf-8")
        assert find_engines(exported, 86) == sound
        assert find_engines(exported, 86, "fake") == sound
        with pytest.raises(EngineError, match=r"an-old-one .* built from other files"):
            find_engines(exported, 86, "an-old-one")
        with pytest.raises(EngineError, match=r"a-newer-one.* newer version"):
            find_engines(exported, 86, "a-newer-one")
        shutil.rmtree(folder)
        with pytest.raises(EngineError, match=r"an-old-one .* built from other files"):
            find_engines(exported, 86)
        shutil.rmtree(engines / "an-old-one")
        with pytest.raises(EngineError, match=r"a-damaged-one.* is damaged"):
            find_engines(exported, 86)
        for name in ("a-damaged-one", "a-newer-one"):
            shutil.rmtree(engines / name)
        with pytest.raises(EngineError, match="found: none"):  # not what a build left unfinished
            find_engines(exported, 86)
    finally:
        for name in beside:
            shutil.rmtree(engines / name, ignore_errors=True)


def test_what_the_fake_cuda_has_the_library_has() -> None:
    """A call or a constant that only the fake has would fail on a device alone."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    names = [name for name in dir(FakeCuda) if name.startswith("cuda")]
    assert len(names) > 25
    for name in names:
        theirs, mine = getattr(runtime, name), getattr(FakeCuda, name)
        for member in vars(mine) if isinstance(mine, (SimpleNamespace, type)) else ():
            assert member.startswith("_") or hasattr(theirs, member), f"{name}.{member}"


def test_what_the_fake_tensorrt_has_the_library_has() -> None:
    api = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    for name in ("TensorIOMode", "ExecutionContextAllocationStrategy", "CudaGraphStrategy"):
        assert vars(getattr(FakeTensorRT, name)).keys() <= getattr(api, name).__members__.keys()
    strategies = FakeTensorRT.DynamicShapesKernelSpecializationStrategy
    assert vars(strategies).keys() <= api.DynamicShapesKernelSpecializationStrategy.__members__.keys()
    for fake, real in ((FakeEngine, api.ICudaEngine), (FakeContext, api.IExecutionContext)):
        for name in [name for name in vars(fake) if not name.startswith("_")]:
            assert hasattr(real, name), f"{real.__name__}.{name}"
    for name in ("dynamic_shapes_kernel_specialization_strategy", "cuda_graph_strategy", "set_runtime_cache"):
        assert hasattr(api.IRuntimeConfig, name)
    assert api.DataType.BF16.itemsize == 2


def test_without_a_driver_there_is_one_line() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    from cuda.bindings import runtime

    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=r"CUDA: cudaGetDeviceCount failed: .*driver"):
        Cuda()


def test_missing_and_old_libraries_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"tensorrt cannot be imported .*JetPack"):
        load_flavour("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(FakeCuda(), Path(), version="8.6.2"))
    with pytest.raises(EngineError, match=r"8\.6\.2 is too old for these graphs, 10\.3 is needed"):
        load_flavour("tensorrt")


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_bfloat16_bits_are_those_of_torch() -> None:
    import torch

    half = HALVES["bfloat16"]
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * 10.0 ** np.arange(-20, 20).repeat(
        250
    )
    values = np.concatenate([values, [0, -0.0, 1, 257, 259, np.inf]]).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    np.testing.assert_array_equal(half.pack(values), expected.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(half.unpack(half.pack(values)), expected.float().numpy())
