"""What quantizing costs the demo reader: exact answers of its test stream, and divergence from its float weights.

    python benchmarks/reader_quality.py CHECKPOINT WORK
    python benchmarks/reader_quality.py CHECKPOINT WORK --results reader-learned --row float --row ROW ...

Calibration is the built-in set (training fonts and words, seed 0); the suite and the questions of which divergence is
measured are other pictures. Every bundle answers as a user's would, token by token, through ONNX Runtime. WORK keeps
checkpoints, bundles and figures, and a run continues where it was. Results: results/reader-quality-LAYOUT.json, or
another name than reader-quality, for some of the rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from record import write_results

from internvl_edge import InternVL, export_bundle
from internvl_edge.calibration import DataOptions, choose_compute
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.evaluation import QuestionSettings, compare, read_cases, read_suite, run_suite
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.files import make_recipe, presets, read_recipe

_AWQ = {"decoder": "w4a16-awq", "group_size": 64}
# Fields, as in a recipe file; None for the float checkpoint.
ROWS: dict[str, dict[str, Any] | str | None] = {
    "float": None,
    "w8a16": {"decoder": "w8a16"},
    "w8a16, rounded": {"decoder": "w8a16", "error_compensation": False},
    "w8a8": {"decoder": "w8a8"},
    "w4a16-awq, int8 head": _AWQ | {"lm_head": "int8"},
    "w4a16-awq": _AWQ,
    "w4a16-awq, learned": _AWQ | {"rounding": "learned"},
    "w4a16-rtn": _AWQ | {"decoder": "w4a16-rtn"},
    "w4a16-awq, symmetric": _AWQ | {"symmetric": True},
    "w4a16-awq, symmetric, learned": _AWQ | {"symmetric": True, "rounding": "learned"},
    "w4a16-rtn, symmetric": _AWQ | {"decoder": "w4a16-rtn", "symmetric": True},
    "int8 cache": {"decoder": "fp", "kv_cache": "int8"},
    "int8 vision": {"decoder": "fp", "vision": "int8"},
    **{f"recipe {name}": name for name in presets()},
    "recipe cpu, int8 prompts": "cpu",
}
QUESTIONS, COMPARED, SEED = 500, 64, 1
ANSWER_TOKENS = 64


def made(checkpoint: Path, work: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The bundle of a row and what its quantizer said; what is there stays."""
    folder = work / name.replace(" ", "-").replace(",", "")
    source, said = checkpoint, folder / "quantized.json"
    fields = ROWS[name]
    if fields is not None:
        source = folder / "checkpoint"
        if not said.exists():
            recipe = make_recipe(read_recipe(fields) if isinstance(fields, str) else fields)
            compute = choose_compute("cpu", "float32")
            report = quantize_checkpoint(checkpoint, source, recipe, data=DataOptions(), compute=compute)
            said.write_text(json.dumps({"bits_per_weight": report.record.bits_per_weight}), encoding="utf-8")
    if not (folder / "bundle").exists():
        int8_prompts = name.endswith("int8 prompts")
        export_bundle(source, folder / "bundle", "float32", dialects=["onnxruntime"], int8_prompts=int8_prompts)
    return folder / "bundle", json.loads(said.read_text(encoding="utf-8")) if said.exists() else {}


def measure(bundle: Path, reference: Path) -> dict[str, Any]:
    """Exact answers and divergence of one bundle."""

    def load(folder: Path) -> InternVL:
        return InternVL.load(folder, device="cpu", engine="onnxruntime")

    suite = read_suite("reader", QUESTIONS)
    score = run_suite(lambda: load(bundle), suite, QuestionSettings("reader", max_new_tokens=ANSWER_TOKENS))
    found: dict[str, Any] = {
        "exact_match": round(score.total["exact_match"].bundle.value, 4),
        "tasks": {tag: round(results["exact_match"].bundle.value, 4) for tag, results in score.tags.items()},
    }
    if bundle != reference:
        cases = read_cases(None, COMPARED, SEED)
        settings = QuestionSettings("built-in", SEED, max_new_tokens=ANSWER_TOKENS)
        comparison = compare(lambda: load(bundle), lambda: load(reference), cases, settings)
        found |= {name: round(value, 6) for name, value in comparison.figures.items()}
    return found


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--row", "names", multiple=True, type=click.Choice(list(ROWS)), help="Only these [default: all].")
@click.option("--results", default="reader-quality", show_default=True, help="First part of the name of the results.")
def main(checkpoint: Path, work: Path, names: tuple[str, ...], results: str) -> None:
    """Measure all rows and write the results."""
    layout = Checkpoint(checkpoint).config.decoder.architecture
    reference, _ = made(checkpoint, work, "float")
    rows = []
    for name in names or ROWS:
        bundle, said = made(checkpoint, work, name)
        figures = bundle.parent / "figures.json"
        if not figures.exists():
            figures.write_text(json.dumps(measure(bundle, reference)), encoding="utf-8")
        rows.append({"name": name, "recipe": ROWS[name], **said, **json.loads(figures.read_text(encoding="utf-8"))})
        click.echo(f"{name:24} exact {rows[-1]['exact_match']:.3f}  KL {rows[-1].get('kl', 0):.5f}")
    values = {"questions": QUESTIONS, "compared": COMPARED, "layout": layout, "results": rows}
    click.echo(write_results(f"{results}-{layout}", values))


if __name__ == "__main__":
    main()
