"""This project on a checkpoint: run_ours.py CHECKPOINT CALIBRATION OUT RECIPE, the recipe's fields as JSON.

CALIBRATION is what `calibrate` makes. A process of its own, like every peer's, so that time and memory compare. In
float32, as the peers compute on a CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from internvl_edge.calibration import choose_compute
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe import Recipe


def main() -> None:
    checkpoint, calibration, out = map(Path, sys.argv[1:4])
    recipe = Recipe(**json.loads(sys.argv[4]))
    stats = calibration if recipe.needs_data else None
    quantize_checkpoint(checkpoint, out, recipe, stats=stats, compute=choose_compute(dtype="float32"))


if __name__ == "__main__":
    main()
