"""The vision graph: uint8 tiles -> image tokens. It follows the original code: InternViT, pixel shuffle, projector.

    pixels [tiles, S, S, 3] uint8 -> image_embeds [tiles, tokens_per_tile, hidden]

Some exact algebra is done at export. Pixel normalization is folded into the patch embedding, its bias into the position
embedding, and layer scale into `proj` and `fc2`. Linears that are int8 in the checkpoint stay int8. The rest of the
graph computes in floats.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from internvl_edge.model.config import PIXEL_MEAN, PIXEL_STD, PROJECTOR_NORM_EPS, ModelConfig

from .builder import GraphBuilder, Heads, Source, Types, Weights
from .int8 import IntegerMatMul
from .weights import Array

# Pixels enter as pixel / 256. This is exact in float16 and bfloat16, and the folded weights keep their magnitude.
PIXEL_SCALE = 2.0**-8


class FoldedVision:
    """A checkpoint's vision tensors after folding, in float64 where values change."""

    def __init__(self, checkpoint: Source) -> None:
        self._checkpoint = checkpoint
        layers = checkpoint.config.vision_layers_used
        self._scale_of = {f"vision.layers.{n}.attn.proj": f"vision.layers.{n}.ls1" for n in range(layers)}
        self._scale_of |= {f"vision.layers.{n}.mlp.fc2": f"vision.layers.{n}.ls2" for n in range(layers)}

    def read(self, name: str) -> Array:
        """Return one tensor by canonical name. The rows of `proj` and `fc2` are multiplied by their layer scale."""
        array = self._checkpoint.tensor(name)
        factor = self.layer_scale(name.rpartition(".")[0])
        if factor is None:
            return array
        scaled: Array = array.astype(np.float64) * (factor[:, None] if array.ndim == 2 else factor)
        return scaled

    def layer_scale(self, name: str) -> Array | None:
        """Return the factor of a linear's outputs, [out] float64, or None for all linears but `proj` and `fc2`."""
        scale = self._scale_of.get(name)
        return None if scale is None else self._checkpoint.tensor(scale).astype(np.float64)

    def patch_weight(self) -> Array:
        """Return the weight [patch * patch * 3, hidden] for (row, column, channel) patches of pixel * PIXEL_SCALE."""
        weight: Array = self._kernel() / (np.array(PIXEL_STD)[:, None, None] * 255 * PIXEL_SCALE)
        return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])

    def patch_positions(self) -> Array:
        """Return [1, patches, hidden]: position embedding + convolution bias - contribution of the subtracted mean."""
        offset = np.einsum("ocij,c->o", self._kernel(), np.array(PIXEL_MEAN) / np.array(PIXEL_STD))
        bias: Array = self._double("vision.patch_embedding.bias") - offset
        return np.asarray(self._double("vision.position_embedding")[:, 1:] + bias)

    def class_token(self) -> Array:
        """Return [1, 1, hidden]: the class embedding plus its position embedding."""
        return self._double("vision.class_embedding") + self._double("vision.position_embedding")[:, :1]

    def _kernel(self) -> Array:
        return self._double("vision.patch_embedding.weight")

    def _double(self, name: str) -> Array:
        return np.asarray(self._checkpoint.tensor(name), np.float64)


def build_vision(
    checkpoint: Source, types: Types, file: Weights, builder: Callable[..., GraphBuilder] = GraphBuilder
) -> ir.Model:
    """Build the vision model of a checkpoint with the operators of a builder. Weights are placed in `file`."""
    config = checkpoint.config
    folded = FoldedVision(checkpoint)
    integers = IntegerMatMul(checkpoint, folded.layer_scale)
    g = builder("vision", types, file, checkpoint.shapes, folded.read, integers)
    size = config.vision.image_size
    pixels = g.input("pixels", ir.DataType.UINT8, ["tiles", size, size, 3])
    x = _embed(g, config, folded, pixels)
    for n in range(config.vision_layers_used):
        x = _block(g, config, x, f"vision.layers.{n}")
    embeds = _project(g, config, _pixel_shuffle(g, config, x))
    g.output(embeds, "image_embeds", types.activations, ["tiles", config.tokens_per_tile, config.decoder.hidden_size])
    return g.model()


def _embed(g: GraphBuilder, config: ModelConfig, folded: FoldedVision, pixels: ir.Value) -> ir.Value:
    """Embed the patches in row-major order, with the class token first.

    The convolution's stride equals its kernel, so it is written as one matrix product.
    """
    vision = config.vision
    grid, patch, hidden = vision.grid_size, vision.patch_size, vision.hidden_size
    if not g.moves_bytes:
        pixels = g.bytes_to_floats(pixels)
    patches = g.reshape(pixels, [0, grid, patch, grid, patch, 3])
    patches = g.reshape(g.op("Transpose", patches, perm=[0, 1, 3, 2, 4, 5]), [0, grid * grid, patch * patch * 3])
    x = g.op("Mul", g.bytes_to_floats(patches) if g.moves_bytes else patches, g.floats(PIXEL_SCALE))
    weight = g.matrix("vision.patch_embedding.folded", (patch * patch * 3, hidden), folded.patch_weight, folded=True)
    positions = g.vector("vision.position_embedding.folded", (1, grid * grid, hidden), folded.patch_positions)
    x = g.op("Add", g.op("MatMul", x, weight), positions)
    token = g.vector("vision.class_embedding.folded", (1, 1, hidden), folded.class_token)
    tiles = g.op("Shape", pixels, start=0, end=1)
    token = g.op("Expand", token, g.op("Concat", tiles, g.constant([1, hidden]), axis=0))
    return g.op("Concat", token, x, axis=1)


def _norm(g: GraphBuilder, config: ModelConfig, x: ir.Value, name: str) -> ir.Value:
    norm = g.layer_norm if config.vision.norm_type == "layer_norm" else g.rms_norm
    return norm(x, name, config.vision.layer_norm_eps)


def _block(g: GraphBuilder, config: ModelConfig, x: ir.Value, block: str) -> ir.Value:
    vision = config.vision
    q, k, v = g.split(g.linear(_norm(g, config, x, f"{block}.norm1"), f"{block}.attn.qkv"), 3)
    if vision.qk_normalization:  # the norm is over all heads together, before they are split
        q = g.rms_norm(q, f"{block}.attn.q_norm", vision.qk_norm_eps)
        k = g.rms_norm(k, f"{block}.attn.k_norm", vision.qk_norm_eps)
    heads = vision.num_attention_heads
    attended = g.attention(q, k, v, Heads(heads, heads, vision.hidden_size // heads))
    x = g.op("Add", x, g.linear(attended, f"{block}.attn.proj", folded=True))
    hidden = g.op("Gelu", g.linear(_norm(g, config, x, f"{block}.norm2"), f"{block}.mlp.fc1"))
    return g.op("Add", x, g.linear(hidden, f"{block}.mlp.fc2", folded=True))


def _pixel_shuffle(g: GraphBuilder, config: ModelConfig, x: ir.Value) -> ir.Value:
    """Drop the class token and merge r x r neighbors: channels [x(ri, rj), x(ri, rj+1), ..., x(ri+r-1, rj+r-1)].

    Version 1 of the original lacks the last transposition, so its tokens are in column order.
    """
    r, grid, hidden = config.shuffle, config.vision.grid_size, config.vision.hidden_size
    x = g.slice(x, g.constant([1]), g.constant([grid * grid + 1]), axis=1)
    x = g.reshape(x, [0, grid // r, r, grid // r, r, hidden])
    perm = [0, 1, 3, 2, 4, 5] if config.ps_version == "v2" else [0, 3, 1, 2, 4, 5]
    return g.reshape(g.op("Transpose", x, perm=perm), [0, config.tokens_per_tile, config.projector_input_size])


def _project(g: GraphBuilder, config: ModelConfig, x: ir.Value) -> ir.Value:
    x = g.layer_norm(x, "projector.norm", PROJECTOR_NORM_EPS)
    return g.linear(g.op("Gelu", g.linear(x, "projector.fc1")), "projector.fc2")
