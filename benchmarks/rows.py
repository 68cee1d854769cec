"""Tokens per second of several rows together, and samples of one prompt, against one row and one call after the other.

    python benchmarks/rows.py BUNDLE [--threads 2] [--rounds 5]

An engine with eight rows and one with a single row run in turns in one process, so that a busy machine disturbs both.
"one row" is the peer: it decodes one token of one sequence in a step, and answers one question after the other. Writes
results/rows.json: medians of tokens per second in all for 1, 2, 4 and 8 rows after 300 and 2000 tokens, the cost of a
lone answer in an engine with several rows, and seconds for 8 samples of one prompt (32 tokens each, temperature 0.7,
top_p 0.9) as one call of `samples` and as 8 calls of `chat`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from record import write_results

from internvl_edge import InternVL
from internvl_edge.bundle.names import TOKENIZER
from internvl_edge.model.tokenizer import Tokenizer
from internvl_edge.runtime.engines import Engine

ROWS = (1, 2, 4, 8)
CONTEXTS = (300, 2000)
STEPS = 8
SAMPLES, SAMPLE_TOKENS = 8, 32
SENTENCE = "What is the total of this bill? "
QUESTION_TOKENS = 280  # the template adds some; the length of the prompt is in the results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    load = partial(InternVL.load, asked.bundle, engine="onnxruntime", context=2304, threads=asked.threads)
    with load(rows=max(ROWS)) as several, load() as single:
        hidden = single.config.decoder.hidden_size
        decoding = {each: decode(several.engine, single.engine, hidden, each, asked.rounds) for each in CONTEXTS}
        sampling = samples(several, single, asked.bundle, asked.rounds)
    values = {"bundle": asked.bundle.name, "threads": asked.threads, "rounds": asked.rounds, "steps": STEPS}
    print(write_results("rows", values | {"decoding": decoding, "samples": sampling}))


def decode(several: Engine, single: Engine, hidden: int, context: int, rounds: int) -> dict[str, Any]:
    """Return medians of tokens per second, and what they are against one row alone."""
    embeds = (np.random.default_rng(0).standard_normal((context, hidden)) * 0.05).astype(np.float32)
    for engine in (several, single):
        engine.cache.reset()
        engine.prefill(embeds)
    for row in range(1, max(ROWS)):
        several.copy(0, row, context)

    def steps(engine: Engine, count: int) -> None:
        for row in range(count):
            engine.cache.reset(context, row)
        for step in range(STEPS):
            engine.decode_rows(embeds[step : step + count], range(count))

    actions = {"one row": partial(steps, single, 1)} | {str(count): partial(steps, several, count) for count in ROWS}
    seconds = in_turns(actions, rounds)
    rates = {name: (1 if name == "one row" else int(name)) * STEPS / value for name, value in seconds.items()}
    return {
        "tokens_per_s": {name: round(rate, 2) for name, rate in rates.items()},
        "times_one_row": {name: round(rate / rates["one row"], 3) for name, rate in rates.items()},
        "step_of_a_lone_answer": round(seconds["1"] / seconds["one row"], 3),
    }


def samples(several: InternVL, single: InternVL, bundle: Path, rounds: int) -> dict[str, Any]:
    """Return median seconds for samples together and one after the other. Each round has a prompt of its own."""
    options: dict[str, Any] = {"max_new_tokens": SAMPLE_TOKENS, "temperature": 0.7, "top_p": 0.9}
    tokenizer = Tokenizer(bundle / TOKENIZER)
    question = SENTENCE
    while len(tokenizer.encode(question)) < QUESTION_TOKENS:
        question += SENTENCE
    rounds_done = iter(range(10_000))
    tokens: list[int] = []

    def together() -> None:
        replies = several.samples(f"{next(rounds_done)}. {question}", count=SAMPLES, **options)
        tokens.append(sum(len(reply.output_ids) for reply in replies))

    def calls() -> None:
        for _ in range(SAMPLES):
            single.chat(f"{next(rounds_done)}. {question}", **options)

    seconds = in_turns({"together": together, "calls": calls}, rounds)
    return {
        "prompt_tokens": len(single.chat(question, max_new_tokens=1).prompt_ids),
        "answer_tokens": statistics.median(tokens),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "calls_per_together": round(seconds["calls"] / seconds["together"], 3),
    }


def in_turns(actions: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each action, all run once for warming up and then in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
