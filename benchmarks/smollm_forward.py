"""SmolLM2's decoder in float32 over given weights, and how far its predictions are from the unquantized model's.

One forward for every method, so that only weights differ, and inputs where these are rounded too. Weights come from a
checkpoint of this project (either layout, quantized or not), or from a folder under Llama's names: plain tensors, or
packed as AutoAWQ does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from smollm_text import Sequence
from torch import Tensor

from internvl_edge.calibration.blocks import decoder_block, rms_norm
from internvl_edge.calibration.compute import to_torch
from internvl_edge.checkpoint.codecs import autoawq
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.tensor_files import open_tensor_files
from internvl_edge.evaluation.divergence import Divergence, divergence, summarize
from internvl_edge.model.config import DecoderConfig
from internvl_edge.model.rope import RotaryAngles
from internvl_edge.quantize.block import computed

Weights = dict[str, Tensor]
# Draws of the bootstrap.
_DRAWS = 10_000
_EMBED, _HEAD = "embed_tokens.weight", "lm_head.weight"


def read_weights(folder: Path, vocabulary: int) -> Weights:
    """Float32 tensors by their name below `decoder.`, the first `vocabulary` rows of the token tables."""
    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8"))["model_type"] == "internvl_chat":
        checkpoint = Checkpoint(folder)
        names = [name for name in checkpoint.shapes if name.startswith("decoder.")]
        weights = {name.removeprefix("decoder."): to_torch(checkpoint.tensor(name)).float() for name in names}
        weights |= _int8_inputs(checkpoint)
    else:
        weights = _llama_names(folder)
    weights.setdefault(_HEAD, weights[_EMBED])
    return weights | {name: weights[name][:vocabulary] for name in (_EMBED, _HEAD)}


def _int8_inputs(checkpoint: Checkpoint) -> Weights:
    """Linears whose inputs are rounded too, as `calibration.blocks.linear` computes them."""
    found: Weights = {}
    for name, scheme in checkpoint.schemes.items():
        if scheme.static_inputs and name.startswith("decoder."):
            packed = checkpoint.linear(name)
            assert packed is not None
            parts = computed(packed, torch.float32).items()
            found |= {f"{name.removeprefix('decoder.')}.{part}": tensor for part, tensor in parts}
    return found


def _llama_names(folder: Path) -> Weights:
    weights, stored = {}, open_tensor_files(folder)
    for name, tensor in stored.items():
        module, _, kind = name.removeprefix("model.").rpartition(".")
        if kind == "qweight":
            parts = [stored[name.replace("qweight", part)].read() for part in ("qweight", "qzeros", "scales")]
            weights[f"{module}.weight"] = torch.from_numpy(autoawq.unpack(*parts).dequantize())
        elif kind == "weight":
            weights[f"{module}.weight"] = to_torch(tensor.read()).float()
    return weights


@torch.no_grad()
def logits(weights: Weights, sequences: list[Sequence], decoder: DecoderConfig) -> list[Tensor]:
    """Of each sequence float32 [len(ids) - 1 - start, vocab]: predictions of ids[start + 1] and all that follow."""
    lengths = [len(sequence.ids) for sequence in sequences]
    ids = torch.tensor([token for sequence in sequences for token in sequence.ids])
    angles = RotaryAngles(decoder)
    tables = [angles.at(0, length, length) for length in lengths]
    rotary = tuple(torch.from_numpy(np.concatenate([table[part] for table in tables])) for part in (0, 1))
    x = weights[_EMBED][ids].float()
    for layer in range(decoder.num_hidden_layers):
        prefix = f"layers.{layer}."
        block = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        x = decoder_block(block, x, lengths, (rotary[0], rotary[1]), decoder, lambda name, value: None)
    x = rms_norm(x, weights["norm.weight"], decoder.rms_norm_eps)
    parts = torch.split(x, lengths)
    return [
        F.linear(part[sequence.start : -1], weights[_HEAD]) for part, sequence in zip(parts, sequences, strict=True)
    ]


def write_logits(path: Path, weights: Weights, test: list[Sequence], decoder: DecoderConfig) -> None:
    """All logits of the test sequences, one behind the other, as `.npy`: the reference is computed once."""
    positions = sum(len(sequence.ids) - 1 - sequence.start for sequence in test)
    new = path.with_suffix(".new")
    out = np.lib.format.open_memmap(new, "w+", np.float32, (positions, len(weights[_HEAD])))
    start = 0
    for few in _few(test):
        for part in logits(weights, few, decoder):
            out[start : start + len(part)] = part.numpy()
            start += len(part)
    out.flush()
    new.replace(path)


def compare(reference: Path, weights: Weights, test: list[Sequence], decoder: DecoderConfig) -> list[Divergence]:
    """The divergence of each test sequence from the logits that `write_logits` wrote."""
    expected = np.load(reference, mmap_mode="r")
    found: list[Divergence] = []
    start = 0
    for few in _few(test):
        for sequence, part in zip(few, logits(weights, few, decoder), strict=True):
            rows = np.array(expected[start : start + len(part)])
            found.append(divergence(rows, part.numpy(), sequence.ids[sequence.start + 1 :]))
            start += len(part)
    return found


def figures_of(parts: list[Divergence]) -> dict[str, float]:
    """Divergences over all sequences, for a file of results."""
    return {name: float(f"{value:.6g}") for name, value in asdict(summarize(parts)).items()}


def ratio(
    ours: list[Divergence], theirs: list[Divergence], of: Callable[[NDArray[np.float64]], float]
) -> dict[str, float]:
    """A figure of one method over that of another, with the 95 % interval of other test sequences of the same kind.

    Both methods saw the same sequences, so each of the bootstrap's draws takes the same ones of both.
    """
    pairs = [(one.kl, other.kl) for one, other in zip(ours, theirs, strict=True)]
    generator = np.random.default_rng(0)

    def found(chosen: Iterable[int]) -> float:
        one, other = (np.concatenate(part) for part in zip(*(pairs[index] for index in chosen), strict=True))
        return of(one) / of(other)

    draws = [found(generator.integers(0, len(pairs), len(pairs))) for _ in range(_DRAWS)]
    low, high = np.quantile(draws, (0.025, 0.975))
    values = {"ratio": found(range(len(pairs))), "low": float(low), "high": float(high)}
    return {name: float(f"{value:.3g}") for name, value in values.items()}


def _few(test: list[Sequence]) -> list[list[Sequence]]:
    """A few sequences at a time: logits of all of them would be gigabytes."""
    return [test[start : start + 4] for start in range(0, len(test), 4)]
