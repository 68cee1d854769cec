"""How large may the steps of learned rounding be in wide linears? First layers of random checkpoints in real shapes.

    python benchmarks/settled/learning_rates.py WORK [--variant 1B ...] [--limit 1536 ...] [--samples 64]

Linears with more inputs than the limit take smaller steps, by the square of the ratio; "inf" is the same step for all.
Each eighth sample is held out from learning. Errors are those of the layer's output relative to the float model's,
squared, mean over tokens, after learning as a share of before. One thread. Entries are added to
results/learning-rates.json.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import _path  # noqa: F401
import click
import torch
from checkpoint_variants import VARIANTS
from quantize_memory import write_data
from random_checkpoint import write
from record import RESULTS, write_results

from internvl_edge.base.progress import SILENT, Progress
from internvl_edge.calibration.dataset import DataOptions
from internvl_edge.calibration.stream import BlockStream
from internvl_edge.quantize import learned, quantize_checkpoint
from internvl_edge.quantize.block import Latent, QuantizedBlock
from internvl_edge.recipe.recipe import LearnedRounding, Recipe

HELD_OUT = 8
TOKENS = 390


class StopError(Exception):
    """Ends a trial; holds what it found."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__()
        self.rows = rows


class Trial(learned.RoundingLearner):
    """Learns the first layer once for each limit, each time from the start."""

    limits: Sequence[float] = ()

    def __init__(
        self, stream: BlockStream, reference: BlockStream, how: LearnedRounding, progress: Progress = SILENT
    ) -> None:
        super().__init__(stream, reference, how, progress)
        self._every = range(len(self._lengths))
        self._held_out = [item for item in self._every if item % HELD_OUT == HELD_OUT // 2]

    def learn(self, index: int, block: QuantizedBlock) -> learned.Learned | None:
        """Raise `StopError`."""
        self._reference.run(SILENT, "", lambda index, statistics: None, until=index + 1)
        prefix = f"{self._blocks.names[index]}."
        latents = {name.removeprefix(prefix): latent for name, latent in block.latents.items()}
        start = {name: latent.values.clone() for name, latent in latents.items()}
        weights = self._blocks.load(index, self._compute.dtype) | block.replacements(prefix, self._compute)
        seen = [item for item in self._every if item not in self._held_out]
        some, rows = seen[:: max(1, len(seen) // 4)], []
        for limit in self.limits:
            for name, latent in latents.items():
                latent.values.copy_(start[name])
            with mock.patch.object(learned, "_INPUTS", limit), mock.patch.object(learned, "batches", _only(seen)):
                integers = {name: block.linears[f"{prefix}{name}"].values for name in latents}
                moving = {name: learned._Moving(latent, integers[name]) for name, latent in latents.items()}
                for name, each in moving.items():
                    each.weight = weights[f"{name}.weight"] = each.rounded(self._compute.dtype).requires_grad_()
                before = [self._error(index, weights, items) for items in (some, self._held_out)]
                began = time.process_time()
                self._steps(index, weights, list(moving.values()), lambda count: None)
                seconds = time.process_time() - began
            after = [self._error(index, weights, items) for items in (some, self._held_out)]
            rows.append(
                {
                    "limit": limit if math.isfinite(limit) else "inf",
                    "before": before[1],
                    "seen": round(after[0] / before[0], 4),
                    "held_out": round(after[1] / before[1], 4),
                    "changed": {name: _changed(each, latents[name]) for name, each in moving.items()},
                    "cpu_s": round(seconds, 1),
                }
            )
            click.echo(json.dumps(rows[-1]))
        raise StopError(rows)


def _only(seen: Sequence[int]) -> Any:
    """Return `learned.batches` for some of the samples."""
    batches = learned.batches

    def chosen(lengths: Sequence[int], tokens: int, count: int, seed: tuple[int, int]) -> Iterator[list[int]]:
        for batch in batches([lengths[item] for item in seen], tokens, count, seed):
            yield [seen[place] for place in batch]

    return chosen


def _changed(moving: learned._Moving, latent: Latent) -> float:
    return round(moving.changed() / latent.values.numel(), 4)


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--variant", "names", multiple=True, default=("1B", "2B"), show_default=True)
@click.option("--limit", "limits", type=float, multiple=True, default=(math.inf, 1536, 768), show_default=True)
@click.option("--samples", default=64, show_default=True)
def main(work: Path, names: tuple[str, ...], limits: tuple[float, ...], samples: int) -> None:
    """Try all limits with each variant."""
    torch.set_num_threads(1)
    path = RESULTS / "learning-rates.json"
    for name in names:
        shape, checkpoint = VARIANTS[name], work / f"{name}-1-1"
        if not checkpoint.exists():
            write(replace(shape, layers=1, vision=replace(shape.vision, layers=1)), checkpoint)
        data = DataOptions(write_data(work / f"data-{name}", checkpoint, samples, TOKENS), samples=samples)
        out = work / f"out-{name}"
        shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)
        Trial.limits = limits
        try:
            with mock.patch("internvl_edge.quantize.pipeline.RoundingLearner", Trial):
                quantize_checkpoint(checkpoint, out, Recipe(rounding="learned"), data=data)
        except StopError as stopped:
            known = json.loads(path.read_text(encoding="utf-8"))["variants"] if path.exists() else {}
            write_results("learning-rates", {"variants": known | {name: {"samples": samples, "rows": stopped.rows}}})
        finally:
            shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)


if __name__ == "__main__":
    main()
