"""Load time, vision, prefill, decode and memory of a bundle on the CPU engine, in a fresh process.

    python benchmarks/run_speed.py BUNDLE [--repeat 3] [--threads 2]

Weights may be random: none of these figures depends on their values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from record import run_measured, write_results

PROMPTS = (300, 1800)
DECODED = 32


def main() -> None:
    """Measure and write `results/run-NAME.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_measure(arguments.bundle, arguments.repeat, arguments.threads)))
        return
    run = run_measured([sys.executable, __file__, *sys.argv[1:], "--child"])
    memory = {"peak_rss": run.peak_rss, "peak_anonymous": run.peak_anonymous}
    path = write_results(f"run-{arguments.bundle.name}", json.loads(run.stdout) | memory)
    print(path.read_text())


def _measure(folder: Path, repeat: int, threads: int) -> dict[str, Any]:
    from internvl_edge.bundle import Bundle
    from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

    started = time.perf_counter()
    opened = Bundle.open(folder)
    engine = OnnxRuntimeEngine(opened, capacity=4096, threads=threads)
    load_s = time.perf_counter() - started
    config = opened.manifest.model
    random = np.random.default_rng(0)
    size = config.vision.image_size
    tile = random.integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    embeds = random.standard_normal((max(PROMPTS), config.decoder.hidden_size)).astype(np.float32) * 0.05

    def median(action: Callable[[], object]) -> float:
        return statistics.median(_timed(action) for _ in range(repeat))

    def prefill(count: int) -> None:
        engine.reset()
        engine.prefill(embeds[:count])

    figures: dict[str, Any] = {
        "bundle": folder.name,
        "dtype": opened.manifest.dtype,
        "threads": threads,
        "repeat": repeat,
        "load_s": round(load_s, 3),
        "vision_s_per_tile": round(median(lambda: engine.encode(tile)), 3),
    }
    for count in PROMPTS:
        figures[f"prefill_{count}_tokens_per_s"] = round(count / median(lambda count=count: prefill(count)), 1)  # type: ignore[misc]
        step = median(lambda: [engine.decode(embeds[0]) for _ in range(DECODED)])
        figures[f"decode_tokens_per_s_at_{count}"] = round(DECODED / step, 2)
    return figures


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
