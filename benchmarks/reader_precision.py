"""Mixed precision against uniform on the demo reader, at equal bits per weight, and learned rounding against computed.

    python benchmarks/reader_precision.py CHECKPOINT WORK

Calibration is the built-in set with seed 0; divergences are measured over samples of seed 1, at every token that is not
an image's, with the float tower's image tokens: nothing but the decoder's layers differs. Weights, and inputs where
these are rounded too, go through one float32 forward. WORK keeps what was made. Results:
results/reader-precision-LAYOUT.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from record import write_results
from smollm_forward import figures_of, read_weights

from internvl_edge.calibration import DataOptions, choose_compute
from internvl_edge.calibration.blocks import decoder_block, no_observer, rms_norm
from internvl_edge.calibration.dataset import TOKENS, CalibrationSet
from internvl_edge.calibration.pipeline import embedded_set
from internvl_edge.calibration.work import WorkFolder, checkpoint_identity
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.evaluation.divergence import Divergence, divergence
from internvl_edge.model.rope import RotaryAngles
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.files import make_recipe

_SYMMETRIC = {"decoder": "w4a16-awq", "group_size": 64, "symmetric": True}
_ASYMMETRIC = _SYMMETRIC | {"symmetric": False}
_NEGATIVE = _SYMMETRIC | {"negative_scales": True}
_LEARNED = {"rounding": "learned"}
ROWS: dict[str, dict[str, Any]] = {
    "symmetric, groups of 64": _SYMMETRIC,
    "symmetric, groups of 64, learned": _SYMMETRIC | _LEARNED,
    "negative scales, groups of 64": _NEGATIVE,
    "negative scales, groups of 64, learned": _NEGATIVE | _LEARNED,
    "symmetric, groups of 32": _SYMMETRIC | {"group_size": 32},
    "symmetric, mixed 4.5": _SYMMETRIC | {"automatic": {"target_bits": 4.5}},
    "zero points, groups of 64": _ASYMMETRIC,
    "zero points, groups of 64, learned": _ASYMMETRIC | _LEARNED,
    "zero points, groups of 32": _ASYMMETRIC | {"group_size": 32},
    "zero points, groups of 32, learned": _ASYMMETRIC | {"group_size": 32} | _LEARNED,
    "zero points, mixed 4.625": _ASYMMETRIC | {"automatic": {"target_bits": 4.625}},
    "zero points, mixed 4.625, learned": _ASYMMETRIC | {"automatic": {"target_bits": 4.625}} | _LEARNED,
    "w8a16": {"decoder": "w8a16"},
    "w8a16, rounded": {"decoder": "w8a16", "error_compensation": False},
    "w8a8": {"decoder": "w8a8"},
    "w8a8, all": {"decoder": "w8a8", "decoder_int8": {"max_kl": 0.0}},
}
SAMPLES = {"calibration": 48, "test": 256}


def logits(weights: dict[str, torch.Tensor], checkpoint: Checkpoint, test: CalibrationSet) -> Iterator[np.ndarray]:
    """Of each sample [tokens, vocab] float32."""
    decoder, angles = checkpoint.config.decoder, RotaryAngles(checkpoint.config.decoder)
    starts = np.concatenate([[0], np.cumsum(test.lengths)])
    for start, length in zip(starts[:-1], test.lengths, strict=True):
        x = torch.from_numpy(np.array(test.embeddings()[start : start + length]))
        cos, sin = (torch.from_numpy(table) for table in angles.at(0, length, length))
        for layer in range(decoder.num_hidden_layers):
            prefix = f"layers.{layer}."
            block = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            x = decoder_block(block, x, [length], (cos, sin), decoder, no_observer)
        x = rms_norm(x, weights["norm.weight"], decoder.rms_norm_eps)
        yield (x @ weights["lm_head.weight"].T).numpy()


@torch.no_grad()
def compare(source: Checkpoint, weights: dict[str, torch.Tensor], test: CalibrationSet) -> list[Divergence]:
    """The divergence of each sample from the float model, tokens of images left out."""
    tokens, is_image = np.load(test.folder / TOKENS), test.is_image
    floats = read_weights(source.folder, source.config.decoder.vocab_size)
    parts, start = [], 0
    for expected, found in zip(logits(floats, source, test), logits(weights, source, test), strict=True):
        rows = np.flatnonzero(~is_image[start : start + len(expected) - 1])
        parts.append(divergence(expected[rows], found[rows], tokens[start : start + len(expected)][rows + 1]))
        start += len(expected)
    return parts


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("work", type=click.Path(path_type=Path))
def main(checkpoint: Path, work: Path) -> None:
    """Measure all rows and write the results."""
    source, compute = Checkpoint(checkpoint), choose_compute("cpu", "float32")
    layout = source.config.decoder.architecture
    options = {name: DataOptions(samples=SAMPLES[name], seed=seed) for seed, name in enumerate(SAMPLES)}
    folder = WorkFolder(work / "test", {"samples": SAMPLES["test"]})
    test = embedded_set(folder, source, checkpoint_identity(checkpoint), options["test"], compute)
    rows = []
    for name, fields in ROWS.items():
        out = work / name.replace(" ", "-").replace(",", "")
        said = out.with_name(f"{out.name}.json")
        if not said.exists():
            recipe = make_recipe(fields)
            data = options["calibration"] if recipe.needs_data else None
            report = quantize_checkpoint(checkpoint, out, recipe, data=data, compute=compute)
            facts = {"bits_per_weight": report.record.bits_per_weight, "predicted_kl": report.record.predicted_kl}
            said.write_text(json.dumps(facts), encoding="utf-8")
        figures = figures_of(compare(source, read_weights(out, source.config.decoder.vocab_size), test))
        rows.append({"name": name, "recipe": fields, **json.loads(said.read_text(encoding="utf-8")), **figures})
        click.echo(f"{name:28} {rows[-1]['bits_per_weight']:.3f} bits, KL {figures['kl_mean']:.5f}")
    tokens = int((~test.is_image).sum())
    write_results(f"reader-precision-{layout}", {"samples": SAMPLES, "test_tokens": tokens, "results": rows})


if __name__ == "__main__":
    main()
