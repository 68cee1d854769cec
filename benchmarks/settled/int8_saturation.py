"""What CPUs without VNNI would do to an int8 tower, emulated: two products added in 16 bits, which saturate.

    python benchmarks/settled/int8_saturation.py CHECKPOINT     -> results/int8-saturation-NAME.json

Quantizes CHECKPOINT, then computes the embeddings of photographs once with exact sums and once as ONNX Runtime's fast
kernels do on x86 without VNNI: inputs shifted to unsigned bytes, products of neighboring inputs added with saturation.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import numpy as np
import torch
from int8_vision import agreement, photographs, quantize
from record import write_results

from internvl_edge.calibration import blocks, choose_compute
from internvl_edge.calibration.models import Tower
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.recipe.recipe import VisionInt8

TILES = 24
_LOWEST, _HIGHEST = -(1 << 15), (1 << 15) - 1


class Saturating:
    """Takes the place of `blocks.linear`; counts the pairs of products that saturate."""

    def __init__(self) -> None:
        self.pairs = self.saturated = 0

    def __call__(self, weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        step, values = weights[f"{name}.input_scale"], weights[f"{name}.weight"].int()
        unsigned = (torch.round(x / step).clamp(-128, 127) + 128).int().flatten(0, -2)
        total = torch.zeros(len(unsigned), len(values), dtype=torch.int32)
        for k in range(0, unsigned.shape[1], 2):
            pair = unsigned[:, k : k + 1] * values[:, k] + unsigned[:, k + 1 : k + 2] * values[:, k + 1]
            kept = pair.clamp(_LOWEST, _HIGHEST)
            self.pairs += pair.numel()
            self.saturated += int((pair != kept).sum())
            total += kept
        y = (total - 128 * values.sum(1)).float() * (step * weights[f"{name}.weight_scale"])
        return (y + weights[f"{name}.bias"]).reshape(*x.shape[:-1], -1)


def embeddings(checkpoint: Checkpoint, tiles: np.ndarray) -> np.ndarray:
    """[tiles, tokens, hidden] of an int8 tower, through `blocks.linear`."""
    tower, every = Tower(checkpoint, choose_compute("cpu", "float32"), tiles, [""] * len(tiles)), range(len(tiles))
    x = tower.first(every)
    for index, block in enumerate(tower.names):
        weights = tower.load(index)
        for name in [name.removeprefix(f"{block}.") for name in checkpoint.schemes if name.startswith(f"{block}.")]:
            packed = checkpoint.linear(f"{block}.{name}")
            assert packed is not None
            weights[f"{name}.weight"] = torch.from_numpy(np.array(packed.values)).float()
            weights[f"{name}.weight_scale"] = torch.from_numpy(packed.scale[:, 0])
            weights[f"{name}.input_scale"] = torch.tensor(packed.input_scale, dtype=torch.float32)
        x = tower.run(index, weights, x, every)
    return np.asarray(x.reshape(len(tiles), -1, x.shape[-1]).numpy())


@torch.no_grad()
def main() -> None:
    """Command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    source = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        quantize(source, Path(folder) / "int8", VisionInt8(cosine=0))
        int8 = Checkpoint(Path(folder) / "int8")
        tiles = photographs(int8.config)
        tiles = np.ascontiguousarray(tiles[:: max(1, len(tiles) // TILES)])
        exact = embeddings(int8, tiles)
        saturating: Any = Saturating()
        blocks.linear = saturating
        found = embeddings(int8, tiles)
    values = {
        "checkpoint": source.name,
        "tiles": len(tiles),
        "saturated_share": saturating.saturated / saturating.pairs,
        "saturating_against_exact": agreement(exact, found),
    }
    print(write_results(f"int8-saturation-{source.resolve().name}", values))


if __name__ == "__main__":
    main()
