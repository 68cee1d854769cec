"""The parts of the quantizer, on numbers made for them: scales, folding, clipping, compensation, grids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.calibration_data import FLOAT32, write_data
from helpers.linears import ASYMMETRIC, SYMMETRIC, kind, nearest, observed, output_error
from helpers.reference import Reference
from helpers.reference_names import text_name
from helpers.tiny import write_checkpoint
from internvl_edge.base.progress import SILENT
from internvl_edge.calibration.dataset import DataOptions
from internvl_edge.calibration.models import Decoder
from internvl_edge.calibration.pipeline import embedded_set
from internvl_edge.calibration.statistics import StatisticsRequest
from internvl_edge.calibration.stream import BlockStream
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.linear import PackedLinear, Scheme
from internvl_edge.quantize import layer as layer_module
from internvl_edge.quantize.awq import search_scale
from internvl_edge.quantize.folding import storable_scale
from internvl_edge.quantize.layer import BlockQuantizer
from internvl_edge.quantize.plan import plan_decoder
from internvl_edge.quantize.rounding import (
    Grid,
    block_gram,
    compensated_rounding,
    feedback_factor,
    minmax_grid,
    search_clipping,
)
from internvl_edge.recipe.recipe import Recipe

SCHEMES = pytest.mark.parametrize("scheme", [ASYMMETRIC, SYMMETRIC], ids=str)


def outlier_inputs(tokens: int = 400, width: int = 64) -> Tensor:
    """Activations as language models have them: a few channels many times larger than the rest, and correlated."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
    x = torch.randn(tokens, width, generator=generator) @ mixing
    x[:, [3, 17, 40]] *= 30
    return x


def weights(out: int = 48, width: int = 64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=generator) * 0.1


# ---- scales ----


@SCHEMES
def test_scales_from_activations_beat_rounding_on_outliers(scheme: Scheme) -> None:
    x, weight = outlier_inputs(), weights()
    scale = search_scale([weight], observed(x), [kind(scheme)])
    scaled = nearest(weight * scale, scheme) / scale
    plain = output_error(x, weight, nearest(weight, scheme))
    assert output_error(x, weight, scaled) < 0.5 * plain


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), outlier=st.sampled_from([1.0, 5.0, 100.0]))
def test_a_scale_is_never_worse_than_none(seed: int, outlier: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(80, 64, generator=generator)
    x[:, seed % 64] *= outlier
    pair = [weights(24, seed=seed), weights(16, seed=seed + 1)]
    scale = search_scale(pair, observed(x), [kind(ASYMMETRIC)] * 2)
    found = sum(len(w) * output_error(x, w, nearest(w * scale, ASYMMETRIC) / scale) for w in pair)
    plain = sum(len(w) * output_error(x, w, nearest(w, ASYMMETRIC)) for w in pair)
    assert found <= plain * (1 + 1e-5)


def test_the_token_subset_and_the_gram_matrix_choose_the_same_scale() -> None:
    x, weight = outlier_inputs(), weights()
    exact = search_scale([weight], observed(x, StatisticsRequest(gram=True)), [kind(ASYMMETRIC)])
    subset = search_scale([weight], observed(x, StatisticsRequest(tokens=len(x))), [kind(ASYMMETRIC)])
    torch.testing.assert_close(exact, subset)


# ---- folding ----


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    spread=st.floats(0.1, 3.0),
)
@example(seed=189, dtype=torch.float16, spread=2.75)  # a quotient below float16's normal numbers
def test_a_storable_scale_divides_the_stored_vector_exactly(seed: int, dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(32, generator=generator).to(dtype)
    vector[5] = 0
    wanted = torch.exp(spread * torch.randn(32, generator=generator))
    scale, divided = storable_scale(wanted, vector)
    assert divided is not None
    torch.testing.assert_close(divided.double() * scale.double(), vector.double(), rtol=2e-7, atol=0)
    # The quotient is rounded to its type, so the scale moves by that much; subnormal quotients have fewer digits.
    normal = (divided.abs() >= torch.finfo(dtype).tiny) | (vector == 0)
    assert normal.sum() > 24
    torch.testing.assert_close(scale[normal], wanted[normal], rtol=2**-7, atol=0)


class ExactGrid(Grid):
    """Represents every weight."""

    def round(self, weight: Tensor) -> Tensor:
        return weight

    def dequantize(self, q: Tensor) -> Tensor:
        return q

    def pack(self, q: Tensor, bias: Any = None) -> PackedLinear:
        values: Any = q.numpy()
        return PackedLinear(values, np.ones((len(values), 1), np.float32), None, bits=4)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"num_key_value_heads": 4},
        {"text": "internlm2"},
        {"text": "internlm2", "bias": True, "num_key_value_heads": 1},
        {"layout": "native", "text": "llama"},
        {"text": "qwen3", "head_dim": 24, "num_key_value_heads": 1},
        {"text": "qwen3", "head_dim": 32, "bias": True, "layout": "native_prefixed"},
    ],
    ids=str,
)
def test_folding_scales_leaves_the_logits_as_they_were(
    tmp_path: Path, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", **kind)
    monkeypatch.setattr(
        layer_module, "search_clipping", lambda rows, *_: ExactGrid(ASYMMETRIC, torch.ones(1), torch.zeros(1))
    )
    decoder, source = decoder_pass(tmp_path, folder)
    recipe = Recipe(group_size=32, error_compensation=False, lm_head="int4")
    quantizer = BlockQuantizer(source, recipe, FLOAT32, torch.float16, plan_decoder(source, recipe))
    scaled = Reference(folder, torch.float64)
    changed: list[float] = []

    def fold(number: int | None, statistics: Any) -> None:
        block = quantizer.head(statistics) if number is None else quantizer.layer(number, statistics)
        tensors = {f"{name}.weight": packed.dequantize() for name, packed in block.linears.items()}
        for name, array in (tensors | block.tensors).items():
            old = scaled.weights[text_name(name)]
            scaled.weights[text_name(name)] = torch.from_numpy(np.asarray(array, np.float64))
            changed.append(float((scaled.weights[text_name(name)] / old - 1).abs().nanmedian()))

    decoder.run(SILENT, "", fold, quantizer.wanted)
    assert isinstance(decoder.blocks, Decoder)
    fold(None, decoder.observe_output("lm_head", decoder.blocks.normed, quantizer.wanted))
    assert np.mean([change > 0.01 for change in changed]) > 0.8  # scales were applied nearly everywhere
    ids = list(range(40, 90))
    torch.testing.assert_close(scaled.logits(ids), Reference(folder, torch.float64).logits(ids), rtol=1e-4, atol=2e-5)


def decoder_pass(
    tmp_path: Path, folder: Path, data: Path | None = None, name: str = "work"
) -> tuple[BlockStream, Checkpoint]:
    source = Checkpoint(folder)
    options = DataOptions(data or write_data(tmp_path / "data"), max_tiles=2)
    work = WorkFolder(tmp_path / name, {})
    calibration = embedded_set(work, source, "", options, FLOAT32)
    return BlockStream(work, "decoder", Decoder(source, FLOAT32, calibration)), source


def test_image_tokens_change_the_chosen_scales(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    projector = load_file(folder / "model.safetensors")
    for part in ("weight", "bias"):
        projector[f"mlp1.3.{part}"][7] *= 30  # a channel that is loud in pictures and not in text
    save_file(projector, folder / "model.safetensors")
    with_images = write_data(tmp_path / "data")
    without_images = tmp_path / "text.jsonl"
    lines = [json.loads(line) | {"images": []} for line in with_images.read_text().splitlines()]
    without_images.write_text("\n".join(map(json.dumps, lines)))
    chosen = {}
    for name, data in (("with", with_images), ("without", without_images)):
        decoder, source = decoder_pass(tmp_path, folder, data, name)
        recipe = Recipe(group_size=32)
        quantizer = BlockQuantizer(source, recipe, FLOAT32, torch.float16, plan_decoder(source, recipe))
        blocks: list[Any] = []
        decoder.run(SILENT, "", lambda n, s, q=quantizer, b=blocks: b.append(q.layer(n, s)), quantizer.wanted)
        chosen[name] = blocks[0].tensors["decoder.layers.0.input_layernorm.weight"].astype(np.float32)
    assert np.abs(chosen["with"] / chosen["without"] - 1).max() > 0.1


# ---- clipping and compensation ----


@SCHEMES
def test_clipping_lowers_the_output_error(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = weights() * torch.exp(torch.randn(48, 64, generator=generator))  # heavy tails
    x = outlier_inputs()
    blocks = block_gram(observed(x), torch.ones(64), 32)
    grid = search_clipping(weight, blocks, kind(scheme))
    clipped = output_error(x, weight, grid.dequantize(grid.round(weight)))
    assert clipped < output_error(x, weight, nearest(weight, scheme))


@SCHEMES
def test_compensation_lowers_the_output_error(scheme: Scheme) -> None:
    x, weight = outlier_inputs(), weights()
    grid = minmax_grid(weight, kind(scheme))
    q = compensated_rounding(weight, grid, *feedback_factor(x.T @ x, len(x)))
    assert torch.equal(q, q.round())
    assert grid.limits[0] <= int(q.min()) <= int(q.max()) <= grid.limits[1]
    assert output_error(x, weight, grid.dequantize(q)) < 0.7 * output_error(x, weight, nearest(weight, scheme))


def test_compensation_survives_dead_and_repeated_channels() -> None:
    x, weight = outlier_inputs(), weights()
    x[:, 7], x[:, 8] = 0, x[:, 9]
    grid = minmax_grid(weight, kind(ASYMMETRIC))
    q = compensated_rounding(weight, grid, *feedback_factor(x.T @ x, len(x)))
    assert torch.isfinite(q).all()
    assert output_error(x, weight, grid.dequantize(q)) < output_error(x, weight, nearest(weight, ASYMMETRIC))


def test_compensation_from_few_tokens_helps_tokens_that_it_has_not_seen() -> None:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(96, 96, generator=generator)
    weight = weights(48, 96)
    grid = minmax_grid(weight, kind(Scheme(4, 32, False)))
    unseen = torch.randn(4096, 96, generator=generator) @ mixing.T
    rounded = output_error(unseen, weight, grid.dequantize(grid.round(weight)))
    errors = []
    for tokens in (48, 4096):
        x = torch.randn(tokens, 96, generator=generator) @ mixing.T
        q = compensated_rounding(weight, grid, *feedback_factor(x.T @ x, tokens))
        errors.append(output_error(unseen, weight, grid.dequantize(q)))
    few, many = errors
    assert many < 0.8 * rounded
    assert few < 0.97 * rounded


# ---- grids ----


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), shift=st.floats(-2, 2), scheme=st.sampled_from([ASYMMETRIC, SYMMETRIC]))
def test_rounding_stays_within_half_a_step_and_keeps_zero(seed: int, shift: float, scheme: Scheme) -> None:
    weight = weights(8, 64, seed) + shift
    weight[0], weight[1, :32] = 0, 1e-9
    grid = minmax_grid(weight, kind(scheme))
    error = (grid.dequantize(grid.round(weight)) - weight).abs().reshape(8, 2, 32)
    # The zero point is rounded too, so the ends of a range may be half a step further away.
    allowed = 0.5 if scheme.symmetric else 1.0
    assert (error <= grid.scale[..., None] * allowed * 1.01 + 2e-3 * weight.abs().max()).all()
    assert (grid.dequantize(grid.round(torch.zeros(8, 64))) == 0).all()


def test_a_negative_scale_puts_the_lowest_integer_on_the_side_of_the_largest_weight() -> None:
    weight = weights()
    grid = minmax_grid(weight, kind(SYMMETRIC, negative=True))
    grouped = weight.reshape(48, -1, 32)
    places = grouped.abs().argmax(-1, keepdim=True)
    largest = grouped.gather(-1, places)[..., 0]
    lowest = grid.round(weight).reshape(grouped.shape).gather(-1, places)
    assert torch.equal(grid.scale.sign(), -largest.sign())
    assert {*grid.scale.sign().unique().tolist()} == {-1.0, 1.0}
    assert lowest.unique().tolist() == [-8]
    torch.testing.assert_close(-8 * grid.scale, largest, rtol=1e-3, atol=0)


def test_negative_scales_round_less_with_and_without_clipping() -> None:
    x, weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(6)), weights()
    blocks = block_gram(observed(x), torch.ones(64), 32)
    errors = {}
    for negative in (False, True):
        for name, grid in {
            "spanning": minmax_grid(weight, kind(SYMMETRIC, negative)),
            "clipped": search_clipping(weight, blocks, kind(SYMMETRIC, negative)),
        }.items():
            errors[name, negative] = output_error(x, weight, grid.dequantize(grid.round(weight)))
    assert errors["spanning", True] < 0.95 * errors["spanning", False]
    assert errors["clipped", True] < 0.95 * errors["clipped", False]
    assert errors["clipped", True] < errors["spanning", True]


@SCHEMES
def test_integers_fit_the_scales_as_they_are_stored(scheme: Scheme) -> None:
    weight = weights()
    grid = minmax_grid(weight, kind(scheme))
    packed = grid.pack(grid.round(weight))
    stored = replace(packed, scale=packed.scale.astype(np.float16).astype(np.float32))
    assert np.array_equal(stored.dequantize(), grid.dequantize(grid.round(weight)).numpy())
