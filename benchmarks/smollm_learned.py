"""Learned rounding on a real language model: this project with and without, by calibration tokens, groups and seed.

    python benchmarks/smollm_learned.py WORK [--row NAME ...] [--peers ~/peers] [--minutes 9]

WORK is the folder of `smollm_awq.py`, which makes the checkpoint, the tokens and the figures; a run continues where it
was. auto-round's rows need its environment, as there; with 4096 tokens they are those of `smollm_awq.py`. With
--minutes, a quantizer is killed after that time. The same command continues it, and the times of all attempts are added
up. Results: results/smollm-learned.json.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import smollm_text
from numpy.typing import NDArray
from quantize_memory import add_attempt
from record import run_measured, write_results
from smollm_awq import HERE, Bench, _evenly, _versions, _write_calibration_set

from internvl_edge.calibration import dataset

PEER = "auto-round"


@dataclass(frozen=True)
class Row:
    """One way to make the weights.

    Attributes:
        group_size, symmetric: of the recipe.
        rounding: of the recipe, or "auto-round", the peer's.
        sequences: calibration sequences of 512 tokens.
        seed: of learning.
        negative_scales: of the recipe.
    """

    group_size: int
    rounding: str
    sequences: int = 8
    symmetric: bool = False
    seed: int = 0
    negative_scales: bool = False

    @property
    def name(self) -> str:
        """In file names and on the command line."""
        prefix = "negative-scales-" if self.negative_scales else "symmetric-" if self.symmetric else ""
        kind = prefix + self.rounding
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"{kind}-g{self.group_size}-{512 * self.sequences}{seed}"

    @property
    def options(self) -> Any:
        """The recipe's fields, or the peer's options."""
        if self.rounding == PEER:
            return ["--group-size", str(self.group_size), "--iters", "50", *(["--symmetric"] if self.symmetric else [])]
        fields: dict[str, Any] = {"decoder": "w4a16-awq", "group_size": self.group_size, "symmetric": self.symmetric}
        learning = {"rounding": "learned", "learning": {"seed": self.seed}}
        if self.negative_scales:
            fields["negative_scales"] = True
        return fields | (learning if self.rounding == "learned" else {})


# The most telling first.
ROWS = [
    Row(64, "computed"),
    Row(64, "learned"),
    Row(64, "learned", sequences=16),
    Row(64, "computed", sequences=16),
    Row(32, "learned"),
    Row(64, "learned", symmetric=True),
    Row(64, "learned", seed=1),
    Row(64, PEER, sequences=16),
    Row(64, "computed", sequences=32),
    Row(64, "learned", sequences=32),
    Row(32, "learned", sequences=16),
    Row(64, "computed", symmetric=True),
    Row(32, "computed"),
    Row(64, "learned", sequences=16, seed=1),
    Row(64, PEER, symmetric=True),
    Row(64, "learned", symmetric=True, seed=1),
    Row(32, "computed", sequences=16),
    Row(32, "learned", seed=1),
    Row(32, "computed", symmetric=True),
    Row(32, "learned", symmetric=True),
    Row(64, "learned", symmetric=True, negative_scales=True, seed=1),
]


class LearnedBench(Bench):
    """`smollm_awq`'s folder, other rows."""

    def tokens(self, sequences: int) -> NDArray[np.int32]:
        """[sequences, LENGTH]; as far as they go, evenly spaced sequences of those that `smollm_awq` draws from."""
        tokens, *_ = smollm_text.read(self.work / "text.npz")
        if sequences > len(tokens):
            more = self.work / "more.npy"
            if not more.exists():
                script = [sys.executable, str(HERE / "smollm_text.py"), str(self.work / "bundle-internlm2"), str(more)]
                subprocess.run([*script, "--more"], check=True)
            tokens = np.concatenate([tokens, np.load(more)])
        return tokens[_evenly(len(tokens), sequences)]

    def row(self, row: Row, minutes: float) -> dict[str, Any] | None:
        """Make a row's weights and their figures, or read what was found before; None without what it needs."""
        found = self.work / "figures" / f"rounding-{row.name}.json"
        if found.exists():
            return dict(json.loads(found.read_text(encoding="utf-8")))
        out = self.work / "weights" / f"rounding-{row.name}"
        for folder in (out.parent, found.parent):
            folder.mkdir(exist_ok=True)
        cost = out.with_name(f"{out.name}.json")
        if not cost.exists():
            making = self.making(row, out)
            if making is None:
                return None
            self.measure_cost(making, out, cost, minutes)
        report = out.with_name(f"{out.name}.report.json")
        environment = self.peers / PEER if self.peers and row.rounding == PEER else None
        values = {
            "name": row.name,
            "options" if row.rounding == PEER else "recipe": row.options,
            "calibration_tokens": 512 * row.sequences,
            **self.figures(out),
            "learned": json.loads(report.read_text(encoding="utf-8"))["learned"] if report.exists() else None,
            "cost": json.loads(cost.read_text(encoding="utf-8")),
            **({"versions": _versions(environment)} if environment else {}),
        }
        found.write_text(json.dumps(values, indent=1), encoding="utf-8")
        return values

    def making(self, row: Row, out: Path) -> list[str] | None:
        """The command for a row's weights; None where the peer has no environment here."""
        if row.rounding != PEER:
            data = self.work / f"calibration-{row.sequences}"
            if not (data / dataset.MANIFEST).exists():
                _write_calibration_set(data, self.checkpoint, self.tokens(row.sequences))
            paths = [str(path) for path in (self.checkpoint, data, out)]
            return [sys.executable, str(HERE / "peers" / "run_ours.py"), *paths, json.dumps(row.options)]
        python = self.peers / PEER / "bin" / "python" if self.peers else None
        if python is None or not python.exists():
            return None
        data = self.work / f"calibration-{row.sequences}.npy"
        np.save(data, self.tokens(row.sequences))
        shutil.rmtree(out, ignore_errors=True)
        paths = [str(path) for path in (self.work / "llama", data, out)]
        command = [str(python), str(HERE / "peers" / "run_auto_round.py"), *paths, *row.options]
        shell = f"cd '{self.work}' && exec \"$@\" > '{out}.log' 2>&1"  # it leaves files where it is
        return ["sh", "-c", shell, "sh", *command]

    def measure_cost(self, command: list[str], out: Path, cost: Path, minutes: float) -> None:
        """Run what makes the weights, and write what it cost; a run that is killed for its time ends the program."""
        file, state = out.with_name(f"{out.name}.attempts.json"), out.with_name(f"{out.name}.partial")
        if not file.exists():
            shutil.rmtree(state, ignore_errors=True)  # of a run whose cost nobody knows
        run = run_measured(command, interval_s=0.5, limit_s=60 * minutes)
        attempts = add_attempt(file, run)
        if run.stopped:
            raise SystemExit(f"{out.name}: stopped after {run.wall_s:.0f} s; the same command continues")
        measured: dict[str, Any] = {key: round(sum(each[key] for each in attempts)) for key in ("wall_s", "cpu_s")}
        measured |= {"peak_anonymous": max(each["peak_anonymous"] for each in attempts), "attempts": len(attempts)}
        cost.write_text(json.dumps(measured), encoding="utf-8")

    def write(self, sizes: Any = ()) -> None:
        """Write what has been measured so far, and what has not."""
        *_, digest = smollm_text.read(self.work / "text.npz")
        files = {row.name: self.work / "figures" / f"rounding-{row.name}.json" for row in ROWS}
        values = {
            "tokens_sha256": digest,
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "not_measured": [name for name, file in files.items() if not file.exists()],
            "results": [json.loads(file.read_text(encoding="utf-8")) for file in files.values() if file.exists()],
        }
        write_results("smollm-learned", values)


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--row", "names", multiple=True, help="Only these [default: all].")
@click.option("--peers", type=click.Path(path_type=Path), help="Where make_env.sh put auto-round's environment.")
@click.option("--minutes", type=float, default=math.inf, help="Kill a quantizer after this time.")
def main(work: Path, names: tuple[str, ...], peers: Path | None, minutes: float) -> None:
    """Measure all rows and write the results."""
    bench = LearnedBench(work.absolute(), peers.absolute() if peers else None)
    bench.work.mkdir(parents=True, exist_ok=True)
    bench.prepare()
    for row in ROWS:
        if not names or row.name in names:
            values = bench.row(row, minutes)
            if values is None:
                click.echo(f"{row.name:28} no environment for it")
                continue
            figures = values["all"]
            click.echo(
                f"{row.name:28} KL {figures['kl_mean']:.5f}, p99 {figures['kl_p99']:.3f}, top-1 "
                f"{figures['top1_agreement']:.2%}, {values['cost']['cpu_s']} CPU s"
            )
            bench.write()


if __name__ == "__main__":
    main()
