"""Prompts, tokens and tiles of one bundle with the native attention operators and without them, in turn.

    python benchmarks/native_attention.py BUNDLE [--threads 2] [--repeat 4]          -> results/native-attention.json

BUNDLE has quantized linears in decoder and tower; random weights of a published size will do (`peers/cpu_bundles.sh`).
Each kind runs in a process of its own, and while one computes the other one waits for its next line. One round warms
up. A row is the median of the rounds, with all of them beside it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from record import write_results

KINDS = {"onnxruntime": "0", "native": "1"}
SWITCH = "INTERNVL_EDGE_NATIVE"
LENGTHS, PROMPTS = (300, 2000, 8000), (300, 1800)
TOKENS = 16  # of a decode row
# The rounds in which 7 tiles are encoded, which takes longer than all other rows together.
IMAGE_ROUNDS = 2
ROWS = (*(f"decode {each}" for each in LENGTHS), *(f"prefill {each}" for each in PROMPTS), "tiles 1", "tiles 7")


def work(folder: Path, threads: int) -> None:
    """Load a bundle, say what computes its attention, and then answer each row's name with its seconds."""
    from internvl_edge.bundle.bundle import Bundle
    from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

    bundle = Bundle.open(folder)
    engine = OnnxRuntimeEngine(bundle, capacity=max(LENGTHS) + TOKENS, threads=threads)
    random = np.random.default_rng(0)
    width, size = bundle.manifest.model.decoder.hidden_size, bundle.manifest.model.vision.image_size
    embeds = random.standard_normal((max(PROMPTS), width), dtype=np.float32) * 0.05
    pixels = random.integers(0, 256, (7, size, size, 3), dtype=np.uint8)
    for array in engine._buffers.arrays.values():  # pages that nothing has touched would all be one page of zeros
        array[:] = random.standard_normal(array.shape[1:], dtype=np.float32)

    def decode(length: int) -> None:
        engine.cache._lengths[0] = length
        for embed in embeds[:TOKENS]:
            engine.decode(embed)

    def prefill(length: int) -> None:
        engine.cache.reset()
        engine.prefill(embeds[:length])

    actions: dict[str, Callable[[int], Any]] = {
        "decode": decode,
        "prefill": prefill,
        "tiles": lambda tiles: engine.encode(pixels[:tiles]),
    }
    print(engine.attention, flush=True)
    for line in sys.stdin:
        name, count = line.split()
        started = time.perf_counter()
        actions[name](int(count))
        print((time.perf_counter() - started) / (TOKENS if name == "decode" else 1), flush=True)


class Worker:
    """The process of one kind."""

    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        command = [sys.executable, __file__, str(folder), "--threads", str(threads), "--worker"]
        environment = os.environ | {SWITCH: KINDS[kind]}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def answer(self, line: str = "") -> str:
        """Send a line, if there is one, and return the line that comes back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if line:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        if not (said := self._process.stdout.readline()):
            raise SystemExit(f"a worker ended: status {self._process.wait()}")
        return said.strip()

    def close(self) -> None:
        self._process.communicate()


def measure(workers: dict[str, Worker], repeat: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each row and kind; one round before the others warms up."""
    found: dict[str, dict[str, list[float]]] = {row: {kind: [] for kind in KINDS} for row in ROWS}
    for turn in range(repeat + 1):
        rows = [row for row in ROWS if row != "tiles 7" or 1 <= turn <= IMAGE_ROUNDS]
        for row in rows:
            for kind in KINDS if turn % 2 else reversed(KINDS):
                seconds = float(workers[kind].answer(row))
                if turn:
                    found[row][kind].append(seconds)
    return found


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--repeat", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--worker", is_flag=True, hidden=True)
def main(folder: Path, threads: int, repeat: int, worker: bool) -> None:
    """Measure and write the results."""
    if worker:
        work(folder, threads)
        return
    workers = {kind: Worker(kind, folder, threads) for kind in KINDS}
    attention = {kind: each.answer() for kind, each in workers.items()}
    found = measure(workers, repeat)
    for each in workers.values():
        each.close()
    rows = {}
    for row, times in found.items():
        medians = {kind: statistics.median(seconds) for kind, seconds in times.items()}
        rows[row] = {"seconds": times, "median_s": medians, "ratio": medians["onnxruntime"] / medians["native"]}
        print(f"{row:14} {medians['onnxruntime']:8.4f} s -> {medians['native']:8.4f} s   {rows[row]['ratio']:.2f}x")
    write_results("native-attention", {"attention": attention, "threads": threads, "bundle": folder.name, "rows": rows})


if __name__ == "__main__":
    main()
