"""Items per second of `batch` against a loop over `InternVL.chat` and against a batch of one row, in one run.

    python benchmarks/batch.py BUNDLE [--threads 2] [--rounds 3] [--items 16] [--tokens 100] [--questions 4 1]

Every item is a PNG of noise with one tile and an answer of exactly `--tokens` tokens; with `--questions 4`, four rows
of the table ask about each picture. Each way answers new pictures in each round, and the ways take turns, so a busy
machine disturbs all of them.

    loop           `InternVL.chat` for one row after the other, on a model with one row; nothing is written
    one row        `batch` on that model: images are read ahead, and rows go into a journal
    batch          `batch` on a model of 8 rows with `prompts_first`: what the command does
    interleaved    with `--interleaved`: the same without `prompts_first`, so decode goes on between steps of prompts

Writes results/batch-NAME.json, NAME being the bundle's: medians of wall and CPU seconds per item, both against the
loop, and the anatomy of an item: seconds of reading, of the tower, of the prompt, and of everything else, which is
mostly decode. On a machine with other jobs, CPU time with one thread is the figure to trust: threads that wait for each
other spin.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import write_results

from internvl_edge import InternVL
from internvl_edge.batch.inputs import read_items
from internvl_edge.batch.items import Ask, Item
from internvl_edge.batch.journal import open_journal, rows_of
from internvl_edge.batch.run import run

ROWS = 8
SIDE = 448
QUESTION = "What is in this picture? Describe it in detail, part {}."
Way = Callable[[list[Item], Path], list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=16, help="items of one round of the ways with 8 rows")
    parser.add_argument("--few", type=int, default=4, help="items of one round of the ways with one row")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--questions", type=int, nargs="+", default=[4, 1], help="rows of the table for each picture")
    parser.add_argument("--interleaved", action="store_true", help="measure a fourth way")
    asked = parser.parse_args()
    if any(number % each for number in (asked.items, asked.few) for each in asked.questions):
        parser.error("--items and --few must be multiples of --questions, or the ways share pictures differently")
    load = partial(InternVL.load, asked.bundle, engine="onnxruntime", context=2048, threads=asked.threads)
    values = {"bundle": asked.bundle.name, "threads": asked.threads, "rounds": asked.rounds, "rows": ROWS}
    values |= {"tokens": asked.tokens, "items_with_one_row": asked.few, "items": asked.items}
    name = f"batch-{asked.bundle.name}"
    with ExitStack() as stack:
        single, first = stack.enter_context(load()), stack.enter_context(load(rows=ROWS, prompts_first=True))
        ways: dict[str, tuple[Way, int]] = {
            "loop": (partial(loop, single), asked.few),
            "one row": (partial(batch, single), asked.few),
            "batch": (partial(batch, first), asked.items),
        }
        if asked.interleaved:
            ways["interleaved"] = partial(batch, stack.enter_context(load(rows=ROWS))), asked.items
        found: dict[str, Any] = {}
        for each in asked.questions:
            found[str(each)] = measured(ways, each, asked)
            path = write_results(name, values | {"questions_per_image": found})
    print(path)


def measured(ways: dict[str, tuple[Way, int]], questions: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Return medians of each way, and what they are against the loop."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number, (name, (way, count)) in itertools.product(range(asked.rounds), ways.items()):
        with tempfile.TemporaryDirectory() as folder:
            items = pictures(Path(folder), count, questions, asked.tokens, seed=number)
            wall, cpu = time.perf_counter(), time.process_time()
            rows = way(items, Path(folder) / "out.jsonl")
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert [row["output_tokens"] for row in rows] == [asked.tokens] * count, rows
        seconds[name].append({"wall_s": wall / count, "cpu_s": cpu / count, **anatomy(rows, wall)})
        print(questions, number, name, {key: round(value, 2) for key, value in seconds[name][-1].items()}, flush=True)
    medians = {
        name: {key: round(statistics.median(one[key] for one in each), 4) for key in each[0]}
        for name, each in seconds.items()
    }
    return {
        "seconds_per_item": medians,
        "items_per_s": {name: round(1 / each["wall_s"], 4) for name, each in medians.items()},
        "times_the_loop": {
            kind: {name: round(medians["loop"][kind] / each[kind], 3) for name, each in medians.items()}
            for kind in ("wall_s", "cpu_s")
        },
    }


def loop(model: InternVL, items: list[Item], out: Path) -> list[dict[str, Any]]:
    replies = [model.chat(item.ask.prompt or "", list(item.images), **item.ask.options) for item in items]
    return [{"output_tokens": len(reply.output_ids), "timings": reply.timings} for reply in replies]


class _Lent:
    """A model that a run must not close."""

    def __init__(self, model: InternVL) -> None:
        self._model = model

    def __enter__(self) -> InternVL:
        return self._model

    def __exit__(self, *ignored: object) -> None:
        pass


def batch(model: InternVL, items: list[Item], out: Path) -> list[dict[str, Any]]:
    with open_journal(out, {}) as journal:
        run(lambda: _Lent(model), items, journal)
    return [row for _, row in rows_of(out)]


def pictures(folder: Path, count: int, questions: int, tokens: int, seed: int) -> list[Item]:
    """Write pictures and a table, and return its items. No stop token may end an answer early."""
    random = np.random.default_rng([seed, time.time_ns()])
    rows = []
    for number in range(count):
        name = f"{number // questions}.png"
        if number % questions == 0:
            Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / name)
        rows.append({"id": str(number), "images": name, "prompt": QUESTION.format(number % questions + 1)})
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask = Ask(options={"max_new_tokens": tokens, "max_tiles": 1})
    return read_items(folder / "in.jsonl", ask).items


def anatomy(rows: list[dict[str, Any]], wall: float) -> dict[str, float]:
    """Return seconds per item by what they were for. Reading goes on beside the rest and is not part of the sum."""
    sums = {name: sum(row["timings"][name] for row in rows) for name in ("preprocess_s", "vision_s", "prefill_s")}
    sums["rest_s"] = wall - sums["vision_s"] - sums["prefill_s"]
    return {name: value / len(rows) for name, value in sums.items()}


if __name__ == "__main__":
    main()
