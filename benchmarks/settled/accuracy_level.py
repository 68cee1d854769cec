"""What rounding activations to int8 (MatMulNBits accuracy level 4) costs on a real language model, and what it saves.

    python benchmarks/smollm_checkpoint.py CHECKPOINT --layout internlm2
    python benchmarks/settled/accuracy_level.py CHECKPOINT WORK

SmolLM2-135M, rounded to nearest in groups of 64, on chapters of Python's manual. Divergence, agreement and perplexity
of each level are against float weights; the weights were 4-bit in groups of 32 before, so the float model is not the
original's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data import topics
from typing import Any

import _path  # noqa: F401
import numpy as np
from int8_prompts import GROUP_SIZE, compare, perplexity, quantize
from record import write_results

CHAPTERS = ("types", "customization", "execmodel")
TOKENS = 384
LEVELS = (1, 4)


def main() -> None:
    """Measure and write `results/accuracy-level.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    plain = bundle_of(arguments.checkpoint, arguments.work / "float", None)
    expected, texts = logits_of(plain), prompts(plain)
    figures: dict[str, Any] = {"float": {"perplexity": perplexity(expected, texts)}}
    for scheme in ("w4a16-rtn", "w8a16"):
        quantized = quantize(arguments.checkpoint, arguments.work / scheme, scheme)
        for level in LEVELS:
            bundle = bundle_of(quantized, arguments.work / f"{scheme}-{level}", level)
            for dialect in ("onnxruntime", "standard"):
                got = logits_of(bundle, dialect, level)
                figures[f"{scheme}, level {level}, {dialect}"] = compare(got, expected, texts)
    values = {"group_size": GROUP_SIZE, "chapters": CHAPTERS, "tokens_each": TOKENS, "figures": figures}
    print(write_results("accuracy-level", values).read_text())


def bundle_of(checkpoint: Path, out: Path, level: int | None) -> Path:
    from internvl_edge import export_bundle
    from internvl_edge.export import quantized as quantized

    if out.is_dir():
        return out
    before = quantized._ACCURACY_LEVEL
    quantized._ACCURACY_LEVEL = level or before
    try:
        return export_bundle(checkpoint, out)
    finally:
        quantized._ACCURACY_LEVEL = before


def prompts(bundle: Path) -> list[list[int]]:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(bundle / "tokenizer.json"))
    return [tokenizer.encode(topics.topics[chapter]).ids[:TOKENS] for chapter in CHAPTERS]


def logits_of(bundle: Path, dialect: str = "onnxruntime", level: int = 4) -> list[np.ndarray]:
    """For each chapter [tokens, vocab]."""
    from internvl_edge.bundle.bundle import Bundle
    from internvl_edge.runtime.engines import onnxruntime

    onnxruntime._CONFIG["session.qdq_matmulnbits_accuracy_level"] = str(level)
    opened = Bundle.open(bundle)
    engine = onnxruntime.OnnxRuntimeEngine(opened, dialect=dialect, capacity=TOKENS)
    table, logits = opened.embeddings(), []
    for ids in prompts(bundle):
        engine.cache.reset()
        logits.append(engine.score(np.asarray(table[ids], np.float32)))
    return logits


if __name__ == "__main__":
    main()
