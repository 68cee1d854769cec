"""Packed weights: bit-exact round trips, and byte equality with autoawq's and compressed-tensors' own packing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.repository import REPOSITORY
from internvl_edge.base.errors import CheckpointError
from internvl_edge.checkpoint.codecs import autoawq, compressed_tensors
from internvl_edge.model.linear import PackedLinear, Scheme

PEERS = np.load(REPOSITORY / "tests" / "data" / "packing.npz")
AWQ_CASES = sorted({name.split("/")[1] for name in PEERS if name.startswith("autoawq/")})
COMPRESSED_CASES = {"int4 groups": 4, "int4 groups, zero points": 4, "int8 rows": 8, "int8 groups, zero points": 8}


def peer(prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{prefix}/"): PEERS[name] for name in PEERS if name.startswith(f"{prefix}/")}


@st.composite
def linears(draw: st.DrawFn, bits: tuple[int, ...] = (4, 8), out_multiple: int = 1) -> PackedLinear:
    """Layers of any small shape, scales exact in float16."""
    width = draw(st.sampled_from(bits))
    out = out_multiple * draw(st.integers(1, 40 // out_multiple))
    group, groups = draw(st.sampled_from([8, 32, 64])), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = random.uniform(1e-3, 1, (out, groups)).astype(np.float16).astype(np.float32)
    if draw(st.booleans()):
        values = random.integers(-(2 ** (width - 1)), 2 ** (width - 1), (out, group * groups)).astype(np.int8)
        return PackedLinear(values, scale, None, width)
    values = random.integers(0, 2**width, (out, group * groups), np.uint8)
    return PackedLinear(values, scale, random.integers(0, 2**width, (out, groups), np.uint8), width)


def assert_same(got: PackedLinear, expected: PackedLinear) -> None:
    assert got.bits == expected.bits
    np.testing.assert_array_equal(got.values, expected.values)
    assert got.values.dtype == expected.values.dtype
    np.testing.assert_array_equal(got.scale, expected.scale)
    assert (got.zero_point is None) == (expected.zero_point is None)
    if got.zero_point is not None:
        np.testing.assert_array_equal(got.zero_point, expected.zero_point)


@given(linears(bits=(4,), out_multiple=8))
def test_autoawq_round_trip(linear: PackedLinear) -> None:
    packed = autoawq.pack(linear)
    again = autoawq.unpack(**packed)
    np.testing.assert_array_equal(again.dequantize(), linear.dequantize())
    if linear.zero_point is not None:
        assert_same(again, linear)
    for name, tensor in autoawq.pack(again).items():
        np.testing.assert_array_equal(tensor, packed[name])


@given(linears())
def test_compressed_tensors_round_trip(linear: PackedLinear) -> None:
    packed = compressed_tensors.pack(linear)
    assert_same(compressed_tensors.unpack(bits=linear.bits, **packed), linear)


@given(linears())
def test_counting_from_the_middle_changes_no_difference(linear: PackedLinear) -> None:
    values, zeros = linear.signed()
    limit = 2 ** (linear.bits - 1)
    assert values.min() >= -limit
    assert values.max() < limit
    again = values.astype(np.float32)
    if zeros is not None:
        again -= np.repeat(zeros, linear.group_size, axis=1)
    np.testing.assert_array_equal(again * np.repeat(linear.scale, linear.group_size, axis=1), linear.dequantize())


@pytest.mark.parametrize("case", AWQ_CASES)
def test_autoawq_packs_the_same_bytes(case: str) -> None:
    theirs = peer(f"autoawq/{case}")
    linear = PackedLinear(theirs["values"], theirs["scales"].T.astype(np.float32), theirs["zeros"], 4)
    stored = {name: theirs[name] for name in ("qweight", "qzeros", "scales")}
    for name, tensor in autoawq.pack(linear).items():
        assert tensor.dtype == stored[name].dtype
        assert tensor.tobytes() == stored[name].tobytes(), name
    assert_same(autoawq.unpack(**stored), linear)


@pytest.mark.parametrize(("case", "bits"), COMPRESSED_CASES.items())
def test_compressed_tensors_packs_the_same_bytes(case: str, bits: int) -> None:
    theirs = peer(f"compressed/{case}")
    asymmetric = "weight_zero_point" in theirs
    values = theirs["values"] if asymmetric else (theirs["values"].astype(int) - 2 ** (bits - 1)).astype(np.int8)
    linear = PackedLinear(values, theirs["scales"], theirs["zeros"] if asymmetric else None, bits)
    packed = compressed_tensors.pack(linear)
    assert set(packed) == {name for name in theirs if name.startswith("weight_")}
    for name, tensor in packed.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.shape == theirs[name].shape
        assert tensor.tobytes() == theirs[name].tobytes(), name
    stored: dict[str, Any] = {name: theirs[name] for name in packed}
    assert_same(compressed_tensors.unpack(bits=bits, **stored), linear)


def test_configurations_are_those_of_the_libraries() -> None:
    theirs = json.loads(bytes(PEERS["compressed/config"]))
    schemes = compressed_tensors.read_configuration(theirs)
    assert schemes == (Scheme(4, 32, True), Scheme(4, 64, False), Scheme(8, None, True), Scheme(8, 32, False))
    targets = {scheme: [f"re:.*case{index}$"] for index, scheme in enumerate(schemes)}
    ours = compressed_tensors.configuration(targets, theirs["ignore"])
    assert ours["config_groups"] == theirs["config_groups"]
    assert set(ours) <= set(theirs)
    assert autoawq.read_configuration(autoawq.configuration(128, ["lm_head"])) == (Scheme(4, 128, False),)


def test_what_the_formats_cannot_hold_is_refused() -> None:
    eight = PackedLinear(np.zeros((8, 32), np.int8), np.ones((8, 1), np.float32), None, 8)
    with pytest.raises(CheckpointError, match="8 bits"):
        autoawq.pack(eight)
    large = PackedLinear(np.zeros((8, 32), np.int8), np.full((8, 1), 1e6, np.float32), None, 4)
    with pytest.raises(CheckpointError, match="float16"):
        autoawq.pack(large)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "gemv"}, "gemv"),
        ({"bits": 3}, "3 bits"),
        ({"zero_point": False}, "zero_point False"),
        ({"group_size": "all"}, "group_size is 'all'"),
    ],
)
def test_other_awq_packings_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        autoawq.read_configuration(autoawq.configuration(128, []) | changes)


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"num_bits": 2}, "int2"), ({"type": "float"}, "float4"), ({"strategy": "block"}, "block")],
)
def test_other_compressed_weights_are_refused_by_name(weights: dict[str, Any], message: str) -> None:
    config = compressed_tensors.configuration({Scheme(4, 128, True): ["Linear"]}, [])
    config["config_groups"]["group_0"]["weights"] |= weights
    with pytest.raises(CheckpointError, match=message):
        compressed_tensors.read_configuration(config)


def test_other_compressed_formats_are_refused_by_name() -> None:
    config = compressed_tensors.configuration({Scheme(4, 128, True): ["Linear"]}, [])
    with pytest.raises(CheckpointError, match="float-quantized"):
        compressed_tensors.read_configuration(config | {"format": "float-quantized"})
    with pytest.raises(CheckpointError, match="kv_cache_scheme"):
        compressed_tensors.read_configuration(config | {"kv_cache_scheme": {"num_bits": 8}})
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(CheckpointError, match="activations"):
        compressed_tensors.read_configuration(config)
