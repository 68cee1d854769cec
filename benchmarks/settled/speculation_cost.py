"""When guessing tokens pays: speculation_cost.py BUNDLE -> results/speculation-cost-NAME.json.

A step that verifies k guesses computes k + 1 tokens. What it takes, over what one token takes, says how many of the
guesses must come true: with a ratio r, fewer than (r - 1) / k of them cost time. Random embeddings; in turn.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import _path  # noqa: F401
import numpy as np
from record import write_results

from internvl_edge import InternVL

CONTEXTS = (300, 2000)
GUESSES = (1, 2, 4, 6)
THREADS, REPEAT = 2, 15


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    bundle = Path(sys.argv[1])
    rows = []
    with InternVL.load(bundle, engine="onnxruntime", threads=THREADS, context=4096) as model:
        engine = model.engine
        width = model.config.decoder.hidden_size
        embeds = np.random.default_rng(0).standard_normal((max(CONTEXTS), width)).astype(np.float32) * 0.05
        for context in CONTEXTS:
            engine.cache.reset()
            engine.prefill(embeds[:context])
            times: dict[int, list[float]] = {count: [] for count in (0, *GUESSES)}
            for _ in range(REPEAT):
                for count, found in times.items():
                    engine.cache.reset(context)
                    started = time.perf_counter()
                    if count:
                        engine.score(embeds[: count + 1])
                    else:
                        engine.decode(embeds[0])
                    found.append(time.perf_counter() - started)
            one = statistics.median(times.pop(0))
            for count, found in times.items():
                step = statistics.median(found)
                row = {"context": context, "guesses": count, "token_ms": 1e3 * one, "step_ms": 1e3 * step}
                rows.append(row | {"share_that_must_come_true": (step / one - 1) / count})
    print(write_results(f"speculation-cost-{bundle.name}", {"threads": THREADS, "rows": rows}).read_text())


if __name__ == "__main__":
    main()
