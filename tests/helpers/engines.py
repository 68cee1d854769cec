"""Open ONNX Runtime engines of a bundle for tests, and run prompts on them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.reference import Reference
from internvl_edge.base.errors import EngineError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.runtime.engines import onnxruntime as engine_module
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

TEXT = [5, 9, 42, 17, 100, 3, 77]


def random_tiles(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def greedy(
    engine: OnnxRuntimeEngine, embeds: np.ndarray, table: np.ndarray, count: int
) -> tuple[list[int], np.ndarray]:
    """Return tokens and the logits [count, vocab] that they were chosen from."""
    engine.cache.reset()
    logits = [engine.prefill(embeds).copy()]
    tokens = [int(logits[0].argmax())]
    while len(tokens) < count:
        logits.append(engine.decode(table[tokens[-1]]).copy())
        tokens.append(int(logits[-1].argmax()))
    return tokens, np.stack(logits)


def assert_interruptible(engine: OnnxRuntimeEngine, embeds: np.ndarray) -> None:
    """A call that is interrupted ends with an error and leaves nothing, and the next one is right."""
    started = time.perf_counter()
    whole = engine.prefill(embeds).copy()
    seconds = time.perf_counter() - started
    engine.cache.reset()
    timer = threading.Timer(seconds / 10, engine.interrupt)
    timer.start()
    with pytest.raises(EngineError, match="the computation was interrupted"):
        engine.prefill(embeds)
    assert engine.cache.length() == 0
    np.testing.assert_array_equal(engine.prefill(embeds), whole)


def engine_for(bundle: Path, dialect: str, capacity: int = 1024) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(Bundle.open(bundle), dialect=dialect, capacity=capacity, threads=1)


def run(bundle: Path, dialect: str, reference: Reference, count: int) -> np.ndarray:
    """Return logits [count, vocab] of a prompt and its greedy continuation."""
    engine = OnnxRuntimeEngine(Bundle.open(bundle), dialect=dialect, capacity=64, threads=1)
    logits = [engine.prefill(reference.embed(TEXT).numpy()).copy()]
    while len(logits) < count:
        logits.append(engine.decode(reference.embed([int(logits[-1].argmax())])[0].numpy()).copy())
    return np.stack(logits)


def require_wide_sums_where_needed(
    opened: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    session: Callable[[engine_module.OnnxRuntimeEngine], Any],
    compute: Callable[[engine_module.OnnxRuntimeEngine], np.ndarray],
    tolerance: float,
) -> None:
    """Check that only a CPU that saturates gets sums in 32 bits, and that both ways give the same numbers."""
    key, found = "session.x64quantprecision", []
    for exact in (True, False):
        monkeypatch.setattr(engine_module, "multiplies_int8_exactly", lambda exact=exact: exact)
        engine = engine_module.OnnxRuntimeEngine(opened, capacity=64, threads=1)
        options = session(engine).get_session_options()
        if exact:
            with pytest.raises(RuntimeError, match=key):
                options.get_session_config_entry(key)
        else:
            assert options.get_session_config_entry(key) == "1"
        found.append(compute(engine).copy())
    np.testing.assert_allclose(found[0], found[1], atol=tolerance)
