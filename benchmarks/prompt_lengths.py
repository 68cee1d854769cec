"""How the memory of a process grows with prompts of ever new lengths, on each CPU engine.

    python benchmarks/prompt_lengths.py BUNDLE

Every engine gets the same 700 lengths in a process of its own, each prompt once. "openvino, any length" is OpenVINO
with a prompt's own length in place of a few sizes. Writes results/prompt-lengths.json: RSS in MB after so many prompts,
and seconds for all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from record import write_results

from internvl_edge.bundle.bundle import Bundle
from internvl_edge.runtime.engines import openvino
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

MARKS = (10, 100, 200, 300, 400, 500, 600, 700)
LONGEST = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows = {}
    for name in ("onnxruntime", "openvino", "openvino, any length"):
        rows[name] = in_own_process(name, options.bundle, options.threads)
        print(name, json.dumps(rows[name]))
    write_results("prompt-lengths", {"bundle": options.bundle.name, "longest": LONGEST, "engines": rows})


def in_own_process(name: str, bundle: Path, threads: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=measure, args=(there, name, bundle, threads))
    process.start()
    row: dict[str, Any] = here.recv()
    process.join()
    return row


def measure(results: Connection, name: str, bundle: Path, threads: int) -> None:
    if name == "openvino, any length":
        openvino.OpenVinoEngine.steps = lambda self, length: [length]  # type: ignore[method-assign]
    opened = Bundle.open(bundle)
    make = OnnxRuntimeEngine if name == "onnxruntime" else openvino.OpenVinoEngine
    engine = make(opened, capacity=LONGEST, threads=threads)
    generator = np.random.default_rng(0)
    embeds = generator.standard_normal((LONGEST, opened.manifest.model.decoder.hidden_size)).astype(np.float32) * 0.02
    lengths = generator.permutation(np.arange(64, LONGEST))[: MARKS[-1]]
    memory, began = {}, time.perf_counter()
    for count, length in enumerate(lengths, start=1):
        engine.cache.reset(0)
        engine.prefill(embeds[:length])
        if count in MARKS:
            memory[str(count)] = round(resident_mb(), 1)
    results.send({"rss_mb": memory, "seconds": round(time.perf_counter() - began, 1)})


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 1e6


if __name__ == "__main__":
    main()
