"""Open a checkpoint folder as canonical tensors. All tensors are checked at once and read only when needed.

Every stored tensor is either used or named in an error. A tensor that is missing or has another shape is named in an
error too. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.folders import restore
from internvl_edge.model.components import Component, components
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.linear import PackedLinear, Scheme, concatenate

from . import layouts
from .config_reader import may_tie, read_config
from .json_files import read_json
from .kv_scales import KvScales
from .lora import refuse_adapter_tensors
from .packed_tensors import FLOATS, check_packed, is_packed, read_packed
from .quantization import Quantization, read_quantization, refuse_bitsandbytes_tensors, refuse_vision_bits
from .tensor_files import StoredTensor, open_tensor_files
from .training import extra_head

# Stored type -> its name and bits.
_FLOAT_TYPES = {"F32": ("float32", 32), "F16": ("float16", 16), "BF16": ("bfloat16", 16)}


class Checkpoint:
    """An InternVL checkpoint in either layout, with float weights or quantized ones.

    Attributes:
        folder: the folder of the checkpoint.
        config: the contents of `config.json`.
        shapes: canonical tensor name -> shape, for all tensors of the model.
        quantization: how linears are packed; None for float weights.
        schemes: canonical name of each quantized linear (without `.weight`) -> how it is rounded.
        kv_scales: the scales of an int8 KV cache; None for a float cache.

    Raises:
        CheckpointError: from the constructor, when files, configuration and tensors do not fit together.
    """

    def __init__(self, folder: Path) -> None:
        restore(folder)
        self.folder = folder
        self.config: ModelConfig = read_config(folder)
        if not layouts.supported(self.config):
            raise CheckpointError(f"{self.config.decoder.architecture} does not exist in the native layout")
        described = read_json(folder / "config.json")
        self.quantization: Quantization | None = read_quantization(described, self.config.vision)
        self._stored = _canonical_prefixes(open_tensor_files(folder), self.config)
        refuse_adapter_tensors(folder, self._stored)
        refuse_bitsandbytes_tensors(self._stored, self.config.vision)
        self.shapes = layouts.tensor_shapes(self.config)
        self._sources = {name: self._source(name) for name in self.shapes}
        self.schemes: dict[str, Scheme] = {}
        self.kv_scales = KvScales.read(folder, self.config.decoder)
        self._last_packed: tuple[tuple[str, ...], PackedLinear] | None = None
        self._check()

    def require_unquantized(self) -> None:
        """Raise CheckpointError where the checkpoint is quantized, and so not one to quantize or to calibrate."""
        if self.quantization is not None:
            raise CheckpointError(f"{self.folder} is quantized already; give the original checkpoint")

    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        """Return one tensor by canonical name in its stored dtype (float32, float16 or bfloat16), shape as in `shapes`.

        It is a view of the mapped file where the layout allows it. Otherwise it is joined from several tensors or cut
        out of a fused one. A quantized weight is returned as the float32 values that its integers stand for.
        """
        packed = self.linear(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if packed is not None:
            return packed.dequantize()
        source = self._sources[name]
        arrays = [self._stored[stored].read() for stored in source.names]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        if source.part is not None:
            array = self._part_of_fused(array, source.part)
        return array.reshape(self.shapes[name])

    def linear(self, name: str) -> PackedLinear | None:
        """Return a quantized linear by canonical module name, with its bias. Return None where the weight is float.

        Query, key and value of a fused `wqkv` were quantized together. They are returned as rows of it, with the same
        integers and scales.
        """
        if name not in self.schemes:
            return None
        source = self._sources[f"{name}.weight"]
        linear = self._read_packed(source.names, self.schemes[name])
        if source.part is not None:
            linear = linear.rows(self._part_of_fused(np.arange(len(linear.values)), source.part).reshape(-1))
        bias = f"{name}.bias"
        return replace(linear, bias=self.tensor(bias)) if self.has(bias) else linear

    def input_scale(self, name: str) -> float:
        """Return the scale of the inputs of a linear with int8 inputs, by canonical module name."""
        linear = self.linear(name)
        assert linear is not None
        assert linear.input_scale is not None
        return linear.input_scale

    def has(self, name: str) -> bool:
        """Return whether the model has this tensor (biases and norms differ between variants)."""
        return name in self.shapes

    @property
    def parameters(self) -> int:
        """The number of weights in the model."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def stored_dtypes(self) -> dict[str, int]:
        """Return how many stored tensors have each dtype, most frequent first."""
        kinds = [tensor.dtype for tensor in self._stored.values()]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds), key=kinds.count, reverse=True)}

    def float_type(self) -> tuple[str, int]:
        """Return the type that most of the float weights have ("bfloat16") and its bits. Scales do not count."""
        sources = dict.fromkeys(stored for source in self._sources.values() for stored in source.names)
        weights = Counter[str]()
        for tensor in (self._stored[name] for name in sources if name in self._stored):
            if tensor.dtype in _FLOAT_TYPES:
                weights[tensor.dtype] += prod(tensor.shape)
        return _FLOAT_TYPES[weights.most_common(1)[0][0]]

    def components(self) -> tuple[Component, ...]:
        """Return the sizes of the model's parts on disk."""
        dtype, bits = self.float_type()
        tied = self.config.decoder.tie_word_embeddings
        return components(self.shapes, self.schemes, dtype, bits, bits, tied=tied)

    def _read_packed(self, weights: tuple[str, ...], scheme: Scheme) -> PackedLinear:
        """Return the packed linear in the stored weights.

        The last one is kept, because callers read the parts of a fused linear one after another.
        """
        assert self.quantization is not None
        if self._last_packed is None or self._last_packed[0] != weights:
            modules = [name.removesuffix(".weight") for name in weights]
            linears = [read_packed(self.quantization, self._stored, module, scheme) for module in modules]
            self._last_packed = weights, concatenate(linears)
        return self._last_packed[1]

    def _source(self, name: str) -> layouts.Source:
        source = layouts.tensor_source(self.config, name)
        tied = name == "decoder.lm_head.weight" and self.config.decoder.tie_word_embeddings
        if tied and not self._is_stored(source.names[0]):
            return layouts.tensor_source(self.config, "decoder.embed_tokens.weight")
        return source

    def _is_stored(self, name: str) -> bool:
        return name in self._stored or is_packed(self._stored, name.removesuffix(".weight"))

    def _part_of_fused(self, array: np.ndarray[Any, Any], part: str) -> np.ndarray[Any, Any]:
        """Return the rows of one part of a fused wqkv: [kv heads, G queries + key + value, head_dim, ...]."""
        decoder = self.config.decoder
        groups = decoder.num_query_groups
        heads = array.reshape(decoder.num_key_value_heads, groups + 2, decoder.head_dim, *array.shape[1:])
        rows = {"query": slice(groups), "key": slice(groups, groups + 1), "value": slice(groups + 1, None)}[part]
        return heads[:, rows]

    def _stored_shape(self, name: str) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
        """Return the stored names of a canonical tensor and the shape that each must have."""
        source, shape = self._sources[name], self.shapes[name]
        if source.part is not None:
            decoder = self.config.decoder
            heads = decoder.num_attention_heads + 2 * decoder.num_key_value_heads
            return source.names, [(heads * decoder.head_dim, *shape[1:])]
        return source.names, [(shape[0] // len(source.names), *shape[1:])] * len(source.names)

    def _check(self) -> None:
        used = set()
        for name in self.shapes:
            stored_names, shapes = self._stored_shape(name)
            modules = [stored.removesuffix(".weight") for stored in stored_names]
            if name.endswith(".weight") and any(is_packed(self._stored, module) for module in modules):
                for module, shape in zip(modules, shapes, strict=True):
                    used.update(self._check_packed(name.removesuffix(".weight"), module, shape))
                continue
            for stored, shape in zip(stored_names, shapes, strict=True):
                self._check_one(stored, shape)
                used.add(stored)
        unexpected = [n for n in self._stored if n not in used and not layouts.LEFTOVERS.search(n)]
        if head := next(filter(extra_head, unexpected), None):
            raise CheckpointError(
                f"{self.folder}: tensor {head} is of a head for rewards, values or classes, which answers do not pass "
                "through; save the model without that head, and give that folder"
            )
        if unexpected:
            more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
            raise CheckpointError(
                f"{self.folder}: unexpected tensor {unexpected[0]}{more}; config.json describes a model without it"
            )
        if self.quantization and not self.schemes:
            raise CheckpointError(
                f"{self.folder}: config.json says {self.quantization.method}, but no tensor is quantized; "
                "remove its quantization_config or download the tensors again"
            )

    def _check_packed(self, name: str, module: str, shape: tuple[int, ...]) -> list[str]:
        if self.quantization is None:
            parts = ((n, tensor.dtype) for n, tensor in self._stored.items() if n.startswith(f"{module}."))
            stored, dtype = next(((n, dtype) for n, dtype in parts if dtype not in FLOATS), (module, "packed"))
            raise CheckpointError(
                f"{self.folder}: tensor {stored} has dtype {dtype}, expected {', '.join(FLOATS)}: it looks quantized, "
                "but config.json has no quantization_config; download it again"
            )
        try:
            scheme, used = check_packed(self.quantization, self._stored, module, (shape[0], shape[-1]))
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: {error}") from None
        refuse_vision_bits(name, scheme)
        if self.schemes.setdefault(name, scheme) != scheme:
            raise CheckpointError(f"{self.folder}: {module} is quantized unlike the layers that are fused with it")
        return used

    def _missing_advice(self, stored: str) -> str:
        """What to do about a tensor that is not there; a tied head is left out by who saves it, not by a download."""
        head = layouts.tensor_source(self.config, "decoder.lm_head.weight").names[0]
        table = layouts.tensor_source(self.config, "decoder.embed_tokens.weight").names[0]
        if stored != head or not self._is_stored(table):
            return "config.json needs it, download it again"
        if not may_tie(self.config.layout, self.config.decoder.architecture):
            return (
                "in this family heads are never tied, whatever llm_config.tie_word_embeddings says in config.json; if "
                f"the model was trained with a tied head, store a copy of {table} under this name"
            )
        return (
            "config.json says tie_word_embeddings false, so a head of its own is needed; correct it or download again"
        )

    def _check_one(self, stored: str, shape: tuple[int, ...]) -> None:
        tensor = self._stored.get(stored)
        if tensor is None:
            raise CheckpointError(f"{self.folder}: tensor {stored} is missing; {self._missing_advice(stored)}")
        if tensor.shape != shape:
            vocabulary = self.config.decoder.vocab_size
            resized = shape[0] == vocabulary != tensor.shape[0] and tensor.shape[1:] == shape[1:]
            advice = f"; if the vocabulary was resized, vocab_size there should be {tensor.shape[0]}" if resized else ""
            raise CheckpointError(
                f"{self.folder}: tensor {stored} has the shape {list(tensor.shape)}, config.json needs {list(shape)}"
                f"{advice}"
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.folder}: tensor {stored} has dtype {tensor.dtype}, expected {', '.join(FLOATS)}"
            )


def _canonical_prefixes(stored: dict[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    if not any(name.startswith("model.") for name in stored):
        return stored
    return {layouts.without_prefix(config, name): tensor for name, tensor in stored.items()}
