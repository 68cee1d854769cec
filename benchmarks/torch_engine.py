"""An engine that computes the graphs which TensorRT gets, in torch: their arithmetic in bfloat16 or float16 on any GPU.

For the GPU acceptance run on cards that TensorRT refuses, and on a CPU. It interprets the operators that `build` puts
into headers, one torch call for each; norms and softmax compute in float32 inside, as in TensorRT's layers. It is not
fast. Needs torch and onnx-ir.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from internvl_edge.bundle.bundle import Bundle
from internvl_edge.compiler.bundle_engines import headers
from internvl_edge.model.rope import RotaryAngles
from internvl_edge.runtime.engines import Engine
from internvl_edge.runtime.engines.rows import CacheRows
from internvl_edge.runtime.engines.steps import steps, steps_from
from internvl_edge.runtime.engines.tensorrt.record import BuildOptions

_TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    16: torch.bfloat16,
}
# Prompt tokens of one step.
_CHUNK = 512
Tensor = Any


class TorchEngine(Engine):
    """The graphs of a bundle for TensorRT, in torch. Its KV cache has one row (see `Engine` for the protocol).

    Args:
        bundle: the bundle.
        dtype: "bfloat16" or "float16", in which the graphs compute.
        decomposed: use the operators for TensorRT before 10.15.
        device: torch's name of a device.
        capacity: the most tokens in the KV cache.
    """

    def __init__(self, bundle: Bundle, dtype: str, decomposed: bool, device: str, capacity: int) -> None:
        options = BuildOptions(dtype, capacity=capacity, chunk=_CHUNK)
        made = headers(bundle, options, decomposed=decomposed)
        self._vision, self._decoder = (Graph(made[name][0], bundle.folder, device) for name in ("vision", "decoder"))
        self._device, self._dtype = device, getattr(torch, dtype)
        self._angles = RotaryAngles(bundle.manifest.model.decoder)
        self.cache, self.tiles_at_once = CacheRows(capacity), 1
        self._entries = {
            name: torch.zeros(shape, dtype=kind, device=device)
            for name, shape, kind in self._decoder.inputs()
            if name.startswith("past_key_values")
        }
        self._slots = torch.arange(capacity, device=device)

    @property
    def dialect(self) -> str:
        """The name of the decoder graph that headers are made from."""
        return "standard"

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode tiles [tiles, S, S, 3] to image tokens [tiles, tokens_per_tile, hidden]."""
        tiles = [self._vision.run({"pixels": torch.from_numpy(tile[None]).to(self._device)}) for tile in pixels]
        return _numpy(torch.cat([each["image_embeds"] for each in tiles]))

    def steps(self, length: int) -> list[int]:
        """Return the sizes of the steps of a prompt of `length` tokens."""
        return steps(length, (_CHUNK,))

    def prefill_steps(self, embeds: NDArray[np.float32], row: int = 0) -> Generator[None, None, NDArray[np.float32]]:
        """Append a prompt [seq, hidden] in chunks (see `Engine`)."""
        total = self.cache.room_for(len(embeds))
        sizes = steps_from(self.steps(total), self.cache.length()) or self.steps(len(embeds))
        for chunk in np.split(embeds, np.cumsum(sizes)[:-1]):
            logits = self._step(chunk, total)
            yield
        return logits[0]

    def decode_rows(self, embeds: NDArray[np.float32], rows: Sequence[int]) -> list[NDArray[np.float32]]:
        """Append one token (see `Engine`)."""
        return [self._step(embeds, self.cache.room_for(1))[0]]

    def score(self, embeds: NDArray[np.float32], row: int = 0) -> NDArray[np.float32]:
        """Append tokens [seq, hidden], and return the logits [seq, vocab] after each of them."""
        return self._step(embeds, self.cache.room_for(len(embeds)), kept=len(embeds))

    def copy(self, source: int, target: int, length: int) -> None:
        """Do nothing, because there is one row."""

    def interrupt(self) -> None:
        """Do nothing; a step is not interrupted."""

    def close(self) -> None:
        """Release nothing; torch does it."""

    def _step(self, embeds: NDArray[np.float32], total: int, kept: int = 1) -> NDArray[np.float32]:
        """Append tokens of a sequence of `total` tokens, and return the logits [kept, vocab] of the last ones."""
        start, count = self.cache.length(), len(embeds)
        cos, sin = self._angles.at(start, count, total)
        inputs = {
            name: torch.from_numpy(np.ascontiguousarray(values[None])).to(self._device, self._dtype)
            for name, values in (("inputs_embeds", embeds), ("cos", cos), ("sin", sin))
        }
        inputs |= {
            "past_length": torch.tensor([start], device=self._device),
            "kept": torch.arange(count - kept, count, device=self._device),
            "slots": self._slots[: min(-(-(start + count) // 512) * 512, self.cache.capacity)],
        }
        found = self._decoder.run(inputs | self._entries)
        if "new_entries" in found:
            new = found["new_entries"][0].split(next(iter(self._entries.values())).shape[1])
            for cache, entries in zip(self._entries.values(), new, strict=True):
                cache[0, :, start : start + count] = entries
        else:
            self._entries = {name: found[name.replace("past_key_values", "present")] for name in self._entries}
        self.cache.append(count)
        return _numpy(found["logits"][0])


class Graph:
    """An ONNX graph in torch. `header` is the model; its large weights lie in `folder`."""

    def __init__(self, header: bytes, folder: Path, device: str) -> None:
        self._graph = ir.serde.deserialize_model(onnx.ModelProto.FromString(header)).graph
        self._device = device
        self._nodes = list(self._graph)
        self._constants = {
            name: _constant(value.const_value, folder).to(device) for name, value in self._graph.initializers.items()
        }
        self._last_use = {
            value.name: index for index, node in enumerate(self._nodes) for value in node.inputs if value is not None
        }

    def inputs(self) -> list[tuple[str, tuple[Any, ...], Any]]:
        """Names, shapes and types of the inputs."""
        return [(value.name, tuple(value.shape), _TYPES[int(value.dtype)]) for value in self._graph.inputs]

    @torch.inference_mode()
    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs."""
        values = self._constants | inputs
        kept = {value.name for value in self._graph.outputs} | self._constants.keys() | inputs.keys()
        for index, node in enumerate(self._nodes):
            arguments = [None if value is None else values[value.name] for value in node.inputs]
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            found = OPERATORS[node.op_type](*arguments, **attributes)
            found = found if isinstance(found, (tuple, list)) else (found,)
            values |= {output.name: value for output, value in zip(node.outputs, found, strict=True)}
            for value in node.inputs:
                if value is not None and value.name not in kept and self._last_use[value.name] == index:
                    values.pop(value.name, None)
        return {value.name: values[value.name] for value in self._graph.outputs}


def _constant(tensor: Any, folder: Path) -> Tensor:
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name,
            base_dir=folder,
        )  # fmt: skip
    array = np.asarray(tensor.numpy())
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype.name == "int4":
        array = array.astype(np.int8)
    return torch.from_numpy(np.array(array))


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    return array


def _reshape(x: Tensor, shape: Tensor, allowzero: int = 0) -> Tensor:
    return x.reshape([x.shape[index] if size == 0 else size for index, size in enumerate(shape.tolist())])


def _slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor, steps: Tensor | None = None) -> Tensor:
    places = [slice(None)] * x.ndim
    for start, end, axis in zip(starts.tolist(), ends.tolist(), axes.tolist(), strict=True):
        places[axis] = slice(start, min(end, x.shape[axis]))
    return x[tuple(places)]


def _squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    for axis in sorted(axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def _shape(x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], device=x.device)


def _range(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(int(start), int(end), int(step), device=start.device)


def _gather(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    return x.index_select(axis, indices) if indices.ndim else x.select(axis, int(indices))


def _reduce(what: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axes: Tensor, keepdims: int = 1) -> Tensor:
        return what(x, tuple(axes.tolist()), bool(keepdims))

    return reduce


def _layer_norm(x: Tensor, scale: Tensor, bias: Tensor, axis: int = -1, epsilon: float = 1e-5) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + epsilon)
    return normed.to(x.dtype) * scale + bias


def _rms_norm(x: Tensor, scale: Tensor, axis: int = -1, epsilon: float = 1e-5) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype) * scale


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def _scatter(past: Tensor, new: Tensor, start: Tensor, axis: int) -> Tensor:
    first = int(start[0])
    past[:, :, first : first + new.shape[2]] = new
    return past


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, q_num_heads: int = 0, kv_num_heads: int = 0, **_: Any
) -> Tensor:
    flat = q.ndim == 3
    if flat:
        q, k, v = (
            x.unflatten(-1, (heads, -1)).transpose(1, 2)
            for x, heads in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads))
        )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    found = scores.softmax(-1).to(v.dtype) @ v
    return found.transpose(1, 2).flatten(2) if flat else found


def _dequantize(
    x: Tensor, scale: Tensor, zero: Tensor | None = None, axis: int = 1, block_size: int = 0, **_: Any
) -> Tensor:
    if block_size:
        scale = scale.repeat_interleave(block_size, axis)[tuple(slice(size) for size in x.shape)]
    elif scale.ndim == 1 and scale.numel() > 1:
        scale = scale.reshape([-1 if index == axis % x.ndim else 1 for index in range(x.ndim)])
    assert zero is None or not zero.any()
    return x.to(scale.dtype) * scale


def _quantize(x: Tensor, scale: Tensor, zero: Tensor | None = None, **_: Any) -> Tensor:
    assert zero is None or not zero.any()
    return (x.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "ArgMax": lambda x, axis, keepdims: x.argmax(axis, bool(keepdims)),
    "Attention": _attention,
    "Cast": lambda x, to: x.to(_TYPES[to]),
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "DequantizeLinear": _dequantize,
    "Div": lambda a, b: a / b if a.is_floating_point() else a // b,
    "Expand": lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, shape.tolist())),
    "Gather": _gather,
    "Gelu": lambda x, **_: torch.nn.functional.gelu(x),
    "LayerNormalization": _layer_norm,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "QuantizeLinear": _quantize,
    "RMSNormalization": _rms_norm,
    "Range": _range,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Softmax": lambda x, axis: x.float().softmax(axis).to(x.dtype),
    "Split": lambda x, axis, num_outputs: x.chunk(num_outputs, axis),
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "TensorScatter": _scatter,
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": _unsqueeze,
    "Where": torch.where,
}
