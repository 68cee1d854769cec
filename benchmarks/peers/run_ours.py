"""This project on a checkpoint: run_ours.py CHECKPOINT CALIBRATION OUT RECIPE, the recipe's fields as JSON.

What is known of the result goes to OUT.report.json. CALIBRATION is what `calibrate` makes. A process of its own, like
every peer's, so that time and memory compare. In float32, as the peers compute on a CPU.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from internvl_edge.calibration import choose_compute
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.files import make_recipe


def main() -> None:
    checkpoint, calibration, out = map(Path, sys.argv[1:4])
    recipe = make_recipe(json.loads(sys.argv[4]))
    given = calibration if recipe.needs_data else None
    report = quantize_checkpoint(checkpoint, out, recipe, calibration=given, compute=choose_compute(dtype="float32"))
    known = {
        "bits_per_weight": report.record.bits_per_weight,
        "predicted_kl": report.record.predicted_kl,
        "divergences": report.divergences,
        "learned": asdict(report.learned) if report.learned else None,
        "linears": [asdict(linear) for linear in report.record.linears],
    }
    out.with_name(f"{out.name}.report.json").write_text(json.dumps(known, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
