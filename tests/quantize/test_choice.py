"""Precision by sensitivity: predictions against measurements, the choice against all choices, kills, limits."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.calibration_data import FLOAT32, write_data
from helpers.killed_runs import contents, run_and_be_killed
from helpers.tiny import write_checkpoint
from internvl_edge.base.errors import EdgeError
from internvl_edge.base.progress import SILENT
from internvl_edge.calibration import DataOptions
from internvl_edge.calibration.block_weights import load_block
from internvl_edge.calibration.blocks import rms_norm
from internvl_edge.calibration.models import Decoder
from internvl_edge.calibration.pipeline import embedded_set
from internvl_edge.calibration.statistics import StatisticsRequest, symmetrize
from internvl_edge.calibration.stream import BlockStream
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.checkpoint.layouts import linear_names
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.linear import W8A8, Scheme
from internvl_edge.quantize import QuantizationReport, quantize_checkpoint, sensitivity
from internvl_edge.quantize.choose import Option, choose_for_cost, choose_for_divergence, lower_hull
from internvl_edge.quantize.folding import SCALE_GROUPS
from internvl_edge.quantize.layer import BlockQuantizer
from internvl_edge.quantize.plan import Choice, units
from internvl_edge.quantize.sensitivity import DecoderSensitivity, probe_samples
from internvl_edge.recipe.recipe import Automatic, DecoderInt8, Recipe

Options = dict[str, list[Option]]

# ---- the choice ----


@st.composite
def menus(draw: Any) -> Options:
    """A few units with a few options each, dearer ones usually better."""
    number = st.integers(1, 60)
    return {
        unit: [Option(f"{n}", draw(number), draw(number) / 10) for n in range(draw(st.integers(1, 4)))]
        for unit in "abcd"[: draw(st.integers(1, 4))]
    }


def total(chosen: dict[str, Option]) -> tuple[float, float]:
    return sum(option.cost for option in chosen.values()), sum(option.divergence for option in chosen.values())


def all_choices(options: Options) -> list[tuple[float, float]]:
    return [total(dict(zip(options, each, strict=True))) for each in product(*options.values())]


@settings(max_examples=150)
@given(options=menus(), share=st.floats(0, 1))
def test_no_choice_of_that_cost_diverges_less(options: Options, share: float) -> None:
    everything = all_choices(options)
    least, most = (edge(cost for cost, _ in everything) for edge in (min, max))
    limit = least + share * (most - least)
    cost, divergence = total(choose_for_cost(options, limit))
    assert cost <= limit + 1e-9
    # What is left over is less than one step, so the choice is the best for the cost that it came to.
    assert divergence <= min(other for price, other in everything if price <= cost) + gap(options)


def gap(options: Options) -> float:
    """The largest divergence that one step removes: what a budget that ends within a step may leave."""
    hulls = [lower_hull(each) for each in options.values()]
    steps = [start.divergence - end.divergence for hull in hulls for start, end in pairwise(hull)]
    return max(steps, default=0.0) + 1e-9


@settings(max_examples=150)
@given(options=menus(), share=st.floats(0, 1))
def test_the_limit_on_divergence_is_kept_at_little_cost(options: Options, share: float) -> None:
    everything = all_choices(options)
    best, worst = (edge(divergence for _, divergence in everything) for edge in (min, max))
    limit = best + share * (worst - best) + 1e-9
    cost, divergence = total(choose_for_divergence(options, limit))
    assert divergence <= limit + 1e-9
    dearest = max(
        (end.cost - start.cost for each in options.values() for start, end in pairwise(lower_hull(each))), default=0.0
    )
    assert cost <= min(price for price, other in everything if other <= limit) + dearest + 1e-9


@settings(max_examples=100)
@given(options=menus())
def test_a_hull_bends_one_way(options: Options) -> None:
    for each in options.values():
        hull = lower_hull(each)
        gains = [(a.divergence - b.divergence) / (b.cost - a.cost) for a, b in pairwise(hull)]
        assert all(gain > 0 for gain in gains)
        assert gains == sorted(gains, reverse=True)


def test_probes_are_evenly_spaced_and_few() -> None:
    assert probe_samples([100] * 10, tokens=10_000) == list(range(10))
    assert probe_samples([100] * 10, tokens=300) == [0, 4, 9]
    assert probe_samples([5000], tokens=300) == [0]


def floats(parts: dict[str, float], costs: dict[str, float], limit: float) -> set[str]:
    """What stays float of int8 linears whose errors may add up to a limit."""
    menus = {
        name: [Option("int8", costs[name], part), Option("float", 2 * costs[name], 0)] for name, part in parts.items()
    }
    return {name for name, option in choose_for_divergence(menus, limit).items() if option.precision == "float"}


def test_floats_are_chosen_by_error_per_cost_and_only_as_many_as_needed() -> None:
    parts = {"small": 2.0, "large": 6.0, "harmless": 0.1, "worst": 20.0}
    costs = {"small": 1.0, "large": 4.0, "harmless": 4.0, "worst": 4.0}
    assert floats(parts, costs, 30) == set()
    assert floats(parts, costs, 9) == {"worst"}
    assert floats(parts, costs, 7) == {"worst", "small"}
    assert floats(parts, costs, 0) == set(parts)


def test_what_turns_out_not_to_be_needed_goes_back() -> None:
    """The cheap one comes first by error per cost, but the dear one alone is enough."""
    assert floats({"cheap": 1.0, "dear": 5.0}, {"cheap": 0.1, "dear": 4.0}, 1.5) == {"dear"}


# ---- sensitivity ----


def measured(checkpoint: Path, tmp_path: Path, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """Predicted and measured divergences of every unit at every precision, over the same samples."""
    source = Checkpoint(checkpoint)
    work = WorkFolder(tmp_path / "work", {})
    options = DataOptions(write_data(tmp_path / "data", count=4), max_tiles=1)
    calibration = embedded_set(work, source, "", options, FLOAT32)
    names = linear_names(source.config, "decoder.layers.")
    quantizers = {
        precision: BlockQuantizer(source, recipe, FLOAT32, torch.float32, dict.fromkeys(names, Choice(precision)))
        for precision in recipe.candidates
        if precision.scheme is not None
    }
    made: dict[tuple[int, str], dict[str, dict[str, Tensor]]] = {}
    found = {}
    measuring = DecoderSensitivity(work, source, calibration, FLOAT32, quantizers)
    predicted = measuring.run(SILENT)

    groups = SCALE_GROUPS[source.config.decoder.architecture]
    decoder = Decoder(source, FLOAT32, calibration)

    def keep(layer: int, statistics: Any) -> None:
        for precision, quantizer in quantizers.items():
            copies = {name: sensitivity._copy(inputs) for name, inputs in statistics.items()}
            block = quantizer.layer(layer, copies)
            prefix = f"decoder.layers.{layer}."
            made[layer, str(precision)] = {g.consumers[0]: quantizer.only_unit(prefix, g, block) for g in groups}

    BlockStream(work, "again", decoder).run(SILENT, "", keep, measuring.wanted)
    lengths, is_image = calibration.lengths, calibration.is_image
    starts = np.concatenate([[0], np.cumsum(lengths)])

    def logits(replaced: dict[int, dict[str, Tensor]]) -> Tensor:
        parts = []
        for sample in range(len(lengths)):
            x = torch.from_numpy(np.array(calibration.embeddings()[starts[sample] : starts[sample + 1]]))
            for layer in range(source.config.decoder.num_hidden_layers):
                weights = load_block(source, f"decoder.layers.{layer}.", FLOAT32) | replaced.get(layer, {})
                x = decoder.run(layer, weights, x, range(sample, sample + 1))
            norm = torch.from_numpy(source.tensor("decoder.norm.weight").astype(np.float32))
            head = torch.from_numpy(source.tensor("decoder.lm_head.weight").astype(np.float32))
            x = rms_norm(x, norm, source.config.decoder.rms_norm_eps)
            parts.append((x @ head.T)[~torch.from_numpy(is_image[starts[sample] : starts[sample + 1]])])
        return torch.cat(parts).double().log_softmax(-1)

    base = logits({})
    for (layer, precision), alone in made.items():
        for first, tensors in alone.items():
            other = logits({layer: tensors})
            unit = found.setdefault(f"decoder.layers.{layer}.{first}", {})
            unit[precision] = float((base.exp() * (base - other)).sum(-1).mean())
    return predicted, found


def test_statistics_do_not_know_the_samples_held_out(tmp_path: Path) -> None:
    source = Checkpoint(write_checkpoint(tmp_path / "checkpoint", dtype="float32"))
    work, options = WorkFolder(tmp_path / "work", {}), DataOptions(write_data(tmp_path / "data"), max_tiles=1)
    calibration = embedded_set(work, source, "", options, FLOAT32)
    run = BlockStream(work, "decoder", Decoder(source, FLOAT32, calibration), held_out=[0, 3, 4])
    found: dict[int, Any] = {}
    wanted = StatisticsRequest(gram=True, tokens=7)
    run.run(SILENT, "", lambda layer, statistics: found.update({layer: statistics}), wanted)
    norm = torch.from_numpy(source.tensor("decoder.layers.0.input_layernorm.weight").astype(np.float32))
    starts = np.concatenate([[0], np.cumsum(calibration.lengths)])
    embeddings = torch.from_numpy(np.array(calibration.embeddings()))
    kept = torch.cat([embeddings[starts[sample] : starts[sample + 1]] for sample in (1, 2, 5)])
    kept = rms_norm(kept, norm, source.config.decoder.rms_norm_eps)
    inputs = found[0]["self_attn.q_proj"]
    assert inputs.count == len(kept)
    torch.testing.assert_close(symmetrize(inputs.gram), kept.T @ kept, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(inputs.subset, kept[np.arange(7) * len(kept) // 7], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [{}, {"text": "internlm2", "bias": True, "num_key_value_heads": 1}, {"text": "qwen3", "head_dim": 24}],
    ids=str,
)
def test_predictions_are_what_is_measured(
    tmp_path: Path, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every unit at 8 bits, with and without int8 inputs, rounded alone."""
    monkeypatch.setattr(sensitivity, "_DRAWS", 64)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="float32", **kind)
    recipe = Recipe("w8a8", automatic=Automatic(max_kl=1, among=("w8a8", "w8a16")))
    predicted, found = measured(checkpoint, tmp_path, recipe)
    assert predicted.keys() == found.keys()
    assert len(found) == 8
    ratios = [predicted[unit][precision] / found[unit][precision] for unit in found for precision in found[unit]]
    assert np.exp(np.abs(np.log(ratios)).max()) < 1.5
    assert 0.85 < np.exp(np.log(ratios).mean()) < 1.15


def test_few_draws_tell_the_grids_of_a_unit_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much finer groups help is known better than how much the unit matters."""
    monkeypatch.setattr(sensitivity, "_DRAWS", 2)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="float32")
    among = ("w4a16-awq-g64", "w4a16-awq-g32", "w8a16")
    predicted, found = measured(checkpoint, tmp_path, mixed(max_kl=9, among=among))
    for finer in among[1:]:
        gains = [
            (found[unit][among[0]] / found[unit][finer]) / (predicted[unit][among[0]] / predicted[unit][finer])
            for unit in found
        ]
        assert np.exp(np.abs(np.log(gains)).mean()) < 1.15, finer


# ---- from recipe to checkpoint ----


def quantize(checkpoint: Path, out: Path, recipe: Recipe) -> QuantizationReport:
    data = checkpoint.parent / "data"
    if not data.exists():
        write_data(data, count=3)
    options = DataOptions(data / "data.jsonl", max_tiles=1)
    return quantize_checkpoint(checkpoint, out, recipe, data=options, compute=FLOAT32)


INT4 = Scheme(4, 64, symmetric=True)


def mixed(**limits: Any) -> Recipe:
    return Recipe(group_size=64, symmetric=True, automatic=Automatic(**limits))


def test_more_bits_are_predicted_to_diverge_less_and_reasons_say_so(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", text="internlm2")
    reports = {bits: quantize(checkpoint, tmp_path / f"{bits}", mixed(target_bits=bits)) for bits in (4.3, 5.0, 7.0)}
    predictions = []
    for bits, report in reports.items():
        assert report.record.bits_per_weight <= bits
        assert report.record.predicted_kl is not None
        parts = [linear.part for linear in report.record.linears if linear.part is not None]
        assert sum(parts) == pytest.approx(report.record.predicted_kl)
        predictions.append(report.record.predicted_kl)
        facts = {linear.name: linear for linear in report.record.linears}
        schemes = Checkpoint(report.folder).schemes
        for unit in units(Checkpoint(checkpoint)):
            assert len({facts[name].scheme for name in unit}) == 1  # what programs fuse stays together
            assert all(facts[name].reason.startswith("adds ") for name in unit)
            assert {schemes[name] for name in unit if name in schemes} <= {facts[name].scheme for name in unit}
    assert predictions == sorted(predictions, reverse=True)
    assert reports[7.0].record.bits_per_weight > 6.5
    better = [linear for linear in reports[5.0].record.linears if linear.scheme != INT4]
    assert better
    assert all("w4a16-awq-g64 would add" in linear.reason for linear in better)


def test_a_limit_on_divergence_is_kept_with_fewer_bits_than_all(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    uniform = quantize(checkpoint, tmp_path / "low", mixed(target_bits=4.25)).record.predicted_kl
    assert uniform is not None
    report = quantize(checkpoint, tmp_path / "half", mixed(max_kl=uniform / 2))
    assert report.record.predicted_kl is not None
    assert report.record.predicted_kl <= uniform / 2
    assert 4.25 < report.record.bits_per_weight < 8


def test_patterns_come_before_the_choice(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    recipe = Recipe(
        group_size=64, layers=(("layers.0.self_attn.*", "fp"), ("*.gate_proj", "w8a16")), automatic=Automatic(max_kl=9)
    )
    facts = {linear.name: linear for linear in quantize(checkpoint, tmp_path / "out", recipe).record.linears}
    assert facts["decoder.layers.0.self_attn.q_proj"].stored == "bfloat16"
    assert facts["decoder.layers.1.mlp.gate_proj"].reason == "matches *.gate_proj"
    assert facts["decoder.layers.1.mlp.up_proj"].stored.startswith("int4")  # the recipe's own, its partner is fixed
    assert facts["decoder.layers.1.self_attn.q_proj"].reason.startswith("adds ")


def test_int8_inputs_go_where_they_harm_least(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    recipe = Recipe("w8a8", decoder_int8=DecoderInt8(max_kl=0.002))
    report = quantize(checkpoint, tmp_path / "out", recipe)
    kinds = {linear.scheme == W8A8 for linear in report.record.linears}
    assert kinds == {True, False}
    assert report.record.predicted_kl is not None
    assert report.record.predicted_kl <= 0.002


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"target_bits": 4.1}, r"at least 4\.250 bits per weight .* --target-bits asks for 4\.1"),
        ({"max_kl": 1e-9, "among": ("w4a16-awq", "w8a16")}, "let it choose fp as well"),
    ],
)
def test_limits_that_cannot_be_met_say_what_can(tmp_path: Path, limits: dict[str, Any], message: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(EdgeError, match=message):
        quantize(checkpoint, tmp_path / "out", mixed(**limits))
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from internvl_edge.calibration import DataOptions, choose_compute
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.quantize.layer import BlockQuantizer
from internvl_edge.recipe.recipe import Automatic, Recipe
moment, checkpoint, data, out = sys.argv[1:]
at = {
    "candidates": ("decoder-float.json", {"blocks": 2}),
    "back": ("decoder-float-back.json", 1),
    "measured": ("decoder-float-back.json", 0),
    "quantized": ("decoder.json", {"blocks": 1}),
}[moment]
write_json = WorkFolder.write_json

def kill(self, name, values):
    if name == at[0] and at[1] in (None, values, values.get("left") if isinstance(values, dict) else 0):
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(self, name, values)

WorkFolder.write_json = kill
recipe = Recipe(group_size=64, symmetric=True, automatic=Automatic(target_bits=5.0))
options = DataOptions(Path(data) / "data.jsonl", max_tiles=1)
quantize_checkpoint(checkpoint, out, recipe, data=options, compute=choose_compute("cpu", "float32"))
"""


@pytest.mark.slow
def test_a_killed_choice_continues_to_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", text="internlm2")
    whole = quantize(checkpoint, tmp_path / "whole", mixed(target_bits=5.0))
    for moment in ("candidates", "back", "measured", "quantized"):  # each run continues the one killed before
        run_and_be_killed(KILLED, moment, checkpoint, tmp_path / "data", tmp_path / "killed")
        assert not (tmp_path / "killed").exists()
    report = quantize(checkpoint, tmp_path / "killed", mixed(target_bits=5.0))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert report.record.linears == whole.record.linears
    assert not (tmp_path / "killed.partial").exists()
