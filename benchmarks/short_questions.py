"""How long does a short question wait for its first token while questions about large images are computed?

    python benchmarks/short_questions.py BUNDLE [--rounds 3] [--shorts 40] [--threads 1] [--tiles 12]

A model with four rows gets questions about pictures of noise with many tiles from one client and questions about
pictures with one tile from two, each as soon as the last one is answered. `in order` computes prompts in the order of
their arrival, `shorter first` lets a short prompt go ahead between the tiles of a long one, as the scheduler does. Both
ways take turns, on one model. Writes results/short-questions.json: seconds until the first token, median and 95th
percentile, of short and of long questions.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import write_results

from internvl_edge import InternVL

ROWS, CLIENTS, TOKENS = 4, 2, 8
WAYS = {"in order": lambda scheduler: scheduler._prompts[0], "shorter first": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shorts", type=int, default=40, help="short questions of each client in a round")
    parser.add_argument("--tiles", type=int, default=12, help="tiles of a large picture, without its thumbnail")
    asked = parser.parse_args()
    seconds: dict[str, dict[str, list[float]]] = {name: {"short": [], "long": []} for name in WAYS}
    with InternVL.load(asked.bundle, engine="onnxruntime", rows=ROWS, threads=asked.threads, context=8192) as model:
        scheduler: Any = model._scheduler
        own = scheduler._next_prompt
        for number in range(asked.rounds):
            for name, way in WAYS.items():
                scheduler._next_prompt = own if way is None else lambda way=way: way(scheduler)
                for kind, found in measured(model, asked.shorts, asked.tiles).items():
                    seconds[name][kind] += found
                print(number, name, {kind: summary(each) for kind, each in seconds[name].items()}, flush=True)
    found = {name: {kind: summary(each) for kind, each in kinds.items()} for name, kinds in seconds.items()}
    values = {"bundle": asked.bundle.name, "threads": asked.threads, "rows": ROWS, "tiles_of_long": asked.tiles + 1}
    print(write_results("short-questions", values | {"rounds": asked.rounds, "first_token_s": found}))


def summary(seconds: list[float]) -> dict[str, float]:
    return {
        "questions": len(seconds),
        "median": round(statistics.median(seconds), 4),
        "p95": round(float(np.quantile(seconds, 0.95)), 4),
    }


def measured(model: InternVL, shorts: int, tiles: int) -> dict[str, list[float]]:
    """Return the seconds until the first token of each question."""
    side = model.config.vision.image_size
    found: dict[str, list[float]] = {"short": [], "long": []}
    ended = threading.Event()

    def ask(kind: str, width: int, limit: int, more: Callable[[], bool]) -> None:
        random = np.random.default_rng()
        while more():
            picture = Image.fromarray(random.integers(0, 256, (side, width, 3), np.uint8))
            began = time.perf_counter()
            stream = model.stream("What is this?", [picture], max_tiles=limit, max_new_tokens=TOKENS)
            next(iter(stream), None)
            found[kind].append(time.perf_counter() - began)
            assert sum(stream.reply.tiles) == (1 if limit == 1 else limit + 1)

    def ask_short() -> None:
        left = iter(range(shorts))
        ask("short", side, 1, lambda: next(left, None) is not None)

    clients = [threading.Thread(target=ask_short) for _ in range(CLIENTS)]
    long = threading.Thread(target=ask, args=("long", side * tiles, tiles, lambda: not ended.is_set()))
    for thread in (long, *clients):
        thread.start()
    for thread in clients:
        thread.join()
    ended.set()
    long.join()
    return found


if __name__ == "__main__":
    main()
