"""Bytes and operations of a model from its configuration alone: weights by part, KV cache, activations.

Exact for what is counted from shapes (weights, token table, KV cache, multiplications); activations are an estimate.
Knows shapes and how they are stored, no device and no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from internvl_edge.bundle.token_table import table_bytes
from internvl_edge.checkpoint.layouts import tensor_shapes
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.linear import INT8, Scheme

# What becomes part of another weight when a bundle is exported.
_FOLDED = (".ls1", ".ls2")
# Inputs that share one scale in ONNX Runtime's form at most.
_LARGEST_BLOCK = 128


@dataclass(frozen=True)
class Storage:
    """How the parts of a model are stored and computed.

    Attributes:
        dtype_bytes: of unquantized matrices, and of the token table unless it is int8: 2 or 4.
        vector_bytes: of norms, biases and scales.
        body: how decoder linears are rounded, None for floats.
        head: how `lm_head` is rounded, None for floats.
        vision: how vision linears are rounded, None for floats.
        cache_bytes: of one number in the KV cache.
        floats: linears that stay floats whatever the scheme of their part, by canonical name.
        table: how the token table is stored: "float" (`dtype_bytes`) or "int8".
        dialect: of the decoder: "onnxruntime" has zero points as they are, "standard" their exact correction.
    """

    dtype_bytes: int = 2
    vector_bytes: int = 2
    body: Scheme | None = None
    head: Scheme | None = None
    vision: Scheme | None = None
    cache_bytes: int = 2
    floats: tuple[str, ...] = ()
    table: str = "float"
    dialect: str = "standard"

    def matrix_bytes(self, inputs: int, outputs: int, scheme: Scheme | None) -> int:
        """One linear's weights: integers, scales and what stands for zero points."""
        if scheme is None:
            return inputs * outputs * self.dtype_bytes
        groups = inputs // scheme.group_size if scheme.group_size else 1
        if self.dialect == "onnxruntime" and not scheme.static_inputs:
            groups = max(groups, math.ceil(inputs / _LARGEST_BLOCK))
        scales = groups * outputs * self.vector_bytes
        zeros = math.ceil(groups * outputs * scheme.bits / 8) if self.dialect == "onnxruntime" else scales
        return math.ceil(inputs * outputs * scheme.bits / 8) + scales + (0 if scheme.symmetric else zeros)


INT4 = Scheme(4, 128, True)
# What `plan` compares, all with 16-bit activations.
RECIPES = {
    "fp16": Storage(),
    "w8a16": Storage(body=INT8, head=INT8),
    "w4a16": Storage(body=INT4),
    "w4a16, int8 head": Storage(body=INT4, head=INT8),
    "w4a16, int8 head and vision": Storage(body=INT4, head=INT8, vision=INT8),
    "w4a16, int8 head, vision and cache": Storage(body=INT4, head=INT8, vision=INT8, cache_bytes=1),
}


def builder_bytes(graph_weights: int) -> int:
    """An estimate of the memory that must be free to build a TensorRT engine, from the bytes of a graph's weights.

    Measured with TensorRT for RTX 1.7, beside mapped files: 2.8 GB for 0.99 GB of weights, 2.2 GB for 0.62 GB and a
    decoder in int4 with corrections (docs/performance.md).
    """
    return int(0.5e9 + 2.7 * graph_weights)


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights by part."""

    vision: int
    decoder: int
    head: int
    embeddings: int


class Footprint:
    """Bytes and operations of one model, stored one way."""

    def __init__(self, config: ModelConfig, storage: Storage) -> None:
        self.config = config
        self.storage = storage
        self._shapes = tensor_shapes(config)

    @cached_property
    def weights(self) -> Weights:
        """Bytes of weights, as a bundle stores them."""
        sizes = {"vision": 0, "decoder": 0, "head": 0, "embeddings": 0}
        for name, shape in self._shapes.items():
            if name.endswith(_FOLDED) or not self._is_used(name):
                continue
            sizes[_part(name)] += self._tensor_bytes(name, shape)
        return Weights(**sizes)

    def cache_bytes(self, tokens: int) -> int:
        """The KV cache of a context of so many tokens."""
        decoder = self.config.decoder
        per_token = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
        return per_token * tokens * self.storage.cache_bytes

    def activation_bytes(self, tiles: int, chunk: int) -> int:
        """An estimate of the largest intermediate results: `tiles` encoded together, `chunk` prompt tokens at once.

        Counts what one block keeps alive at its widest place, in 16 bits, and the logits of one position in float32.
        """
        vision, decoder = self.config.vision, self.config.decoder
        patches = vision.grid_size**2 + 1
        tower = tiles * patches * 2 * (2 * vision.hidden_size + 2 * vision.intermediate_size)
        pixels = tiles * vision.image_size**2 * 3 * 3  # uint8 and 16 bits
        text = chunk * 2 * (3 * decoder.hidden_size + 3 * decoder.intermediate_size)
        return max(tower + pixels, text + 6 * decoder.vocab_size)

    def vision_operations(self, tiles: int) -> float:
        """Multiplications and additions to encode tiles: all linears of the tower and the projector, and attention."""
        vision = self.config.vision
        patches = vision.grid_size**2 + 1
        per_tile = 0.0
        for name, shape in self._shapes.items():
            if not name.startswith(("vision.layers", "projector", "vision.patch")) or not self._is_used(name):
                continue
            if len(shape) > 1 and not name.endswith(_FOLDED):
                rows = self.config.tokens_per_tile if name.startswith("projector") else patches
                per_tile += 2 * rows * math.prod(shape)
        attention = 4 * patches**2 * vision.hidden_size * self.config.vision_layers_used
        return tiles * (per_tile + attention)

    def prefill_operations(self, tokens: int) -> float:
        """Multiplications and additions of a prompt: decoder linears, causal attention, the head once."""
        decoder = self.config.decoder
        body = sum(
            math.prod(shape) for name, shape in self._shapes.items() if _part(name) == "decoder" and len(shape) == 2
        )
        width = decoder.num_attention_heads * decoder.head_dim
        attention = 2 * tokens**2 * width * decoder.num_hidden_layers
        return 2.0 * body * tokens + attention + 2.0 * decoder.vocab_size * decoder.hidden_size

    def decode_bytes(self, length: int) -> int:
        """Bytes read for one more token: decoder and head once, and the cache of what came before."""
        return self.weights.decoder + self.weights.head + self.cache_bytes(length)

    def with_storage(self, storage: Storage) -> Footprint:
        """The same model, stored another way."""
        return Footprint(self.config, replace(storage))

    def _tensor_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        part, storage = _part(name), self.storage
        if part == "embeddings" and storage.table == "int8":
            return table_bytes((shape[0], shape[1]), "int8")
        if len(shape) == 2:
            schemes = {"vision": storage.vision, "decoder": storage.body, "head": storage.head}
            scheme = None if name.removesuffix(".weight") in storage.floats else schemes.get(part)
            return storage.matrix_bytes(shape[1], shape[0], scheme)
        if name == "vision.patch_embedding.weight":
            return math.prod(shape) * storage.dtype_bytes
        return math.prod(shape) * storage.vector_bytes

    def _is_used(self, name: str) -> bool:
        layer = name.removeprefix("vision.layers.").partition(".")[0] if name.startswith("vision.layers.") else "0"
        return int(layer) < self.config.vision_layers_used


def _part(name: str) -> str:
    if name.startswith("decoder."):
        return {"embed_tokens": "embeddings", "lm_head": "head"}.get(name.split(".")[1], "decoder")
    return "vision"
