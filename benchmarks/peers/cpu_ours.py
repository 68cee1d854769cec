"""This project as a worker: cpu_ours.py BUNDLE [KEYWORD=VALUE for `InternVL.load`]."""

from __future__ import annotations

import sys

import numpy as np
from cpu_worker import STEPS, TEXT, THREADS, TILE, TILE_TOKENS, Action, serve, timed

from internvl_edge import InternVL


def load() -> dict[str, Action]:
    keywords = dict(word.split("=", 1) for word in sys.argv[2:])
    model = InternVL.load(sys.argv[1], threads=THREADS, context=4096, **keywords)  # type: ignore[arg-type]
    engine = model.engine
    random = np.random.default_rng(0)
    rows = random.standard_normal((7 * TILE_TOKENS + TEXT, model.config.decoder.hidden_size)).astype(np.float32) * 0.05
    tiles = random.integers(0, 256, (7, TILE, TILE, 3), np.uint8)

    def prefill(count: int) -> float:
        engine.cache.reset()
        return timed(lambda: engine.prefill(rows[:count]))

    def decode(context: int) -> float:
        prefill(context)
        return timed(lambda: [engine.decode(row) for row in rows[:STEPS]])

    def vision(count: int) -> float:
        return timed(lambda: engine.encode(tiles[:count]))

    def first_token(count: int) -> float:
        def question() -> None:
            image = engine.encode(tiles[:count]).reshape(-1, rows.shape[1])
            engine.cache.reset()
            engine.prefill(np.concatenate([image, rows[:TEXT]]))

        return timed(question)

    return {"prefill": prefill, "decode": decode, "vision": vision, "first_token": first_token}


if __name__ == "__main__":
    serve(load)
