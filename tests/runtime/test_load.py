"""Bounds of what a bundle is loaded with, checked before anything is opened; what is loaded together; free memory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from helpers.tiny_quantized import write_quantized
from internvl_edge import InternVL, export_bundle
from internvl_edge.base.errors import EdgeError, EngineError
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.model.linear import Scheme
from internvl_edge.runtime import model
from internvl_edge.runtime.engines import onnxruntime
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_threads_that_no_machine_runs_are_refused(tmp_path: Path, threads: int) -> None:
    with pytest.raises(EngineError, match=f"threads is {threads}, expected 1 to"):
        InternVL.load(tmp_path, threads=threads)


@pytest.mark.parametrize("context", [-1, 0, 1])
def test_a_context_without_room_is_refused(tmp_path: Path, context: int) -> None:
    with pytest.raises(EngineError, match=f"a context of {context} tokens has no room"):
        InternVL.load(tmp_path, context=context)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit bundle with int8 prompts."""
    folder, body = tmp_path_factory.mktemp("load"), Scheme(4, 64, symmetric=True)
    source = tiny.write_checkpoint(folder / "float")
    quantized, _ = write_quantized(source, folder, method="compressed-tensors", body=body)
    return export_bundle(quantized, folder / "bundle", dialects=["onnxruntime"], int8_prompts=True)


def test_tokenizer_and_graphs_are_loaded_side_by_side(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three begins before any of them ends."""
    monkeypatch.setattr(onnxruntime, "multiplies_int8_exactly", lambda: True)
    all_begun, begun = threading.Barrier(3, timeout=30), []
    session, read = OnnxRuntimeEngine._session, model.Tokenizer

    def loading(self: Any, opened: Any, name: str, *rest: Any) -> Any:
        begun.append(name)
        all_begun.wait()
        return session(self, opened, name, *rest)

    def reading(path: Path) -> Any:
        begun.append(path.name)
        all_begun.wait()
        return read(path)

    monkeypatch.setattr(OnnxRuntimeEngine, "_session", loading)
    monkeypatch.setattr(model, "Tokenizer", reading)
    InternVL.load(bundle, device="cpu", engine="onnxruntime", context=64).close()
    assert set(begun) == {names.TOKENIZER, names.PROMPTS, names.DECODERS["onnxruntime"]}


@pytest.mark.parametrize("name", [names.TOKENIZER, names.PROMPTS, names.DECODERS["onnxruntime"]])
def test_whichever_of_them_fails_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(onnxruntime, "multiplies_int8_exactly", lambda: True)
    path, broken = Bundle.path, bundle.parent / "broken"
    broken.write_bytes(b"nothing")
    monkeypatch.setattr(Bundle, "path", lambda self, each: broken if each == name else path(self, each))
    with pytest.raises(EdgeError, match=r"broken cannot be read|cannot load .*broken"):
        InternVL.load(bundle, device="cpu", engine="onnxruntime", context=64)


def test_tiles_and_prompts_give_free_memory_back_at_their_end_and_tokens_do_not(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "multiplies_int8_exactly", lambda: True)
    engine = OnnxRuntimeEngine(Bundle.open(bundle), capacity=256)
    shrunk: list[bool] = []
    plain = engine._ort.RunOptions

    class Recording(plain):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            shrunk.append(False)

        def add_run_config_entry(self, name: str, value: str) -> None:
            super().add_run_config_entry(name, value)
            shrunk[-1] = (name, value) == ("memory.enable_memory_arena_shrinkage", "cpu:0")

    monkeypatch.setattr(engine._ort, "RunOptions", Recording)
    decoder, vision = engine._decoder, Bundle.open(bundle).manifest.model.vision
    embeds = np.random.default_rng(0).standard_normal((128, decoder.hidden_size)).astype(np.float32)
    assert engine.steps(101) == [64, 36, 1]
    engine.prefill(embeds[:101])
    assert shrunk == [False, True, False], "the last step of the graph for prompts"
    engine.decode(embeds[0])
    engine.score(embeds[:8])
    assert shrunk[3:] == [False, False]
    engine.cache.reset()
    engine.prefill(embeds[:12])
    assert shrunk[5:] == [True], "the only step of a short prompt"
    engine.encode(np.zeros((1, vision.image_size, vision.image_size, 3), np.uint8))
    assert shrunk[6:] == [True]
