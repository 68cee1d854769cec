"""Count the bytes and operations of a model from its configuration alone: weights by part, KV cache and activations.

Counts from shapes are exact (weights, token table, KV cache, multiplications). Activations are an estimate. This module
knows shapes and how tensors are stored. It does not know devices or files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from internvl_edge.bundle.token_table import table_bytes, table_type
from internvl_edge.checkpoint.layouts import tensor_shapes
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.linear import INT8, Scheme

# Tensors that export folds into other weights.
_FOLDED = (".ls1", ".ls2")
# The most inputs that share one scale in the onnxruntime dialect.
_LARGEST_BLOCK = 128


@dataclass(frozen=True)
class Storage:
    """How the parts of a model are stored and computed.

    Attributes:
        dtype_bytes: bytes of a value in float matrices, and in the token table unless it is int8: 2 or 4.
        vector_bytes: bytes of a value in norms, biases and scales.
        body: scheme of the linears in the decoder's layers, None for floats.
        head: scheme of `lm_head`, None for floats.
        vision: scheme of the linears of the vision tower and projector, None for floats.
        cache_bytes: bytes of a value in the KV cache.
        floats: canonical names of linears that stay floats although their part has a scheme.
        table: type of the token table: "float" (`dtype_bytes`), "int8" or "auto", which is what `export` makes.
        dialect: dialect of the decoder: "onnxruntime" stores zero points, "standard" stores their exact correction.
        some_int8: whether some linears in the decoder's layers have int8 weights and floating-point inputs, although
            `body` is another scheme.
    """

    dtype_bytes: int = 2
    vector_bytes: int = 2
    body: Scheme | None = None
    head: Scheme | None = None
    vision: Scheme | None = None
    cache_bytes: int = 2
    floats: tuple[str, ...] = ()
    table: str = "auto"
    dialect: str = "standard"
    some_int8: bool = False

    @property
    def quantizes_layers(self) -> bool:
        """Whether linears in the decoder's layers are quantized."""
        return self.body is not None or self.some_int8

    @property
    def has_int8_body(self) -> bool:
        """Whether linears in the decoder's layers have int8 weights and floating-point inputs."""
        return self.some_int8 or is_int8_weight_only(self.body)

    def matrix_bytes(self, inputs: int, outputs: int, scheme: Scheme | None) -> int:
        """Return the bytes of one linear's weights: integers, scales, and zero points or their corrections."""
        if scheme is None:
            return inputs * outputs * self.dtype_bytes
        groups = inputs // scheme.group_size if scheme.group_size else 1
        if self.dialect == "onnxruntime" and not scheme.static_inputs:
            groups = max(groups, math.ceil(inputs / _LARGEST_BLOCK))
        scales = groups * outputs * self.vector_bytes
        zeros = math.ceil(groups * outputs * scheme.bits / 8) if self.dialect == "onnxruntime" else scales
        return math.ceil(inputs * outputs * scheme.bits / 8) + scales + (0 if scheme.symmetric else zeros)


def is_int8_weight_only(scheme: Scheme | None) -> bool:
    """Return whether weights are int8 and inputs are floats."""
    return scheme is not None and scheme.bits == 8 and not scheme.static_inputs


INT4 = Scheme(4, 128, True)
# The recipes that `plan` compares. All have 16-bit activations.
RECIPES = {
    "fp16": Storage(),
    "w8a16": Storage(body=INT8, head=INT8),
    "w4a16": Storage(body=INT4),
    "w4a16, int8 head": Storage(body=INT4, head=INT8),
    "w4a16, int8 head and vision": Storage(body=INT4, head=INT8, vision=INT8),
    "w4a16, int8 head, vision and cache": Storage(body=INT4, head=INT8, vision=INT8, cache_bytes=1),
}


def builder_bytes(graph_weights: int, further: int = 0, twice: int = 0) -> int:
    """Estimate the bytes of free memory that the build of a TensorRT engine needs.

    Args:
        graph_weights: the bytes of a graph's weights.
        further: the number of programs beside the first one.
        twice: the bytes of those weights that the engine stores in two orders (`Footprint.twice_bytes`).

    Measured with TensorRT for RTX 1.7, without mapped files: 2.8 GB for a decoder of 0.99 GB; 5.7 GB with two further
    programs, where 0.72 GB of it are stored twice; 5.3 GB for an int4 decoder of 0.97 GB with two further programs; and
    2.2 GB for a vision tower of 0.62 GB beside an int4 decoder with corrections (docs/performance.md).
    """
    return int(0.5e9 + (2.7 + 1.1 * further) * graph_weights + 0.5 * twice)


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights by part."""

    vision: int
    decoder: int
    head: int
    embeddings: int


class Footprint:
    """The bytes and operations of one model with one storage."""

    def __init__(self, config: ModelConfig, storage: Storage) -> None:
        self.config = config
        self.storage = storage
        self._shapes = tensor_shapes(config)

    @cached_property
    def weights(self) -> Weights:
        """The bytes of the weights, as a bundle stores them."""
        sizes = {"vision": 0, "decoder": 0, "head": 0, "embeddings": 0}
        for name, shape in self._shapes.items():
            if name.endswith(_FOLDED) or not self._is_used(name):
                continue
            sizes[_part(name)] += self._tensor_bytes(name, shape)
        return Weights(**sizes)

    def twice_bytes(self, flavour: str, rows: int = 1) -> int:
        """Return the bytes of decoder and head that programs for steps of one token store in another order.

        An engine for four rows was larger by about the bytes of an int8 head, so the head counts for several rows.
        Otherwise, TensorRT for RTX 1.7 shares the head, and integers with floating-point inputs, among its programs. It
        stores floats, and integers with int8 inputs, twice. It is not known what TensorRT shares, so all weights count.
        """
        if flavour == "tensorrt":
            return self.weights.decoder + self.weights.head
        return (self.weights.head if rows > 1 else 0) + sum(
            self._tensor_bytes(name, shape)
            for name, shape in self._shapes.items()
            if len(shape) == 2 and _part(name) == "decoder" and not self._is_weight_only(name)
        )

    def _is_weight_only(self, name: str) -> bool:
        scheme = self._scheme(name)
        return scheme is not None and not scheme.static_inputs

    def cache_bytes(self, tokens: int) -> int:
        """Return the bytes of the KV cache for a context of `tokens` tokens."""
        decoder = self.config.decoder
        per_token = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
        return per_token * tokens * self.storage.cache_bytes

    def activation_bytes(self, tiles: int, chunk: int, slots: int = 0, rows: int = 1) -> int:
        """Estimate the peak bytes of activations for `tiles` tiles encoded together and `chunk` prompt tokens per step.

        This counts the tensors alive at the widest place of one block, in 16 bits, and the logits of one position of
        each row in float32. With `slots`, those of the KV cache, attention is not one kernel, as before TensorRT 10.15:
        its scores are in memory before and after the softmax, and keys and values are repeated for the query heads, in
        a step of one token for all `rows`.
        """
        vision, decoder = self.config.vision, self.config.decoder
        patches = vision.grid_size**2 + 1
        tower = tiles * patches * 2 * (2 * vision.hidden_size + 2 * vision.intermediate_size)
        pixels = tiles * vision.image_size**2 * 3 * 3  # uint8 and 16 bits
        text = chunk * 2 * (3 * decoder.hidden_size + 3 * decoder.intermediate_size)
        if slots:
            heads, seen = decoder.num_attention_heads, slots + chunk
            tower += 2 * 2 * tiles * vision.num_attention_heads * patches**2
            prompt, step = (chunk + decoder.head_dim), rows * (1 + decoder.head_dim)
            text += 2 * 2 * heads * seen * max(prompt, step)
        return max(tower + pixels, text + 6 * rows * decoder.vocab_size)

    def vision_operations(self, tiles: int) -> float:
        """Return the multiplications and additions to encode tiles: linears of tower and projector, and attention."""
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
        """Return the multiplications and additions of a prompt: decoder linears, causal attention, lm_head once."""
        decoder = self.config.decoder
        body = sum(
            math.prod(shape) for name, shape in self._shapes.items() if _part(name) == "decoder" and len(shape) == 2
        )
        width = decoder.num_attention_heads * decoder.head_dim
        attention = 2 * tokens**2 * width * decoder.num_hidden_layers
        return 2.0 * body * tokens + attention + 2.0 * decoder.vocab_size * decoder.hidden_size

    def decode_bytes(self, length: int, rows: int = 1) -> int:
        """Return the bytes read for one more token of each row: decoder, head, and KV caches of `length` tokens."""
        return self.weights.decoder + self.weights.head + rows * self.cache_bytes(length)

    def with_storage(self, storage: Storage) -> Footprint:
        """Return the footprint of the same model with another storage."""
        return Footprint(self.config, replace(storage))

    def _tensor_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        part, storage = _part(name), self.storage
        if part == "embeddings" and table_type(storage.table, storage.quantizes_layers) == "int8":
            return table_bytes((shape[0], shape[1]), "int8")
        if len(shape) == 2:
            return storage.matrix_bytes(shape[1], shape[0], self._scheme(name))
        if name == "vision.patch_embedding.weight":
            return math.prod(shape) * storage.dtype_bytes
        return math.prod(shape) * storage.vector_bytes

    def _scheme(self, name: str) -> Scheme | None:
        storage = self.storage
        schemes = {"vision": storage.vision, "decoder": storage.body, "head": storage.head}
        return None if name.removesuffix(".weight") in storage.floats else schemes.get(_part(name))

    def _is_used(self, name: str) -> bool:
        layer = name.removeprefix("vision.layers.").partition(".")[0] if name.startswith("vision.layers.") else "0"
        return int(layer) < self.config.vision_layers_used


def _part(name: str) -> str:
    if name.startswith("decoder."):
        return {"embed_tokens": "embeddings", "lm_head": "head"}.get(name.split(".")[1], "decoder")
    return "vision"
