"""Attention nodes are replaced where the operators do the same, and nothing else in a graph changes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from helpers import kv_scales, tiny
from helpers.native_attention import MICROSOFT, Shape, attention_model, group_query_model
from internvl_edge import export_bundle
from internvl_edge.bundle import names
from internvl_edge.runtime.native.graph import DOMAIN, read_fields, with_native_attention, write_field

SHAPE = Shape(4, 2, 16)


def replaced(model: Any) -> Any:
    found = with_native_attention(model.SerializeToString())
    return None if found is None else onnx.ModelProto.FromString(found)


def own(model: Any) -> Any:
    """The model with the native operators back in the domains of those that they stand for."""
    model.opset_import.pop()
    for node in model.graph.node:
        if node.domain == DOMAIN:
            node.ClearField("domain")
            if node.op_type == "GroupQueryAttention":
                node.domain = MICROSOFT
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("graph") / "checkpoint")


def test_every_attention_of_a_bundle_is_replaced_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    for name, kind in ((names.VISION, "Attention"), (names.DECODERS["onnxruntime"], "GroupQueryAttention")):
        original = onnx.load(bundle / name, load_external_data=False)
        found = replaced(original)
        count = sum(node.op_type == kind for node in original.graph.node)
        assert [node.domain for node in found.graph.node if node.op_type == kind] == [DOMAIN] * count
        assert count > 0
        assert (found.opset_import[-1].domain, found.opset_import[-1].version) == (DOMAIN, 1)
        assert own(found) == original
    standard = onnx.load(bundle / names.DECODERS["standard"], load_external_data=False)
    assert replaced(standard) is None  # its attention has a mask


def test_an_int8_cache_stays_with_its_own_operator(checkpoint: Path, tmp_path: Path) -> None:
    kv_scales.write_scales(checkpoint)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", dialects=["onnxruntime"])
    assert replaced(onnx.load(bundle / names.DECODERS["onnxruntime"], load_external_data=False)) is None


@pytest.mark.parametrize(
    "attributes", [{"softcap": 1.0}, {"scale": 0.5}, {"do_rotary": 1}, {"local_window_size": 9}], ids=str
)
def test_attributes_that_mean_something_else_are_left_alone(attributes: dict[str, Any]) -> None:
    assert replaced(group_query_model(SHAPE, MICROSOFT)) is not None
    assert replaced(group_query_model(SHAPE, MICROSOFT, **attributes)) is None


def test_further_inputs_and_missing_outputs_are_left_alone() -> None:
    for change in ("input", "output", "empty"):
        model = attention_model(2, 16, "")
        [node] = model.graph.node
        if change == "input":
            node.input.append("mask")
        elif change == "output":
            node.output.append("present_key")
        else:
            node.input[2] = ""
        assert replaced(model) is None
    other = attention_model(2, 16, "com.example")
    assert replaced(other) is None


def test_the_last_axis_is_written_down() -> None:
    model = attention_model(2, 16, "")
    model.graph.node.append(helper.make_node("Identity", ["attended"], ["out"]))
    found = onnx.ModelProto.FromString(with_native_attention(model.SerializeToString(), 32) or b"")
    [info] = found.graph.value_info
    assert info.name == "attended"
    assert info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [axis.dim_value for axis in info.type.tensor_type.shape.dim] == [0, 0, 32]


@given(st.lists(st.tuples(st.integers(1, 2**28), st.integers(0, 2**64 - 1) | st.binary(max_size=300)), max_size=20))
def test_fields_are_read_as_they_were_written(fields: list[tuple[int, int | bytes]]) -> None:
    assert list(read_fields(b"".join(write_field(*field) for field in fields))) == fields


@given(st.binary(max_size=60))
def test_damaged_bytes_are_a_value_error_or_nothing(message: bytes) -> None:
    with suppress(ValueError):
        assert with_native_attention(message) is None


def test_a_graph_that_is_cut_off_is_a_value_error() -> None:
    whole = group_query_model(SHAPE, MICROSOFT).SerializeToString()
    errors = 0
    for length in range(1, len(whole)):
        try:
            with_native_attention(whole[:length])
        except ValueError:
            errors += 1
    assert errors > len(whole) * 0.9
