"""Whether a process that answers for a long time stays right and small, on each CPU engine.

    python benchmarks/soak.py WORK [--minutes 15] [--engine onnxruntime --engine openvino]

Each engine gets a process of its own and one thread. It answers random requests without a pause: questions whose
answers are known (those that a model gives that has answered nothing else), prompts of ever new lengths up to the whole
context, pictures that were never seen, streams that are dropped half read, sampled answers, answers with guesses, and
requests that must be refused. Then eight threads ask 50 questions each of one model.

The cache of image tokens is bounded by 8 MB here, which the warm-up fills; by default its bound is 256 MB. WORK keeps
the bundle. Results: results/soak.json, for each engine the requests by kind, the wrong answers, and every 30 seconds
the resident memory in MB, file descriptors and threads. "growth_mb" is the difference between the means of the last
minute and of the minute after the warm-up, which ends after a fifth of the time.
"""

from __future__ import annotations

import gc
import io
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from record import write_results

from internvl_edge import InternVL, export_bundle
from internvl_edge.base.errors import EdgeError
from internvl_edge.demo import CHECKPOINT, demo_questions
from internvl_edge.runtime.image_cache import ImageCache

ENGINES = ("onnxruntime", "openvino")
CONTEXT = 2048
IMAGE_CACHE = 8_000_000
KNOWN = 80
THREADS, PER_THREAD = 8, 50


@dataclass(frozen=True)
class Known:
    """A request and its right tokens."""

    question: str
    image: Path | None
    options: dict[str, Any]
    ids: list[int]


class Soak:
    """One model, and what happened to it."""

    def __init__(self, bundle: Path, engine: str) -> None:
        self._model = InternVL.load(bundle, engine=engine, context=CONTEXT, threads=1)
        self._forget()
        self._random = random.Random(0)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._known = [self._learn() for _ in range(KNOWN)]
        ways = {
            self._ask_known: 10,
            self._ask_new_length: 4,
            self._ask_new_picture: 2,
            self._drop_stream: 3,
            self._sample: 2,
            self._guess: 1,
            self._be_refused: 4,
        }
        self._ways, self._weights = list(ways), list(ways.values())

    def step(self) -> None:
        """Make one random request."""
        way = self._random.choices(self._ways, self._weights)[0]
        way()
        self.counts[way.__name__.strip("_")] += 1

    def threads(self) -> dict[str, int]:
        """Let several threads ask the model known questions and wrong ones."""
        orders = [random.Random(number) for number in range(THREADS)]

        def ask(order: random.Random) -> Counter[str]:
            found: Counter[str] = Counter()
            for _ in range(PER_THREAD):
                known = order.choice(self._known)
                if order.random() < 0.1:
                    try:
                        self._model.chat("x", b"no image")
                        found["wrong"] += 1
                    except EdgeError:
                        found["refused"] += 1
                    continue
                reply = self._model.chat(known.question, known.image, **known.options)
                found["right" if reply.output_ids == known.ids else "wrong"] += 1
            return found

        with ThreadPoolExecutor(THREADS) as pool:
            total = sum(pool.map(ask, orders), Counter())
        return {name: total[name] for name in ("right", "refused", "wrong")}

    def _forget(self) -> None:
        """Leave nothing of earlier requests but what the libraries keep."""
        self._model._images = ImageCache(self._model.engine, IMAGE_CACHE)  # asking for the engine forgets the rows

    def _learn(self) -> Known:
        asked = self._random.choice(demo_questions())
        image = asked.image if self._random.random() < 0.7 else None
        question = asked.question if self._random.random() < 0.5 else self._text(1, 300)
        options = {"max_tiles": self._random.randint(1, 6), "max_new_tokens": self._random.randint(2, 16)}
        self._forget()
        return Known(question, image, options, self._model.chat(question, image, **options).output_ids)

    def _ask_known(self) -> None:
        known = self._random.choice(self._known)
        ids = self._model.chat(known.question, known.image, **known.options).output_ids
        if ids != known.ids:
            self.wrong.append(f"{known.question[:60]!r}: {ids}, expected {known.ids}")

    def _ask_new_length(self) -> None:
        image = self._random.choice([None, self._random.choice(demo_questions()).image])
        self._model.chat(self._text(1, 1600), image, max_new_tokens=self._random.randint(1, 12))

    def _ask_new_picture(self) -> None:
        size = (self._random.randint(40, 400), self._random.randint(40, 400), 3)
        pixels = np.frombuffer(self._random.randbytes(int(np.prod(size))), np.uint8).reshape(size)
        self._model.chat("What is it?", Image.fromarray(pixels), max_new_tokens=6)

    def _drop_stream(self) -> None:
        stream = self._model.stream(self._text(1, 120), max_new_tokens=20)
        for _ in range(self._random.randint(0, 4)):
            next(stream, None)

    def _sample(self) -> None:
        self._model.chat(
            self._text(1, 60), temperature=1.0, top_p=0.9, seed=self._random.randint(0, 99), max_new_tokens=9
        )

    def _guess(self) -> None:
        self._model.chat(self._text(3, 40) * 2, speculate=True, max_new_tokens=20)

    def _be_refused(self) -> None:
        asked = demo_questions()[0]
        damaged = asked.image.read_bytes()[: self._random.randint(1, 3000)]
        wrong: list[tuple[str, Any, dict[str, Any]]] = [
            ("x " * 2 * CONTEXT, None, {}),
            ("What?", damaged, {}),
            ("What?", io.BytesIO(b"no image"), {}),
            ("<image> and <image>", asked.image, {}),
            ("What?", None, {"temperature": -1.0}),
            ("What?", None, {"max_tokens": 3}),
            ("\ud800", None, {}),
        ]
        question, image, options = self._random.choice(wrong)
        try:
            self._model.chat(question, image, **options)
        except EdgeError:
            return
        self.wrong.append(f"not refused: {question[:30]!r}, {options}")

    def _text(self, least: int, most: int) -> str:
        return "a" + "".join(self._random.choices("abcdefghij 0123456789.", k=self._random.randint(least, most)))


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--minutes", default=15.0, show_default=True, help="For each engine.")
@click.option("--engine", "engines", multiple=True, type=click.Choice(ENGINES), default=ENGINES, show_default=True)
def main(work: Path, minutes: float, engines: tuple[str, ...]) -> None:
    """Measure and write `results/soak.json`; engines that are not measured again stay in it."""
    work.mkdir(parents=True, exist_ok=True)
    bundle = work / "float16"
    if not bundle.exists():
        export_bundle(CHECKPOINT, bundle, "float16")
    kept = work / "soak.json"
    rows: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for engine in engines:
        rows[engine] = in_own_process(bundle, engine, minutes)
        kept.write_text(json.dumps(rows), encoding="utf-8")
        print(
            engine, json.dumps({name: value for name, value in rows[engine].items() if name != "samples"}), flush=True
        )
    write_results("soak", {"context": CONTEXT, "image_cache_bytes": IMAGE_CACHE, "engines": rows})


def in_own_process(bundle: Path, engine: str, minutes: float) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=soak, args=(there, bundle, engine, minutes))
    process.start()
    there.close()
    row: dict[str, Any] = here.recv()
    process.join()
    return row


def soak(results: Connection, bundle: Path, engine: str, minutes: float) -> None:
    run, began = Soak(bundle, engine), time.monotonic()
    samples: list[dict[str, float]] = []
    while (now := time.monotonic() - began) < 60 * minutes:
        if not samples or now >= samples[-1]["seconds"] + min(30, 2 * minutes):
            samples.append({"seconds": round(now, 1), "requests": run.counts.total(), **resources()})
        run.step()
    samples.append({"seconds": round(now, 1), "requests": run.counts.total(), **resources()})
    warm, minute = 60 * minutes / 5, min(60.0, 4 * minutes)
    first = [one["rss_mb"] for one in samples if warm <= one["seconds"] <= warm + minute]
    last = [one["rss_mb"] for one in samples if one["seconds"] >= now - minute]
    results.send(
        {
            "minutes": minutes,
            "requests": dict(run.counts),
            "wrong": len(run.wrong),
            "wrong_answers": run.wrong[:20],
            "growth_mb": round(float(np.mean(last) - np.mean(first)), 1),
            "descriptors": [samples[0]["descriptors"], samples[-1]["descriptors"]],
            "threads": [samples[0]["threads"], samples[-1]["threads"]],
            "eight_threads": run.threads(),
            "samples": samples,
        }
    )


def resources() -> dict[str, float]:
    """Resident memory in MB, open file descriptors and threads of this process, after a garbage collection."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    rss = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    counts = {"descriptors": "fd", "threads": "task"}
    return {"rss_mb": round(rss, 1)} | {name: len(os.listdir(f"/proc/self/{kind}")) for name, kind in counts.items()}


if __name__ == "__main__":
    main()
