"""8 bits, inputs in 8 bits, and mixed precision on a real language model: same tokens as `smollm_awq.py`.

    python benchmarks/smollm_precision.py WORK --peers ~/peers

WORK is the folder of `smollm_awq.py`, which makes the checkpoint and the tokens; a run continues where it was. Weights,
and inputs where these are rounded too, go through one float32 forward; nvidia-modelopt's model answers by itself, as it
rounds inputs in its own modules. Mixed precision is symmetric here, in groups of 64 and less: 4.5 bits per weight are
exactly those of groups of 32. Results: results/smollm-precision.json.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
from record import run_measured, write_results
from smollm_awq import HERE, VOCABULARY, Bench, Method, _versions
from smollm_forward import figures_of, read_weights, write_logits

from internvl_edge.base.progress import Progress
from internvl_edge.calibration import choose_compute, dataset
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.evaluation.divergence import divergence
from internvl_edge.quantize.automatic import measure_divergences, plan_by_divergence
from internvl_edge.quantize.plan import Plan, plan_decoder, units
from internvl_edge.quantize.sensitivity import Divergences
from internvl_edge.recipe.files import make_recipe

_SYMMETRIC = {"decoder": "w4a16-awq", "group_size": 64, "symmetric": True}
_ALL_W8A8 = {"decoder": "w8a8", "decoder_int8": {"max_kl": 0.0}}
# What each of these costs each layer is measured once; rows with an automatic choice choose from the same figures.
_MEASURED = ("w4a16-awq", "w4a16-awq-g32", "w8a16", "w8a8")


# Fields, as in a recipe file; None for the peer.
ROWS: dict[str, dict[str, Any] | None] = {
    "w8a16": {"decoder": "w8a16"},
    "w8a16, rounded": {"decoder": "w8a16", "error_compensation": False},
    "w8a8, all": _ALL_W8A8,
    "w8a8, all, largest value": {"decoder": "w8a8", "decoder_int8": {"max_kl": 0.0, "calibrator": "minmax"}},
    "modelopt": None,
    "uniform g64": _SYMMETRIC,
    "uniform g32": _SYMMETRIC | {"group_size": 32},
    "mixed 4.5": _SYMMETRIC | {"automatic": {"target_bits": 4.5}},
    "w8a8": {"decoder": "w8a8"},
    "mixed 4.5, 64 or int8": _SYMMETRIC | {"automatic": {"target_bits": 4.5, "among": ["w4a16-awq", "w8a16"]}},
    "mixed 5": _SYMMETRIC | {"automatic": {"target_bits": 5.0}},
    "max_kl 0.1": _SYMMETRIC | {"automatic": {"max_kl": 0.1}},
}


class PrecisionBench(Bench):
    """`smollm_awq`'s folder, other rows."""

    def row(self, name: str) -> dict[str, Any] | None:
        """Make a row's weights and their figures, or read what was found before; None where something is missing."""
        if values := self.known(name):
            return values
        out = self.work / "weights" / _brief(name)
        found = self._figures_of(name)
        cost = out.with_name(f"{out.name}.json")
        if not cost.exists():
            command = self._row_command(name, out)
            if command is None:
                return None
            shell = f"cd '{self.work}' && exec \"$@\" > '{cost.with_suffix('.log')}' 2>&1"
            run = run_measured(["sh", "-c", shell, "sh", *command], interval_s=0.5)
            seconds = {"wall_s": round(run.wall_s), "cpu_s": round(run.cpu_s), "peak_anonymous": run.peak_anonymous}
            cost.write_text(json.dumps(seconds), encoding="utf-8")
        figures = self._answers(out) if ROWS[name] is None else self.figures(out)
        values = {
            "name": name,
            "recipe": ROWS[name],
            **figures,
            **self._said(name, out),
            "cost": json.loads(cost.read_text(encoding="utf-8")),
            "versions": _versions(self.peers / "modelopt" if self.peers and ROWS[name] is None else None),
        }
        found.write_text(json.dumps(values, indent=1), encoding="utf-8")
        return values

    def known(self, name: str) -> dict[str, Any] | None:
        """A row's figures, where an earlier run found them."""
        found = self._figures_of(name)
        values: dict[str, Any] | None = json.loads(found.read_text(encoding="utf-8")) if found.exists() else None
        return values

    def _figures_of(self, name: str) -> Path:
        return self.work / "figures" / f"{_brief(name)}.json"

    def _row_command(self, name: str, out: Path) -> list[str] | None:
        recipe = ROWS[name]
        if recipe is None:
            test = self.work / "test.npz"
            sequences = self.test()
            np.savez(
                test,
                ids=np.concatenate([sequence.ids for sequence in sequences]),
                lengths=[len(sequence.ids) for sequence in sequences],
                starts=[sequence.start for sequence in sequences],
            )
            return self.command(Method(name, ("--smoothquant", str(test)), "modelopt"), 64, out)
        if make_recipe(recipe).choice is not None:
            recipe = _settled(recipe, self._plan(recipe))
        paths = [str(path) for path in (self.checkpoint, self.work / "calibration", out)]
        return [sys.executable, str(HERE / "peers" / "run_ours.py"), *paths, json.dumps(recipe)]

    def divergences(self) -> Divergences:
        """Of every unit of linears at every precision."""
        path = self.work / "precision-divergences.json"
        if not path.exists():
            among = {"automatic": {"max_kl": 1.0, "among": list(_MEASURED)}}
            found = measure_divergences(
                WorkFolder(self.work / "precision-divergences", among),
                Checkpoint(self.checkpoint),
                dataset.CalibrationSet.open(self.work / "calibration"),
                choose_compute("cpu", "float32"),
                make_recipe(_SYMMETRIC | among),
                plan_decoder(Checkpoint(self.checkpoint), make_recipe(_SYMMETRIC | among)),
                Progress(sys.stderr),
            )
            path.write_text(json.dumps(found, indent=1), encoding="utf-8")
        made: Divergences = json.loads(path.read_text(encoding="utf-8"))
        return made

    def _plan(self, fields: dict[str, Any]) -> Plan:
        source, recipe = Checkpoint(self.checkpoint), make_recipe(fields)
        return plan_by_divergence(source, recipe, plan_decoder(source, recipe), self.divergences())

    def _said(self, name: str, out: Path) -> dict[str, Any]:
        """Bits, kinds of linears and, of what was measured, the divergence that is predicted."""
        path = out.with_name(f"{out.name}.report.json")
        if not path.exists():
            return {}
        said = json.loads(path.read_text(encoding="utf-8"))
        kinds = Counter(linear["scheme"] for linear in said["linears"] if ".layers." in linear["name"])
        return {"bits_per_weight": said["bits_per_weight"], "linears": dict(kinds.most_common())}

    def predicted(self, name: str) -> float | None:
        """What the measured divergences of a row's linears add up to; None where one was not measured."""
        fields = ROWS[name]
        if fields is None or not (self.work / "precision-divergences.json").exists():
            return None
        recipe, source, nats = make_recipe(fields), Checkpoint(self.checkpoint), self.divergences()
        plan = self._plan(fields) if recipe.choice else plan_decoder(source, recipe)
        each = [(nats[unit[0]] | {"fp": 0.0}).get(str(plan[unit[0]].precision)) for unit in units(source)]
        parts = [part for part in each if part is not None]
        return sum(parts) if len(parts) == len(each) else None

    def _answers(self, out: Path) -> dict[str, Any]:
        """Figures of a peer's own logits."""
        expected, found = np.load(self._reference(), mmap_mode="r"), np.load(out / "logits.npy", mmap_mode="r")
        parts, start = [], 0
        for sequence in self.test():
            targets = sequence.ids[sequence.start + 1 :]
            rows = slice(start, start + len(targets))
            parts.append(divergence(np.array(expected[rows]), np.array(found[rows, :VOCABULARY]), targets))
            start = rows.stop
        return {"all": figures_of(parts)}

    def _reference(self) -> Path:
        path = self.work / "reference-logits.npy"
        if not path.exists():
            decoder = Checkpoint(self.checkpoint).config.decoder
            write_logits(path, read_weights(self.work / "llama", VOCABULARY), self.test(), decoder)
        return path


def _brief(name: str) -> str:
    return "precision-" + name.replace(" ", "-").replace(",", "").replace(".", "_")


def _settled(fields: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The recipe that names what was chosen."""
    layers = {name: str(choice.precision) for name, choice in plan.items()}
    settled = {key: value for key, value in fields.items() if key != "automatic"} | {"layers": layers}
    return settled | ({"decoder_int8": {"max_kl": 0.0}} if fields["decoder"] == "w8a8" else {})


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--peers", type=click.Path(path_type=Path), help="Where make_env.sh put the environments, by name.")
@click.option("--row", "names", multiple=True, help="Only these [default: all].")
def main(work: Path, peers: Path | None, names: tuple[str, ...]) -> None:
    """Measure all rows and write the results."""
    bench = PrecisionBench(work.absolute(), peers.absolute() if peers else None)
    bench.prepare()
    for name in names or ROWS:
        click.echo(_line(name, bench.row(name), bench.predicted(name)))
    found = {name: bench.known(name) for name in ROWS}
    rows = [values | {"predicted_kl": bench.predicted(name)} for name, values in found.items() if values]
    missing = [name for name, values in found.items() if not values]
    write_results("smollm-precision", {"not_measured": missing, "results": rows})


def _line(name: str, values: dict[str, Any] | None, predicted: float | None) -> str:
    if values is None:
        return f"{name:34} no environment for it"
    bits = values.get("bits_per_weight")
    return (
        f"{name:34} KL {values['all']['kl_mean']:.5f} ({predicted and f'{predicted:.5f}'} predicted), "
        f"{bits and f'{bits:.4f}'} bits, top-1 {values['all']['top1_agreement']:.2%}, {values['cost']['cpu_s']} CPU s"
    )


if __name__ == "__main__":
    main()
