"""Does an int8 KV cache pay on the CPU? Prompts and decoding beside a cache of floats, in turn, and the cache's memory.

    python benchmarks/settled/kv_cache_speed.py CHECKPOINT WORK

CHECKPOINT is a quantized one in real shapes; scales are made up, for speed does not depend on them. Bundles are made
in WORK and removed. Results: results/kv-cache-speed.json.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path

import _path  # noqa: F401
import click
import numpy as np
from record import write_results

from internvl_edge import export_bundle
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.checkpoint.kv_scales import KvScales
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

LENGTHS = (300, 2000, 4000)
TOKENS, ROUNDS, THREADS = 24, 5, 2


def with_scales(checkpoint: Path, folder: Path) -> Path:
    """The same checkpoint, linked, with scales of an int8 cache."""
    folder.mkdir(parents=True)
    for path in checkpoint.resolve().iterdir():
        os.symlink(path, folder / path.name)
    decoder = Checkpoint(checkpoint).config.decoder
    keys = np.full((decoder.num_hidden_layers, decoder.num_key_value_heads, decoder.head_dim // 2), 8, np.float32)
    KvScales.from_ranges(keys, np.repeat(keys, 2, axis=-1)).write(folder)
    return folder


def measure(engines: dict[str, OnnxRuntimeEngine], length: int, embeds: np.ndarray) -> dict[str, dict[str, float]]:
    """Tokens per second of each engine; rounds take turns."""
    prompts: dict[str, list[float]] = {name: [] for name in engines}
    answers: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            engine.cache.reset()
            started = time.perf_counter()
            engine.prefill(embeds[:length])
            prefilled = time.perf_counter()
            for row in embeds[:TOKENS]:
                engine.decode(row)
            prompts[name].append(length / (prefilled - started))
            answers[name].append(TOKENS / (time.perf_counter() - prefilled))
    return {
        name: {"prefill": round(statistics.median(prompts[name]), 1), "decode": round(statistics.median(rates), 1)}
        for name, rates in answers.items()
    }


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("work", type=click.Path(path_type=Path))
def main(checkpoint: Path, work: Path) -> None:
    """Measure and write the results."""
    try:
        sources = {"floats": checkpoint, "int8": with_scales(checkpoint, work / "checkpoint")}
        engines = {}
        for name, source in sources.items():
            bundle = export_bundle(source, work / name, "float16", dialects=["onnxruntime"])
            engines[name] = OnnxRuntimeEngine(Bundle.open(bundle), capacity=8192, threads=THREADS)
        width = Checkpoint(checkpoint).config.decoder.hidden_size
        embeds = np.random.default_rng(0).normal(0, 0.02, (max(LENGTHS), width)).astype(np.float32)
        results = {
            "checkpoint": checkpoint.name,
            "threads": THREADS,
            "rounds": ROUNDS,
            "cache_bytes_per_token": {
                name: sum(value.numpy().nbytes for value in engine._cache.values()) // engine.cache.capacity
                for name, engine in engines.items()
            },
            "tokens_per_s": {length: measure(engines, length, embeds) for length in LENGTHS},
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    click.echo(write_results("kv-cache-speed", results))
    click.echo(str(results))


if __name__ == "__main__":
    main()
