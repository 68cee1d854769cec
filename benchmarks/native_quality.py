"""What the native attention operators change in a reader's answers: exact answers with and without them, divergence.

    python benchmarks/native_quality.py CHECKPOINT WORK          -> results/native-quality-LAYOUT.json

CHECKPOINT is a demo reader (internvl_edge/demo/qwen2, examples/reader/internlm2). Its bundle has 4-bit weights, an int8
head and tower, and int8 prompts, so every graph takes the operators. The divergence is that of the tokens of answers,
from the same bundle with ONNX Runtime's own attention. WORK keeps the bundle.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import click
from record import write_results

from internvl_edge import InternVL, export_bundle
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.calibration import DataOptions, choose_compute
from internvl_edge.evaluation import QuestionSettings, compare, read_cases, read_suite, run_suite
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.recipe import Recipe
from internvl_edge.runtime.native.choice import SWITCH, choose_attention

RECIPE = Recipe("w4a16-rtn", group_size=64, lm_head="int8", vision="int8")
KINDS = {"onnxruntime": "0", "native": "1"}
SEED, ANSWER_TOKENS = 1, 64


def made(checkpoint: Path, work: Path) -> Path:
    """The bundle; what is there stays."""
    if not (work / "bundle").exists():
        if not (work / "checkpoint").exists():
            compute = choose_compute("cpu", "float32")
            quantize_checkpoint(checkpoint, work / "checkpoint", RECIPE, data=DataOptions(), compute=compute)
        export_bundle(work / "checkpoint", work / "bundle", dialects=["onnxruntime"], int8_prompts=True)
    return work / "bundle"


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--questions", type=int, default=500, show_default=True)
@click.option("--compared", type=int, default=64, show_default=True)
def main(checkpoint: Path, work: Path, questions: int, compared: int) -> None:
    """Measure and write the results."""
    bundle = made(checkpoint, work)
    manifest = Bundle.open(bundle).manifest

    def load(kind: str) -> InternVL:
        os.environ[SWITCH] = KINDS[kind]
        return InternVL.load(bundle, device="cpu", engine="onnxruntime")

    results: dict[str, Any] = {"questions": questions, "compared": compared, "exact_match": {}, "attention": {}}
    suite = read_suite("reader", questions)
    for kind, value in KINDS.items():
        os.environ[SWITCH] = value
        results["attention"][kind] = str(choose_attention(manifest))
        score = run_suite(partial(load, kind), suite, QuestionSettings("reader", max_new_tokens=ANSWER_TOKENS))
        results["exact_match"][kind] = round(score.total["exact_match"].bundle.value, 4)
    settings = QuestionSettings("built-in", SEED, max_new_tokens=ANSWER_TOKENS)
    cases = read_cases(None, compared, SEED)
    comparison = compare(partial(load, "native"), partial(load, "onnxruntime"), cases, settings)
    results["native_from_onnxruntime"] = {name: round(value, 7) for name, value in comparison.figures.items()}
    click.echo(write_results(f"native-quality-{manifest.model.decoder.architecture}", results).read_text())


if __name__ == "__main__":
    main()
