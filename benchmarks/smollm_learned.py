"""Learned rounding on a real language model: this project with and without, by calibration tokens, groups and seed.

    python benchmarks/smollm_learned.py WORK [--row NAME ...]

WORK is the folder of `smollm_awq.py`, which makes the checkpoint, the tokens and the figures; a run continues where it
was. auto-round's rows are those that `results/smollm-awq.json` records, for the same test tokens and, with 4096 of
them, the same calibration tokens. Results: results/smollm-learned.json.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import smollm_text
from numpy.typing import NDArray
from record import RESULTS, run_measured, write_results
from smollm_awq import HERE, Bench, _evenly, _write_calibration_set

from internvl_edge.calibration import dataset


@dataclass(frozen=True)
class Row:
    """One way to make the weights.

    Attributes:
        group_size, symmetric, learned: of the recipe.
        sequences: calibration sequences of 512 tokens.
        seed: of learning.
    """

    group_size: int
    learned: bool
    sequences: int = 8
    symmetric: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """In file names and on the command line."""
        kind = ("symmetric-" if self.symmetric else "") + ("learned" if self.learned else "computed")
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"{kind}-g{self.group_size}-{512 * self.sequences}{seed}"

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe's fields."""
        fields: dict[str, Any] = {"decoder": "w4a16-awq", "group_size": self.group_size, "symmetric": self.symmetric}
        return fields | ({"rounding": "learned", "learning": {"seed": self.seed}} if self.learned else {})


# The most telling first.
ROWS = [
    Row(64, learned=False),
    Row(64, learned=True),
    Row(32, learned=False),
    Row(32, learned=True),
    Row(64, learned=True, symmetric=True),
    Row(64, learned=True, seed=1),
    Row(64, learned=False, sequences=16),
    Row(64, learned=True, sequences=16),
    Row(64, learned=False, symmetric=True),
    Row(32, learned=True, seed=1),
    Row(32, learned=False, sequences=16),
    Row(32, learned=True, sequences=16),
    Row(32, learned=False, symmetric=True),
    Row(32, learned=True, symmetric=True),
]


class LearnedBench(Bench):
    """`smollm_awq`'s folder, other rows."""

    def tokens(self, sequences: int) -> NDArray[np.int32]:
        """[sequences, LENGTH], evenly spaced."""
        tokens, *_ = smollm_text.read(self.work / "text.npz")
        return tokens[_evenly(len(tokens), sequences)]

    def row(self, row: Row) -> dict[str, Any]:
        """Make a row's weights and their figures, or read what was found before."""
        found = self.work / "figures" / f"rounding-{row.name}.json"
        if found.exists():
            return dict(json.loads(found.read_text(encoding="utf-8")))
        data = self.work / f"calibration-{row.sequences}"
        if not (data / dataset.MANIFEST).exists():
            _write_calibration_set(data, self.checkpoint, self.tokens(row.sequences))
        out = self.work / "weights" / f"rounding-{row.name}"
        for folder in (out.parent, found.parent):
            folder.mkdir(exist_ok=True)
        cost = out.with_name(f"{out.name}.json")
        if not cost.exists():
            paths = [str(path) for path in (self.checkpoint, data, out)]
            command = [sys.executable, str(HERE / "peers" / "run_ours.py"), *paths, json.dumps(row.recipe)]
            run = run_measured(command, interval_s=0.5)
            measured = {"wall_s": round(run.wall_s), "cpu_s": round(run.cpu_s), "peak_anonymous": run.peak_anonymous}
            cost.write_text(json.dumps(measured), encoding="utf-8")
        said = json.loads(out.with_name(f"{out.name}.report.json").read_text(encoding="utf-8"))
        values = {
            "name": row.name,
            "recipe": row.recipe,
            "calibration_tokens": 512 * row.sequences,
            **self.figures(out),
            "learned": said["learned"],
            "cost": json.loads(cost.read_text(encoding="utf-8")),
        }
        found.write_text(json.dumps(values, indent=1), encoding="utf-8")
        return values

    def write(self, sizes: Any = ()) -> None:
        """Write what has been measured so far, and what has not."""
        *_, digest = smollm_text.read(self.work / "text.npz")
        files = {row.name: self.work / "figures" / f"rounding-{row.name}.json" for row in ROWS}
        recorded = json.loads((RESULTS / "smollm-awq.json").read_text(encoding="utf-8"))
        same = recorded["tokens_sha256"] == digest
        peers = [row for row in recorded["results"] if row["method"] == "auto-round"] if same else []
        values = {
            "tokens_sha256": digest,
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "not_measured": [name for name, file in files.items() if not file.exists()],
            "results": [json.loads(file.read_text(encoding="utf-8")) for file in files.values() if file.exists()],
            "recorded_peers": {"date": recorded["date"], "results": peers},
        }
        write_results("smollm-learned", values)


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--row", "names", multiple=True, help="Only these [default: all].")
def main(work: Path, names: tuple[str, ...]) -> None:
    """Measure all rows and write the results."""
    bench = LearnedBench(work.absolute(), None)
    bench.work.mkdir(parents=True, exist_ok=True)
    bench.prepare()
    for row in ROWS:
        if not names or row.name in names:
            values = bench.row(row)
            figures = values["all"]
            click.echo(
                f"{row.name:28} KL {figures['kl_mean']:.5f}, p99 {figures['kl_p99']:.3f}, top-1 "
                f"{figures['top1_agreement']:.2%}, {values['cost']['cpu_s']} CPU s"
            )
            bench.write()


if __name__ == "__main__":
    main()
