"""CPU seconds of the int8 graph for prompts in ONNX Runtime and in OpenVINO, one thread each, in turn.

    python benchmarks/prompt_engines.py BUNDLE [--repeat 5]          -> results/prompt-engines-CPU.json

BUNDLE has a graph for int8 prompts (`export --int8-prompts`); random weights of a published size will do. CPU seconds
of one thread repeat within a few per cent on a machine that does other things as well. CPU is "amx" or "no-amx".
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from record import write_results

from internvl_edge.base import machine
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from internvl_edge.runtime.engines.openvino import OpenVinoEngine

LENGTHS = (300, 1800)


def seconds(engine: Any, embeds: np.ndarray) -> float:
    """CPU seconds of one prompt in an empty cache."""
    engine.cache.reset()
    started = time.process_time()
    engine.prefill(embeds)
    return time.process_time() - started


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True)
def main(folder: Path, repeat: int) -> None:
    """Measure and write the results."""
    has_amx = machine.multiplies_int8_tiles()
    bundle = Bundle.open(folder)
    machine.multiplies_int8_tiles = lambda: True  # OpenVINO runs the graph whatever the CPU
    engines = {
        "onnxruntime": OnnxRuntimeEngine(bundle, capacity=max(LENGTHS) + 100, threads=1),
        "openvino": OpenVinoEngine(bundle, capacity=max(LENGTHS) + 100, threads=1),
    }
    width = bundle.manifest.model.decoder.hidden_size
    embeds = np.random.default_rng(0).standard_normal((max(LENGTHS), width)).astype(np.float32) * 0.05
    found: dict[str, dict[int, list[float]]] = {name: {length: [] for length in LENGTHS} for name in engines}
    for turn in range(repeat + 1):  # the first turn warms up
        for length in LENGTHS:
            for name, engine in engines.items():
                took = seconds(engine, embeds[:length])
                if turn:
                    found[name][length].append(took)
    medians = {name: {n: statistics.median(times) for n, times in each.items()} for name, each in found.items()}
    ratios = {length: medians["onnxruntime"][length] / medians["openvino"][length] for length in LENGTHS}
    values = {"amx": has_amx, "cpu_seconds": found, "openvino_times_onnxruntime": ratios}
    print(write_results(f"prompt-engines-{'amx' if has_amx else 'no-amx'}", values).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
