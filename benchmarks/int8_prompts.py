"""What prompts in int8 change on a real language model.

    python benchmarks/smollm_checkpoint.py CHECKPOINT --layout internlm2
    python benchmarks/int8_prompts.py CHECKPOINT WORK

SmolLM2-135M, rounded to nearest in 4 bits and groups of 64 with an int8 head, reads the first 512 tokens of chapters of
Python's manual as a prompt and is then led along the following 128, whose logits are compared: with those of the float
model, and prompts in int8 with prompts in 4 bits. What follows the prompt computes alike in both; they differ in the
cache that the prompt left.
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data import topics

import numpy as np
import tokenizers
from record import write_results

from internvl_edge import export_bundle
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.recipe import Recipe
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

CHAPTERS = ("types", "customization", "execmodel", "objects", "specialnames", "formatstrings")
PROMPT, FOLLOWING = 512, 128
GROUP_SIZE = 64


def main() -> None:
    """Measure and write `results/int8-prompts.json`."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    checkpoint, work = map(Path, sys.argv[1:3])
    work.mkdir(exist_ok=True)
    quantized = quantize(checkpoint, work / "w4a16-rtn", "w4a16-rtn")
    bundles = {
        "float": export_once(checkpoint, work / "float"),
        "4 bits": export_once(quantized, work / "4-bits"),
        "4 bits, prompts in int8": export_once(quantized, work / "int8-prompts", int8_prompts=True),
    }
    texts = chapters(bundles["float"])
    logits = {name: following(bundle, texts) for name, bundle in bundles.items()}
    answers = [ids[PROMPT:] for ids in texts]
    figures = {name: compare(found, logits["float"], answers) for name, found in logits.items()}
    figures["prompts in int8 against 4 bits"] = compare(logits["4 bits, prompts in int8"], logits["4 bits"], answers)
    values = {"chapters": CHAPTERS[: len(texts)], "prompt": PROMPT, "following": FOLLOWING, "figures": figures}
    print(write_results("int8-prompts", values).read_text(encoding="utf-8"))


def quantize(checkpoint: Path, out: Path, scheme: str) -> Path:
    if not out.is_dir():
        quantize_checkpoint(checkpoint, out, Recipe(scheme, GROUP_SIZE, lm_head="int8", error_compensation=False))
    return out


def export_once(checkpoint: Path, out: Path, int8_prompts: bool = False) -> Path:
    if out.is_dir():
        return out
    return export_bundle(checkpoint, out, dialects=("onnxruntime",), int8_prompts=int8_prompts)


def chapters(bundle: Path) -> list[list[int]]:
    """Tokens of every chapter that is long enough."""
    tokenizer = tokenizers.Tokenizer.from_file(str(bundle / "tokenizer.json"))
    found = [tokenizer.encode(topics.topics[chapter]).ids[: PROMPT + FOLLOWING] for chapter in CHAPTERS]
    assert all(len(ids) == PROMPT + FOLLOWING for ids in found)
    return found


def following(bundle: Path, texts: list[list[int]]) -> list[np.ndarray]:
    """For each text the logits [FOLLOWING, vocab] after each token behind the prompt."""
    opened = Bundle.open(bundle)
    engine = OnnxRuntimeEngine(opened, capacity=PROMPT + FOLLOWING)
    table, found = opened.embeddings(), []
    for ids in texts:
        engine.cache.reset()
        engine.prefill(np.asarray(table[ids[:PROMPT]], np.float32))
        found.append(engine.score(np.asarray(table[ids[PROMPT:]], np.float32)))
    return found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def perplexity(logits: list[np.ndarray], texts: list[list[int]]) -> float:
    losses = [-log_softmax(one[:-1])[np.arange(len(ids) - 1), ids[1:]] for one, ids in zip(logits, texts, strict=True)]
    return round(float(np.exp(np.concatenate(losses).mean())), 4)


def compare(got: list[np.ndarray], expected: list[np.ndarray], texts: list[list[int]]) -> dict[str, float]:
    """Mean divergence KL(expected || got) in nats, top-1 agreement and perplexity."""
    divergences, same = [], []
    for one, other in zip(got, expected, strict=True):
        p, q = log_softmax(other), log_softmax(one)
        divergences.append((np.exp(p) * (p - q)).sum(-1))
        same.append(one.argmax(-1) == other.argmax(-1))
    return {
        "kl": round(float(np.concatenate(divergences).mean()), 6),
        "top1_agreement": round(float(np.concatenate(same).mean()), 4),
        "perplexity": perplexity(got, texts),
    }


if __name__ == "__main__":
    main()
