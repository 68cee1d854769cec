"""What choosing a token costs, for each set of options, and how much slower decoding with top_p is than greedy.

    python benchmarks/choosing.py [--bundle BUNDLE]

Choosing: microseconds of CPU time of one thread for a token (median, tenth percentile), beside sorting the whole
vocabulary in float64 as version 0.1 did. Three kinds of logits over 151,674 tokens: "model" has few probable tokens,
"broad" has many, as with a high temperature, "equal" has no difference between tokens. The limit is 1000 microseconds.

Decoding (with BUNDLE, such as a random 1B in int4: `random_checkpoint.py 1B`, `quantize --scheme w4a16-rtn --symmetric
--lm-head int8`, `export --dialect onnxruntime`): tokens per second of CPU time at temperature 0.7 and top_p 0.9, as a
share of the greedy speed. The limit is 0.95. Both decode as many tokens in turn. "narrow" are the same steps with
logits scaled to the standard deviation of a trained model.

Writes results/choosing.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from record import write_results

from internvl_edge.bundle.bundle import Bundle
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from internvl_edge.runtime.logprobs import LogprobRecorder
from internvl_edge.runtime.sampling import Chooser, Sampler, Sampling

VOCAB = 151_674
LIMIT_US, LIMIT_SHARE = 1000, 0.95
ANSWERED = 200
EVERYTHING: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.05,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.2,
    "logit_bias": {token * 500: 1.0 for token in range(300)},
}
SETS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, repetition_penalty": {"repetition_penalty": 1.1},
    "greedy, frequency_penalty, logit_bias": {"frequency_penalty": 0.5, "logit_bias": EVERYTHING["logit_bias"]},
    "temperature": {"temperature": 0.7},
    "temperature 10": {"temperature": 10.0},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_p 0.5": {"temperature": 0.7, "top_p": 0.5},
    "top_p 0.2": {"temperature": 0.7, "top_p": 0.2},
    "top_k 50": {"temperature": 0.7, "top_k": 50},
    "top_k 50,000, top_p": {"temperature": 0.7, "top_k": 50_000, "top_p": 0.9},
    "min_p": {"temperature": 0.7, "min_p": 0.05},
    "top_k 50, top_p, min_p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "all but top_k": EVERYTHING,
    "all, top_k 50,000": EVERYTHING | {"top_k": 50_000},
    "all, top_k 50,000, top_p 0.2": EVERYTHING | {"top_k": 50_000, "top_p": 0.2},
}
LOGPROBS = {"greedy, logprobs, top_logprobs 20": {}, "top_p, logprobs, top_logprobs 20": SETS["top_p"]}


def logits_of(kind: str) -> np.ndarray:
    random = np.random.default_rng(0)
    if kind == "equal":
        return np.full(VOCAB, 1.5, np.float32)
    logits = (random.standard_normal(VOCAB) * (2.0 if kind == "model" else 0.5)).astype(np.float32)
    if kind == "model":
        logits[random.integers(0, VOCAB, 40)] += np.linspace(4, 14, 40, dtype=np.float32)
    return logits


class Sorting:
    """The plain way: sort everything, in float64, and draw from the sums."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: np.ndarray) -> int:
        options = self._sampling
        if options.temperature == 0:
            return int(logits.argmax())
        kept = min(options.top_k or len(logits), len(logits))
        tokens = np.argpartition(-logits, kept - 1)[:kept]
        tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
        probabilities = np.exp((logits[tokens].astype(np.float64) - float(logits[tokens[0]])) / options.temperature)
        probabilities /= probabilities.sum()
        count = int(np.searchsorted(np.cumsum(probabilities) - probabilities, options.top_p, side="left"))
        probabilities = probabilities[: max(1, count)]
        probabilities = probabilities[probabilities >= options.min_p * probabilities[0]]
        return int(self._random.choice(tokens[: len(probabilities)], p=probabilities / probabilities.sum()))


def microseconds(action: Callable[[], object], repeat: int) -> tuple[float, float]:
    """The median of CPU time of this thread, and its tenth percentile, which other programs disturb less."""
    action()
    times = []
    for _ in range(repeat):
        began = time.thread_time()
        action()
        times.append(time.thread_time() - began)
    return round(float(np.median(times)) * 1e6, 1), round(float(np.percentile(times, 10)) * 1e6, 1)


def choosers(options: dict[str, Any]) -> Sampler:
    sampler = Sampler(Sampling(seed=0, **options))
    for token in np.random.default_rng(1).integers(0, VOCAB, ANSWERED):
        sampler.accept(int(token))
    return sampler


def choosing(repeat: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind in ("model", "broad", "equal"):
        logits = logits_of(kind)
        for name, options in (SETS | LOGPROBS).items():
            sampler: Chooser = choosers(options)
            if name in LOGPROBS:
                sampler = LogprobRecorder(sampler, 20)
            median, least = microseconds(lambda: sampler.choose(logits), repeat)  # noqa: B023  # called at once
            row = {"us": median, "least_us": least}
            if name not in LOGPROBS:
                plain = Sorting(Sampling(seed=0, **options))
                row["sorting_us"] = microseconds(lambda: plain.choose(logits), max(3, repeat // 10))[0]  # noqa: B023
                row["ratio"] = round(row["sorting_us"] / row["us"], 1)
            rows[f"{kind}: {name}"] = row
            print(f"{kind}: {name}", row)
    return rows


def decoding(folder: Path, tokens: int, repeat: int) -> dict[str, Any]:
    """CPU time of greedy steps and of the same steps with sampling, one pair after the other."""
    opened = Bundle.open(folder)
    table, vocab = opened.embeddings(), opened.manifest.model.decoder.vocab_size
    engine = OnnxRuntimeEngine(opened, capacity=1024, threads=1)
    random = np.random.default_rng(0)
    prompt = table[random.integers(0, vocab, 300)]
    engine.prefill(prompt)
    scale = np.float32(2.0 / engine.decode(table[0]).std())
    found: dict[str, Any] = {"bundle": folder.name, "vocab": vocab}
    found["layers"] = opened.manifest.model.decoder.num_hidden_layers
    for name, factor in (("random model", np.float32(1)), ("narrow", scale)):
        shares = []
        for _ in range(repeat):
            seconds = {"greedy": 0.0, "top_p": 0.0}
            for choice, options in (("greedy", SETS["greedy"]), ("top_p", SETS["top_p"])):
                sampler = Sampler(Sampling(seed=0, **options))
                engine.cache.reset(300)
                for token in random.integers(0, vocab, tokens):
                    began = time.thread_time()
                    logits = engine.decode(table[token])
                    seconds[choice] += time.thread_time() - began
                    logits = logits * factor
                    began = time.thread_time()
                    sampler.choose(logits)
                    seconds[choice] += time.thread_time() - began
            shares.append(seconds["greedy"] / seconds["top_p"])
        found[name] = {
            "share_of_greedy_speed": round(float(np.median(shares)), 3),
            "shares": [round(share, 3) for share in shares],
            "greedy_ms_per_token": round(seconds["greedy"] / tokens * 1e3, 2),
        }
        print(name, found[name])
    return found | {"limit": LIMIT_SHARE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--repeat", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    values: dict[str, Any] = {"vocab": VOCAB, "limit_us": LIMIT_US, "choosing": choosing(options.repeat)}
    if options.bundle:
        values["decoding"] = decoding(options.bundle, options.tokens, max(3, options.repeat // 12))
    write_results("choosing", values)


if __name__ == "__main__":
    main()
