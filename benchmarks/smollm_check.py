"""Is SmolLM2 as written here the model in the wheel? Logits and perplexity against transformers reading the GGUF.

    python benchmarks/smollm_check.py WORK --peers ~/peers

WORK is that of smollm_awq.py. Three ways over the same tokens: transformers on the GGUF file, the float32 forward of
the benchmarks on the InternLM2 checkpoint, and the runtime on its bundle. Results: results/smollm-check.json.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import click
import numpy as np
import smollm_checkpoint
import smollm_text
from numpy.typing import NDArray
from record import write_results
from smollm_awq import VOCABULARY
from smollm_forward import logits, read_weights

from internvl_edge.bundle.bundle import Bundle
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.evaluation.divergence import divergence, summarize
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

SEQUENCES = 3


def _engine_logits(folder: Path, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    opened = Bundle.open(folder)
    engine = OnnxRuntimeEngine(opened, capacity=tokens.shape[1], threads=1)
    table = opened.embeddings()
    rows = []
    for ids in tokens:
        engine.cache.reset()
        rows.append(np.array(engine.score(np.asarray(table[ids], np.float32)))[:, :VOCABULARY])
    return np.stack(rows)


def _figures(expected: NDArray[np.float32], found: NDArray[np.float32], tokens: NDArray[np.int32]) -> dict[str, Any]:
    parts = [divergence(a[:-1], b[:-1], ids[1:]) for a, b, ids in zip(expected, found, tokens, strict=True)]
    summary = summarize(parts)
    return {
        "largest_difference": float(np.abs(expected - found).max()),
        "kl_max": summary.kl_max,
        "top1_agreement": summary.top1_agreement,
        "perplexity": summary.candidate_perplexity,
        "perplexity_of_transformers": summary.reference_perplexity,
    }


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--peers", type=click.Path(path_type=Path), required=True)
def main(work: Path, peers: Path) -> None:
    """Compare and write the results."""
    tokens, *_ = smollm_text.read(work / "text.npz")
    tokens = tokens[:SEQUENCES]
    np.save(work / "check-tokens.npy", tokens)
    script = Path(__file__).resolve().parent / "peers" / "run_transformers.py"
    python, wheel = peers / "modelopt" / "bin" / "python", smollm_checkpoint.gguf_path()
    subprocess.run([python, script, wheel, work / "check-tokens.npy", work / "check-logits.npy"], check=True)
    expected = np.load(work / "check-logits.npy")
    checkpoint = work / "internlm2"
    sequences = [smollm_text.Sequence("check", [*ids.tolist(), 0]) for ids in tokens]  # one more: the last is not asked
    forward = logits(read_weights(checkpoint, VOCABULARY), sequences, Checkpoint(checkpoint).config.decoder)
    results = {
        "positions": int(tokens.size),
        "logit_std": float(expected.std()),
        "forward": _figures(expected, np.stack([part.numpy() for part in forward]), tokens),
        "runtime": _figures(expected, _engine_logits(work / "bundle-internlm2", tokens), tokens),
    }
    write_results("smollm-check", results)
    for name in ("forward", "runtime"):
        click.echo(f"{name}: {results[name]}")


if __name__ == "__main__":
    main()
