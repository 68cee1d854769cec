"""What does it gain to compute waiting prompts before answers under way go on (`InternVL.load(prompts_first=True)`)?

    python benchmarks/settled/prompts_first.py [--rounds 3] [--items 24]

The demo model with eight rows and one thread answers items about pictures of noise, each with 100 tokens, with one tile
and with seven. Both ways take turns. Writes results/prompts-first.json: medians of CPU seconds per item, and how many
rows a decode step served.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import numpy as np
from PIL import Image
from record import write_results

from internvl_edge import InternVL, export_bundle
from internvl_edge.batch.items import Ask, Item
from internvl_edge.batch.run import answers
from internvl_edge.demo import CHECKPOINT

ROWS, TOKENS, TILE = 8, 100, 112
RANDOM = np.random.default_rng(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=24)
    asked = parser.parse_args()
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bundle = export_bundle(CHECKPOINT, Path(folder) / "bundle")
        models = {
            name: stack.enter_context(
                InternVL.load(bundle, engine="onnxruntime", rows=ROWS, threads=1, context=2048, prompts_first=first)
            )
            for name, first in (("interleaved", False), ("prompts first", True))
        }
        for tiles in (1, 6):  # and a thumbnail beside several
            for _ in range(asked.rounds):
                for name, model in models.items():
                    results = found.setdefault(f"max_tiles {tiles}", {}).setdefault(name, [])
                    results.append(measured(model, pictures(asked.items, tiles, model)))
                    print(tiles, name, results[-1], flush=True)
    medians = {
        tiles: {
            name: {
                "cpu_s_per_item": round(statistics.median(cpu for cpu, _ in each), 4),
                "rows_per_decode_step": round(statistics.median(rows for _, rows in each), 2),
            }
            for name, each in ways.items()
        }
        for tiles, ways in found.items()
    }
    print(write_results("prompts-first", {"rows": ROWS, "items": asked.items, "tokens": TOKENS, "tiles": medians}))


def measured(model: InternVL, items: list[Item]) -> tuple[float, float]:
    """Return CPU seconds per item, and rows per decode step."""
    engine = model.engine
    decode_rows, served = engine.decode_rows, []

    def counted(embeds: np.ndarray, rows: Sequence[int]) -> Any:
        served.append(len(rows))
        return decode_rows(embeds, rows)

    engine.decode_rows = counted  # type: ignore[method-assign]
    try:
        started = time.process_time()
        rows = [row for _, row in answers(model, items)]
        cpu = time.process_time() - started
    finally:
        engine.decode_rows = decode_rows  # type: ignore[method-assign]
    assert [row.output_tokens for row in rows] == [TOKENS] * len(items), rows
    return cpu / len(items), sum(served) / len(served)


def pictures(count: int, tiles: int, model: InternVL) -> list[Item]:
    """Return items whose answers no stop token ends."""
    stop = dict.fromkeys(model.answer_ids("")[-1:], -100.0)
    options = {"max_tiles": tiles, "max_new_tokens": TOKENS, "logit_bias": stop}
    noise = RANDOM.integers(0, 256, (count, 2 * TILE, 3 * TILE, 3), np.uint8)
    return [
        Item(str(number), "", Ask(f"Describe part {number}", options=options), (Image.fromarray(each),), (str(number),))
        for number, each in enumerate(noise)
    ]


if __name__ == "__main__":
    main()
