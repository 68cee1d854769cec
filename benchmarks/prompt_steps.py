"""What small steps at the end of a prompt cost, which later prompts can continue at.

    python benchmarks/prompt_steps.py BUNDLE...

Each prompt length is computed with one thread in steps of 256 tokens and a rest (the peer), and as the ONNX Runtime
engine does it, in steps of 256, then of 64, and a rest; in turn, seven times. Writes results/prompt-steps.json: the
median seconds of CPU time, and the median of the ratios of neighbors.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from record import write_results

from internvl_edge.bundle.bundle import Bundle
from internvl_edge.runtime.engines import onnxruntime

LENGTHS = (150, 300, 383, 511, 1000)
REPEATS = 7


def main() -> None:
    """Measure and write the results."""
    bundles = [Path(name) for name in sys.argv[1:]] or sys.exit(__doc__)
    rows = {bundle.name: measure(bundle) for bundle in bundles}
    print(write_results("prompt-steps", {"threads": 1, "bundles": rows}).read_text(encoding="utf-8"))


def measure(bundle: Path) -> dict[str, Any]:
    opened = Bundle.open(bundle)
    engine = onnxruntime.OnnxRuntimeEngine(opened, capacity=max(LENGTHS), threads=1)
    width = opened.manifest.model.decoder.hidden_size
    embeds = np.random.default_rng(0).standard_normal((max(LENGTHS), width)).astype(np.float32) * 0.02
    ours = onnxruntime.PREFILL_SIZES
    rows = {}
    for length in LENGTHS:
        seconds: dict[tuple[int, ...], list[float]] = {ours[:1]: [], ours: []}
        for _ in range(REPEATS):
            for sizes, found in seconds.items():
                onnxruntime.PREFILL_SIZES = sizes
                engine.cache.reset()
                began = time.process_time()
                engine.prefill(embeds[:length])
                found.append(time.process_time() - began)
        large, small = seconds.values()
        ratio = median(b / a for a, b in zip(large, small, strict=True))
        rows[str(length)] = {
            "large_s": round(median(large), 4),
            "small_s": round(median(small), 4),
            "ratio": round(ratio, 3),
        }
    onnxruntime.PREFILL_SIZES = ours
    return rows


if __name__ == "__main__":
    main()
