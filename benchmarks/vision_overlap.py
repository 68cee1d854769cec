"""Is it worth computing the tower in a thread of its own, while other rows decode?

    python benchmarks/vision_overlap.py BUNDLE [--threads 2] [--rounds 5]

One tile and `STEPS` decode steps of eight rows, in turn in one thread, as the scheduler does it, and side by side in
two threads; with sessions of `--threads` threads, and side by side with sessions of half as many, so that no more
threads than cores run. An answer of 100 tokens takes 12 steps of the decoder where eight rows share each. All ways take
turns. It needs a machine without other jobs: two threads get a larger share of a busy one than one thread does, and
those of one session that wait for each other spin. Writes results/vision-overlap.json: medians of wall and CPU seconds,
and those of the tile and of the steps alone.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from record import write_results

from internvl_edge import InternVL
from internvl_edge.runtime.engines import Engine

ROWS, CONTEXT, STEPS = 8, 340, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    load = partial(InternVL.load, asked.bundle, engine="onnxruntime", context=1024, rows=ROWS)
    with load(threads=asked.threads) as whole, load(threads=asked.threads // 2) as half:
        engines, hidden = (whole.engine, half.engine), whole.config.decoder.hidden_size
        for engine in engines:
            fill(engine, hidden)
        size = whole.config.vision.image_size
        pixels = np.random.default_rng(1).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
        ways: dict[str, Callable[[], object]] = {
            "in turn": partial(in_turn, engines[0], hidden, pixels),
            "the tile alone": partial(engines[0].encode, pixels),
            "the tile alone, half the threads": partial(engines[1].encode, pixels),
            "the steps alone": partial(decode, engines[0], hidden),
            "the steps alone, half the threads": partial(decode, engines[1], hidden),
            "side by side": partial(side_by_side, engines[0], hidden, pixels),
            "side by side, half the threads each": partial(side_by_side, engines[1], hidden, pixels),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(asked.rounds + 1):
            for name, way in ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                way()
                if number:
                    seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            print(number, {name: each[-1:] for name, each in seconds.items()}, flush=True)
    found = {
        name: {"wall": statistics.median(wall for wall, _ in each), "cpu": statistics.median(cpu for _, cpu in each)}
        for name, each in seconds.items()
    }
    values = {"bundle": asked.bundle.name, "threads": asked.threads, "rounds": asked.rounds, "steps": STEPS}
    print(write_results("vision-overlap", values | {"seconds": found}))


def fill(engine: Engine, hidden: int) -> None:
    embeds = (np.random.default_rng(0).standard_normal((CONTEXT, hidden)) * 0.05).astype(np.float32)
    engine.prefill(embeds)
    for row in range(1, ROWS):
        engine.copy(0, row, CONTEXT)


def decode(engine: Engine, hidden: int) -> None:
    embeds = np.full((ROWS, hidden), 0.05, np.float32)  # the same in each step: only the time counts
    for row in range(ROWS):
        engine.cache.reset(CONTEXT, row)
    for _ in range(STEPS):
        engine.decode_rows(embeds, range(ROWS))


def in_turn(engine: Engine, hidden: int, pixels: NDArray[np.uint8]) -> None:
    engine.encode(pixels)
    decode(engine, hidden)


def side_by_side(engine: Engine, hidden: int, pixels: NDArray[np.uint8]) -> None:
    thread = threading.Thread(target=engine.encode, args=(pixels,))
    thread.start()
    decode(engine, hidden)
    thread.join()


if __name__ == "__main__":
    main()
