"""This project as a worker: cpu_ours.py BUNDLE [KEYWORD=VALUE for `InternVL.load`]."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np
from cpu_worker import LONG_CONTEXT, STEPS, TEXT, THREADS, TILE, TILE_TOKENS, Action, serve, timed

from internvl_edge import InternVL


def load() -> dict[str, Action]:
    keywords: dict[str, Any] = dict(word.split("=", 1) for word in sys.argv[2:])
    opened = partial(InternVL.load, sys.argv[1], device="cpu", threads=THREADS, context=LONG_CONTEXT, **keywords)
    model = opened()
    engine = model.engine
    random = np.random.default_rng(0)
    rows = random.standard_normal((7 * TILE_TOKENS + TEXT, model.config.decoder.hidden_size)).astype(np.float32) * 0.05
    tiles = random.integers(0, 256, (7, TILE, TILE, 3), np.uint8)
    held = 0  # tokens of the prompt that the cache begins with

    def prefill(count: int) -> float:
        nonlocal held
        engine.cache.reset()
        held = count
        prompt = rows[:count] if count <= len(rows) else np.resize(rows, (count, rows.shape[1]))
        return timed(lambda: engine.prefill(prompt))

    def decode(context: int) -> float:
        if held == context:
            engine.cache.reset(context)
        else:
            prefill(context)
        return timed(lambda: [engine.decode(row) for row in rows[:STEPS]])

    def several(count: int) -> float:
        nonlocal model, engine
        if engine.cache.rows != count:  # from here on, other figures would be those of an engine with several rows
            model.close()
            model = opened(rows=count)
            engine = model.engine
        engine.cache.reset()
        engine.prefill(rows[:TEXT])
        for row in range(1, count):
            engine.copy(0, row, TEXT)
        return timed(lambda: [engine.decode_rows(rows[step : step + count], range(count)) for step in range(STEPS)])

    def vision(count: int) -> float:
        return timed(lambda: engine.encode(tiles[:count]))

    def first_token(count: int) -> float:
        def question() -> None:
            image = engine.encode(tiles[:count]).reshape(-1, rows.shape[1])
            engine.cache.reset()
            engine.prefill(np.concatenate([image, rows[:TEXT]]))

        nonlocal held
        held = 0
        return timed(question)

    return {"prefill": prefill, "decode": decode, "vision": vision, "first_token": first_token, "rows": several}


if __name__ == "__main__":
    serve(load)
