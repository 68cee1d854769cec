"""How far must error compensation distrust the correlations of few tokens? SmolLM2's first layers, on unseen texts.

    python benchmarks/settled/shrinkage.py WORK [--blocks 4]

WORK is the folder of `smollm_learned.py`. The diagonal of each Gram matrix grows by itself times the columns per token,
times a factor that is tried here; 0 is what was done before, 1 is what is done now. The error is that of the layers'
output relative to the float model's, squared, mean over tokens: of the calibration tokens, and of sequences that no
step has seen. They are neither calibration nor test of any other benchmark. Results: results/shrinkage.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import click
import numpy as np
import torch
from numpy.typing import NDArray
from record import write_results
from smollm_awq import _write_calibration_set
from smollm_learned import LearnedBench
from torch import Tensor

from internvl_edge.base.progress import SILENT
from internvl_edge.calibration.compute import choose_compute
from internvl_edge.calibration.dataset import CalibrationSet
from internvl_edge.calibration.models import Decoder
from internvl_edge.calibration.stream import BlockStream, Statistics
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.quantize import layer
from internvl_edge.quantize.layer import BlockQuantizer
from internvl_edge.quantize.learned import RoundingLearner
from internvl_edge.quantize.output import OutputLayout
from internvl_edge.quantize.plan import plan_decoder
from internvl_edge.recipe.files import make_recipe

# Sequences that calibrate, the rounding, and the factor.
ROWS = [
    *((8, "computed", factor) for factor in (0.0, 0.3, 1.0, 3.0)),
    *((8, "learned", factor) for factor in (0.0, 1.0, 3.0)),
    *((16, "computed", factor) for factor in (0.0, 1.0, 3.0)),
    *((16, "learned", factor) for factor in (0.0, 1.0)),
    *((4, "computed", factor) for factor in (0.0, 1.0, 3.0)),
]
UNSEEN = 8
_FACTORIZE = layer.feedback_factor


def shrunk(factor: float) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """`feedback_factor` as if there were so many times fewer tokens."""
    return lambda gram, tokens: _FACTORIZE(gram, int(tokens / max(factor, 1e-9)))


def errors(
    checkpoint: Path, folder: Path, tokens: NDArray[np.int32], unseen: int, rounding: str, blocks: int
) -> list[list[float]]:
    """Of each layer the error on the calibration tokens and on the last `unseen` sequences."""
    source, compute = Checkpoint(checkpoint), choose_compute("cpu", "float32")
    recipe = make_recipe({"decoder": "w4a16-awq", "group_size": 64, "rounding": rounding})
    quantizer = BlockQuantizer(
        source, recipe, compute, OutputLayout(source, recipe).scale_dtype, plan_decoder(source, recipe)
    )
    _write_calibration_set(folder / "set", checkpoint, tokens)
    decoder = Decoder(source, compute, CalibrationSet.open(folder / "set"))
    work = WorkFolder(folder / "work", {"rounding": rounding}, restart=True)
    held_out = range(len(tokens) - unseen, len(tokens))
    stream = BlockStream(work, "decoder", decoder, held_out=held_out)
    reference = BlockStream(work, "decoder-reference", decoder)
    learner = RoundingLearner(stream, reference, recipe.learning)
    learner._lengths = learner._lengths[: -unseen or None]  # what comes first is what it draws from
    found: list[list[float]] = []

    def handle(index: int, statistics: Statistics) -> dict[str, Tensor]:
        if index:
            found.append([error(stream, reference, index, items) for items in (range(held_out.start), held_out)])
        block = quantizer.layer(index, statistics, latents=rounding == "learned")
        if rounding == "learned":
            learner.learn(index, block)
            quantizer.settle(block)
        else:
            reference.run(SILENT, "", lambda index, statistics: None, until=index + 1)
        return block.replacements(f"{decoder.names[index]}.", compute)

    stream.run(SILENT, "", handle, quantizer.wanted, until=blocks)
    return [*found, [error(stream, reference, blocks, items) for items in (range(held_out.start), held_out)]]


def error(stream: BlockStream, reference: BlockStream, index: int, items: Sequence[int]) -> float:
    """Squared error of what enters a block relative to the float model's, mean over tokens."""
    parts = [[of.inputs(index, range(item, item + 1)) for of in (stream, reference)] for item in items]
    return float(torch.cat([(a - b).square().mean(-1) / b.square().mean(-1) for a, b in parts]).mean())


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--blocks", default=4, show_default=True, help="Layers from the first on.")
def main(work: Path, blocks: int) -> None:
    """Measure all rows and write the results after each."""
    bench = LearnedBench(work.absolute(), None)
    bench.tokens(32)  # makes the further sequences
    unseen = np.load(bench.work / "more.npy")[:: 16 // UNSEEN]
    rows: list[dict[str, Any]] = []
    for sequences, rounding, factor in ROWS:
        layer.feedback_factor = shrunk(factor)
        started, folder = time.process_time(), bench.work / "shrinkage"
        folder.mkdir(exist_ok=True)
        tokens = np.concatenate([bench.tokens(sequences), unseen])
        found = errors(bench.checkpoint, folder, tokens, len(unseen), rounding, blocks)
        values = {"calibration_tokens": 512 * sequences, "rounding": rounding, "factor": factor}
        rows.append(values | {"errors": found, "cpu_s": round(time.process_time() - started)})
        click.echo(f"{512 * sequences} {rounding} {factor}: {found[-1][0]:.5f}, unseen {found[-1][1]:.5f}")
        write_results("shrinkage", {"blocks": blocks, "unseen_tokens": int(unseen.size), "results": rows})


if __name__ == "__main__":
    main()
