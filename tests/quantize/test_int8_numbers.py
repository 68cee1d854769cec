"""The parts of an int8 tower, each alone: ranges, smoothing, the chosen layer, its product in a graph, the fallback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.linears import observed
from internvl_edge.base.errors import CheckpointError, EdgeError
from internvl_edge.checkpoint.codecs import compressed_tensors
from internvl_edge.checkpoint.record import LinearReport
from internvl_edge.export.builder import GraphBuilder, Types
from internvl_edge.export.int8 import IntegerMatMul, scale_outputs
from internvl_edge.export.weights import WeightFile
from internvl_edge.model.linear import W8A8, PackedLinear, Scheme
from internvl_edge.quantize import vision
from internvl_edge.quantize.calibrators import CALIBRATORS, find_range, histogram, rounded
from internvl_edge.quantize.integer import IntegerLinear, quantize_linear, round_inputs
from internvl_edge.quantize.linear_report import OutputComparison
from internvl_edge.quantize.smoothing import divide, smoothing_scale
from internvl_edge.recipe.recipe import CALIBRATORS as OFFERED
from internvl_edge.recipe.recipe import Recipe, VisionInt8

# ---- ranges ----


def found(calibrator: str, x: Tensor) -> float:
    largest = float(x.abs().max())
    return find_range(calibrator, histogram(x, largest), largest)


def normal(count: int = 200_000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def missed(x: Tensor, range_: float) -> float:
    magnitude = x.abs().double().numpy()
    return float(np.square(rounded(magnitude, range_) - magnitude).mean())


@pytest.mark.parametrize(("calibrator", "expected"), [("percentile-99.9", 3.2905), ("percentile-99.99", 3.8906)])
def test_percentiles_of_a_normal_distribution(calibrator: str, expected: float) -> None:
    assert found(calibrator, normal()) == pytest.approx(expected, rel=0.03)


def test_minmax_is_the_largest_value_wherever_it_was_seen() -> None:
    assert find_range("minmax", histogram(normal(), 9.0), 9.0) == 9.0


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_a_uniform_distribution_is_hardly_clipped(calibrator: str) -> None:
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert 0.97 < found(calibrator, x) <= 1


@pytest.mark.parametrize("calibrator", [name for name in CALIBRATORS if name != "minmax"])
def test_one_far_value_is_clipped_by_all_but_minmax(calibrator: str) -> None:
    x = torch.cat([normal(), torch.tensor([30.0])])
    assert found("minmax", x) == 30
    assert found(calibrator, x) < (16 if calibrator == "mse" else 5)  # the square of 30 weighs


def test_mse_misses_least() -> None:
    """The normal distribution's optimum lies between the percentiles' and the extreme value's."""
    x = normal()
    best = min(np.linspace(1, 6, 501), key=lambda range_: missed(x, float(range_)))
    assert found("mse", x) == pytest.approx(best, rel=0.04)
    assert all(missed(x, found("mse", x)) <= missed(x, found(name, x)) * 1.01 for name in CALIBRATORS)


def test_entropy_lies_between_where_values_are_many_and_the_largest() -> None:
    x = torch.cat([normal(), torch.linspace(4.5, 30, 20)])
    assert 3.5 < found("entropy", x) < 6


def test_what_recipes_offer_is_what_exists() -> None:
    assert set(OFFERED) == {"best", *CALIBRATORS}
    for choices in ({"calibrator": "average"}, {"cosine": 1.0}):
        with pytest.raises(EdgeError, match=r"average|cosine of 1"):
            VisionInt8(**choices)  # type: ignore[arg-type]
    with pytest.raises(EdgeError, match="quantize at least one"):
        Recipe("fp")


# ---- smoothing ----


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    strength=st.floats(0, 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_smoothing_divides_stored_norms_exactly(seed: int, strength: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm = [torch.randn(24, generator=generator).to(dtype) * 10.0 ** (seed % 5 - 4) for _ in range(2)]
    inputs = torch.exp(3 * torch.randn(24, generator=generator))
    inputs[3] = 0
    weight = torch.randn(16, 24, generator=generator)
    scale = smoothing_scale(inputs, weight.abs().amax(0), strength, norm)
    assert torch.equal(torch.exp2(torch.log2(scale).round()), scale)
    for vector in norm:
        assert torch.equal(divide(vector, scale).double() * scale.double(), vector.double())


def test_smoothing_makes_channels_alike_and_helps_the_layer() -> None:
    x, weight = with_outliers(), 0.1 * torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    inputs = observed(x)
    scale = smoothing_scale(inputs.max_abs, weight.abs().amax(0), 0.8, [torch.ones(64)])
    assert spread(inputs.max_abs / scale) < 0.2 * spread(inputs.max_abs)
    plain, smooth = (quantize_linear(weight, inputs, "mse", norm) for norm in (None, [torch.ones(64)]))
    assert plain.smoothing is None
    assert smooth.strength > 0
    assert smooth.error < 0.5 * plain.error
    assert smooth.error == pytest.approx(output_error(x, weight, smooth), rel=1e-4)
    assert plain.error == pytest.approx(output_error(x, weight, plain), rel=1e-4)


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_best_is_no_worse_than_any_calibrator(calibrator: str) -> None:
    x, weight = with_outliers(), 0.1 * torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    one = quantize_linear(weight, observed(x), calibrator, None)
    best = quantize_linear(weight, observed(x), "best", None)
    assert one.calibrator == calibrator
    assert best.error <= one.error


def test_a_layer_survives_being_stored_and_dead_inputs() -> None:
    x, weight = with_outliers(), torch.zeros(8, 64)
    weight[1:] = 0.1
    x[:, 5] = 0
    made = quantize_linear(weight, observed(x), "best", [torch.ones(64)])
    assert np.isfinite(made.error)
    assert (made.packed.scale > 0).all()
    again = IntegerLinear.stored(made.arrays(), made.facts())
    assert again.facts() == made.facts()
    assert all(np.array_equal(again.arrays()[name], array) for name, array in made.arrays().items())
    nothing = quantize_linear(weight, observed(torch.zeros(20, 64)), "best", None)
    assert nothing.packed.input_scale is not None
    assert nothing.packed.input_scale > 0


def with_outliers() -> Tensor:
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(5))
    x[:, [3, 17, 40]] *= 30
    return x


def spread(values: Tensor) -> float:
    return float(values.max() / values.median())


def output_error(x: Tensor, weight: Tensor, made: IntegerLinear) -> float:
    scale = 1.0 if made.smoothing is None else torch.from_numpy(made.smoothing)
    assert made.packed.input_scale is not None
    y = round_inputs(x / scale, made.packed.input_scale) @ torch.from_numpy(made.packed.values).float().T
    expected = x @ weight.T
    y = y * made.packed.input_scale * torch.from_numpy(made.packed.scale[:, 0])
    return float((y - expected).norm() / expected.norm())


# ---- the product in a graph ----


def packed_layer(out: int = 24, width: int = 40) -> PackedLinear:
    random = np.random.default_rng(0)
    values = random.integers(-127, 128, (out, width), dtype=np.int8)
    scale = random.uniform(1e-3, 1e-2, (out, 1)).astype(np.float32)
    return PackedLinear(values, scale, None, 8, input_scale=0.03)


class OneLayer:
    """What `IntegerMatMul` asks of a checkpoint."""

    def __init__(self, linear: PackedLinear) -> None:
        self._linear = linear
        self.schemes = {"layer": W8A8}
        self.shapes = {"layer.weight": linear.values.shape}

    def linear(self, name: str) -> PackedLinear:
        assert name == "layer"
        return self._linear

    def input_scale(self, name: str) -> float | None:
        assert name == "layer"
        return self._linear.input_scale


def graph_of(folder: Path, linear: PackedLinear, factor: np.ndarray | None, dtype: ir.DataType) -> Path:
    checkpoint: Any = OneLayer(linear)
    file = WeightFile("weights.data")
    write = IntegerMatMul(checkpoint, lambda name: factor)
    g = GraphBuilder("graph", Types(dtype, dtype), file, {}, lambda name: np.empty(0), write)
    x = g.input("x", dtype, ["tiles", "tokens", linear.values.shape[1]])
    g.output(g.linear(x, "layer"), "y", dtype, ["tiles", "tokens", linear.values.shape[0]])
    ir.save(g.model(), folder / "graph.onnx")
    file.write(folder, lambda size: None)
    return folder / "graph.onnx"


def integer_product(x: np.ndarray, linear: PackedLinear) -> np.ndarray:
    step = np.float32(linear.input_scale)
    integers = np.clip(np.rint(x / step), -128, 127).astype(np.int64)
    return (integers @ linear.values.T.astype(np.int64)) * (linear.scale[:, 0].astype(np.float64) * np.float64(step))


@pytest.mark.parametrize("folded", [False, True])
def test_the_graph_computes_the_integer_product(tmp_path: Path, folded: bool) -> None:
    linear = packed_layer()
    factor = np.random.default_rng(1).normal(0, 0.1, 24) if folded else None
    if factor is not None:
        factor[3] = 0
    session = onnxruntime.InferenceSession(graph_of(tmp_path, linear, factor, ir.DataType.FLOAT))
    x = np.random.default_rng(2).normal(0, 2, (2, 5, 40)).astype(np.float32)  # some beyond 127 steps
    assert (np.abs(x) > 128 * 0.03).any()
    expected = integer_product(x, linear) * (1 if factor is None else factor)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=2e-5, atol=1e-6)


def test_folded_scales_stay_positive_and_change_no_integer_but_its_sign() -> None:
    linear = packed_layer()
    linear.values[1, 0] = linear.values[2, 0] = -128
    factor = np.array([-0.5, 0.25, -1e-3, *[1.0] * 19, 1e-7, 0.0])
    made = scale_outputs(linear, factor)
    assert (made.scale > 0).all()
    assert (made.scale.astype(np.float16) > 0).all()
    np.testing.assert_array_equal(made.values[0], -linear.values[0])
    np.testing.assert_array_equal(made.values[1], linear.values[1])
    assert made.values[2, 0] == 127
    np.testing.assert_allclose(made.dequantize(), linear.dequantize() * factor[:, None], atol=1e-5 * 1.1)
    np.testing.assert_allclose(made.dequantize()[22:], linear.dequantize()[22:] * factor[22:, None], atol=2.0**-25)


def test_zeros_that_stay_zeros_are_alike() -> None:
    zeros, ones = torch.zeros(4, 3), torch.ones(4, 3)
    plain = LinearReport("layer", "float32", Scheme(4, 32, symmetric=False), 4.5)
    for found, cosine in ((zeros, 1.0), (ones, 0.0)):
        comparison = OutputComparison()
        comparison.add(zeros, found)
        assert comparison.of(plain).cosine == cosine
        assert vision.cosine(zeros, found) == cosine


# ---- the format ----


def test_integers_are_stored_as_they_are() -> None:
    linear = packed_layer()
    stored = compressed_tensors.pack(linear, np.float16)
    assert {name: (array.dtype.name, array.shape) for name, array in stored.items()} == {
        "weight": ("int8", (24, 40)),
        "weight_scale": ("float32", (24, 1)),
        "input_scale": ("float32", (1,)),
    }
    again = compressed_tensors.unpack_integers(stored["weight"], stored["weight_scale"], stored["input_scale"])
    np.testing.assert_array_equal(again.dequantize(), linear.dequantize())
    assert again.input_scale == np.float32(0.03)


def test_a_mixed_configuration_reads_back() -> None:
    int4 = Scheme(4, 64, True)
    alone = compressed_tensors.configuration({W8A8: ["re:.*vision.*"]}, [])
    assert alone["format"] == "int-quantized"
    mixed = compressed_tensors.configuration({W8A8: ["re:.*vision.*"], int4: ["Linear"]}, [])
    assert mixed["format"] == "mixed-precision"
    assert [group["format"] for group in mixed["config_groups"].values()] == ["int-quantized", "pack-quantized"]
    assert compressed_tensors.read_configuration(mixed) == (W8A8, int4)


@pytest.mark.parametrize(
    "changes", [{"dynamic": True}, {"strategy": "token"}, {"symmetric": False}, {"num_bits": 4}, {"type": "float"}]
)
def test_other_quantized_activations_are_refused(changes: dict[str, Any]) -> None:
    config = compressed_tensors.configuration({W8A8: ["Linear"]}, [])
    config["config_groups"]["group_0"]["input_activations"] |= changes
    with pytest.raises(CheckpointError, match="group_0 quantizes activations otherwise"):
        compressed_tensors.read_configuration(config)
