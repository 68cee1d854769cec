"""What an int8 KV cache costs on a real language model: divergence from the cache of floats, in both dialects.

    python benchmarks/smollm_kv_cache.py WORK

WORK is that of smollm_awq.py, whose calibration and test sequences are used. Weights keep their floats, so nothing but
the cache differs; the runtime decodes with the kernels that answer users. Results: results/smollm-kv-cache.json.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import smollm_text
from numpy.typing import NDArray
from record import write_results
from smollm_awq import VOCABULARY, Bench

from internvl_edge import export_bundle
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.names import DECODERS
from internvl_edge.calibration import choose_compute
from internvl_edge.evaluation.divergence import Divergence, divergence, summarize
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.recipe import Recipe
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

# Figures by position within a sequence: does the error grow with the context?
BUCKETS = ((0, 128), (128, 256), (256, 512))


class Model:
    """One bundle's decoder in one dialect."""

    def __init__(self, folder: Path, dialect: str) -> None:
        opened = Bundle.open(folder)
        self._engine = OnnxRuntimeEngine(opened, dialect=dialect, capacity=smollm_text.LENGTH + 1)
        self._table = opened.embeddings()

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """[len(ids), VOCABULARY], each row after its token."""
        self._engine.cache.reset()
        return np.array(self._engine.score(np.asarray(self._table[ids], np.float32)))[:, :VOCABULARY]


def calibrated(bench: Bench) -> Path:
    """The checkpoint with the scales of an int8 cache, and its bundle; what is there stays."""
    checkpoint, bundle = bench.work / "kv-int8", bench.work / "bundle-kv-int8"
    if not checkpoint.exists():
        recipe = Recipe(decoder="fp", kv_cache="int8")
        compute = choose_compute(dtype="float32")
        quantize_checkpoint(
            bench.checkpoint, checkpoint, recipe, calibration=bench.work / "calibration", compute=compute
        )
    if not bundle.exists():
        export_bundle(checkpoint, bundle, "float32")
    return bundle


def figures(parts: list[Divergence]) -> dict[str, Any]:
    """Over all positions and by position."""
    found: dict[str, Any] = asdict(summarize(parts))
    for start, end in BUCKETS:
        found[f"kl_mean_{start}_{end}"] = float(np.concatenate([part.kl[start:end] for part in parts]).mean())
    return found


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
def main(work: Path) -> None:
    """Compare and write the results."""
    bench = Bench(work, None)
    bench.prepare()
    rounded, test = calibrated(bench), bench.test()
    results: dict[str, Any] = {"sequences": len(test), "dialects": {}}
    for dialect in DECODERS:
        floats, integers = Model(work / "bundle-internlm2", dialect), Model(rounded, dialect)
        parts = [
            divergence(floats.logits(part.ids[:-1]), integers.logits(part.ids[:-1]), part.ids[1:]) for part in test
        ]
        results["dialects"][dialect] = figures(parts)
        click.echo(f"{dialect}: {results['dialects'][dialect]}")
    write_results("smollm-kv-cache", results)
    shutil.rmtree(rounded)


if __name__ == "__main__":
    main()
