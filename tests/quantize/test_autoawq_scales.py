"""Our scales beside those of autoawq 0.2.9 for the same tiny Qwen2 and tokens (tests/data/make_scale_fixtures.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.linears import ASYMMETRIC, kind, nearest, observed, output_error
from helpers.repository import REPOSITORY
from internvl_edge.calibration.blocks import decoder_block
from internvl_edge.model.config import DecoderConfig, RopeConfig
from internvl_edge.model.rope import RotaryAngles
from internvl_edge.quantize.awq import search_scale
from internvl_edge.quantize.folding import SCALE_GROUPS, ScaleGroup

DECODER = DecoderConfig(
    architecture="qwen2",
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    intermediate_size=128,
    vocab_size=64,
    rms_norm_eps=1e-6,
    max_position_embeddings=48,
    rope=RopeConfig(1e6),
    qkv_bias=True,
    output_bias=False,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    with np.load(REPOSITORY / "tests" / "data" / "scales.npz") as file:
        return {name: torch.from_numpy(file[name].astype(np.float32)) for name in file.files}


@pytest.fixture(scope="module")
def layers(stored: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Each layer's weights and the inputs of its linears, all in floats."""
    sequences, length, _ = stored["embeds"].shape
    angles = RotaryAngles(DECODER).at(0, length, length)
    rotary = tuple(torch.from_numpy(np.tile(part, (sequences, 1))) for part in angles)
    x = stored["embeds"].flatten(0, 1)
    found = []
    for layer in range(DECODER.num_hidden_layers):
        prefix = f"layers.{layer}."
        weights = {name.removeprefix(prefix): w for name, w in stored.items() if name.startswith(prefix)}
        inputs: dict[str, Tensor] = {}
        x = decoder_block(weights, x, [length] * sequences, (rotary[0], rotary[1]), DECODER, inputs.__setitem__)
        found.append((weights, inputs))
    return found


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("group", SCALE_GROUPS["qwen2"], ids=lambda group: group.producer)
def test_our_scales_leave_no_more_error_than_autoawqs(
    layer: int,
    group: ScaleGroup,
    stored: dict[str, Tensor],
    layers: list[tuple[dict[str, Tensor], dict[str, Tensor]]],
) -> None:
    weights, inputs = layers[layer]
    x = inputs[group.consumers[0]]
    consumers = [weights[f"{name}.weight"] for name in group.consumers]

    def error(scale: Tensor) -> float:
        return sum(len(w) * output_error(x, w, nearest(w * scale, ASYMMETRIC) / scale) for w in consumers)

    ours = error(search_scale(consumers, observed(x), [kind(ASYMMETRIC)] * len(consumers)))
    theirs = error(stored[f"scale/{layer}.{group.producer}"])
    assert ours <= theirs * 1.001  # where both choose the same power, theirs has an epsilon more
