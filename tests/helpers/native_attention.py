"""Graphs of one attention node, what they compute in float64, and the levels of the native library."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from internvl_edge.runtime.native.graph import DOMAIN

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Shape:
    """The heads of an attention."""

    heads: int
    kv_heads: int
    width: int


@dataclass
class Step:
    """The inputs of GroupQueryAttention: some tokens for each row, and a cache [rows, kv_heads, capacity, width]."""

    shape: Shape
    query: NDArray[np.float32]
    key: NDArray[np.float32]
    value: NDArray[np.float32]
    past_key: NDArray[np.float32]
    past_value: NDArray[np.float32]
    past: list[int]

    @staticmethod
    def drawn(shape: Shape, past: list[int], tokens: int = 1, capacity: int = 0, seed: int = 0) -> Step:
        random = np.random.default_rng([seed, tokens, *past])
        rows, capacity = len(past), capacity or max(past) + tokens

        def draw(*axes: int) -> NDArray[np.float32]:
            return random.standard_normal(axes, dtype=np.float32)

        new = (rows, tokens, shape.kv_heads * shape.width)
        cache = (rows, shape.kv_heads, capacity, shape.width)
        query = draw(rows, tokens, shape.heads * shape.width)
        return Step(shape, query, draw(*new), draw(*new), draw(*cache), draw(*cache), past)

    @property
    def tokens(self) -> int:
        return self.query.shape[1]

    def row(self, index: int) -> Step:
        """The same step for one row alone."""
        part = slice(index, index + 1)
        arrays = (each[part] for each in (self.query, self.key, self.value, self.past_key, self.past_value))
        return Step(self.shape, *arrays, past=self.past[part])

    def run(self, session: Any, in_place: bool = True) -> tuple[NDArray[np.float32], ...]:
        """Return the attended values, and the new keys and values. The arrays of the step stay as they are."""
        inputs = {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "past_key": self.past_key.copy(),
            "past_value": self.past_value.copy(),
            "last": np.array(self.past, np.int32) + (self.tokens - 1),
            "total": np.array(max(self.past) + self.tokens, np.int32),
        }
        if not in_place:
            return tuple(session.run(None, inputs))
        binding = session.io_binding()
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("attended")
        for name in ("key", "value"):
            binding.bind_ortvalue_output(f"present_{name}", values[f"past_{name}"])
        session.run_with_iobinding(binding)
        return tuple(binding.copy_outputs_to_cpu())

    def cache(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The keys and values [rows, kv_heads, capacity, width] with the new tokens behind the old ones."""
        found = []
        for cache, new in ((self.past_key.copy(), self.key), (self.past_value.copy(), self.value)):
            for row, past in enumerate(self.past):
                heads = new[row].reshape(self.tokens, self.shape.kv_heads, self.shape.width)
                cache[row, :, past : past + self.tokens] = heads.transpose(1, 0, 2)
            found.append(cache)
        return found[0], found[1]

    def expected(self) -> NDArray[np.float64]:
        """The attended values in float64."""
        keys, values = self.cache()
        rows = []
        for row, past in enumerate(self.past):
            total = past + self.tokens
            mask = np.arange(total) <= past + np.arange(self.tokens)[:, None]
            heads = self.query[row].reshape(self.tokens, self.shape.heads, self.shape.width).transpose(1, 0, 2)
            rows.append(attended(heads, keys[row, :, :total], values[row, :, :total], mask))
        return np.stack(rows)


def attended(query: NDArray[Any], key: NDArray[Any], value: NDArray[Any], mask: NDArray[Any]) -> NDArray[np.float64]:
    """softmax(q k^T / sqrt(width)) v in float64, [tokens, heads * width], of arrays [heads, tokens, width]."""
    query, key, value = (each.astype(np.float64) for each in (query, key, value))
    group = len(query) // len(key)
    scores = query @ np.repeat(key, group, 0).transpose(0, 2, 1) / np.sqrt(query.shape[-1])
    scores[:, ~mask] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    found = weights / weights.sum(-1, keepdims=True) @ np.repeat(value, group, 0)
    return found.transpose(1, 0, 2).reshape(query.shape[1], -1)


def group_query_model(shape: Shape, domain: str = DOMAIN, **attributes: Any) -> Any:
    """A model of one GroupQueryAttention as the exporter writes it."""
    query, new = shape.heads * shape.width, shape.kv_heads * shape.width
    cache = ["rows", shape.kv_heads, "capacity", shape.width]
    inputs = {
        "query": ["rows", "tokens", query],
        "key": ["rows", "tokens", new],
        "value": ["rows", "tokens", new],
        "past_key": cache,
        "past_value": cache,
        "last": ["rows"],
        "total": [],
    }
    outputs = {"attended": ["rows", "tokens", query], "present_key": cache, "present_value": cache}
    attributes = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads, **attributes}
    return _model("GroupQueryAttention", domain, inputs, outputs, attributes)


def attention_model(heads: int, width: int, domain: str = DOMAIN) -> Any:
    """A model of one Attention as the exporter writes it for the vision tower."""
    axes = ["tiles", "tokens", heads * width]
    attributes = {"q_num_heads": heads, "kv_num_heads": heads}
    return _model("Attention", domain, dict.fromkeys(("query", "key", "value"), axes), {"attended": axes}, attributes)


def session_of(model: Any, library: Path | None = None, threads: int = 1) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def level_here(library: Path) -> str | None:
    """The level of the library's kernels in the present environment; None where this CPU lacks it."""
    function = ctypes.CDLL(str(library)).internvl_edge_level
    function.restype = ctypes.c_char_p
    found = function()
    return found.decode() if found else None


def _model(kind: str, domain: str, inputs: dict[str, Any], outputs: dict[str, Any], attributes: dict[str, Any]) -> Any:
    node = helper.make_node(kind, list(inputs), list(outputs), domain=domain, **attributes)

    def values(named: dict[str, Any]) -> list[Any]:
        types = {name: TensorProto.INT32 if name in ("last", "total") else TensorProto.FLOAT for name in named}
        return [helper.make_tensor_value_info(name, types[name], axes) for name, axes in named.items()]

    graph = helper.make_graph([node], "attention", values(inputs), values(outputs))
    opsets = [helper.make_opsetid("", 23), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
