"""Where input scales may go: a table of (producer, consumers) per architecture, and the exact algebra of moving them.

Consumers' weights are multiplied by s per input channel, and what produces those inputs is divided by s, so the model
computes the same. The table speaks of canonical tensors, whose value rows are rows of v_proj alone however a layout
interleaves them (InternLM2's fused wqkv); what cannot be folded exactly is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from internvl_edge.model.config import DecoderConfig


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that share one input, and what the input's scale folds into.

    Attributes:
        producer: a norm, or a linear whose output channel i is the consumers' input channel i.
        consumers: linears by their name in the layer; the first one names the input's statistics.
        through_heads: the producer is v_proj: with grouped queries, one value channel feeds several input channels.
    """

    producer: str
    consumers: tuple[str, ...]
    through_heads: bool = False


_LLAMA = (
    ScaleGroup("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",), through_heads=True),
    ScaleGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ScaleGroup("mlp.up_proj", ("mlp.down_proj",)),
)
# Canonical names are the same for all; an architecture with another block gets a line of its own.
SCALE_GROUPS: dict[str, tuple[ScaleGroup, ...]] = {"qwen2": _LLAMA, "internlm2": _LLAMA, "llama": _LLAMA}
HEAD_GROUP = ScaleGroup("norm", ("lm_head",))


def reduce_channels(values: Tensor, group: ScaleGroup, decoder: DecoderConfig, largest: bool = False) -> Tensor:
    """Figures per input channel [in] -> per producer channel: mean or largest over the channels that it feeds."""
    if not group.through_heads:
        return values
    shape = (decoder.num_key_value_heads, decoder.num_query_groups, decoder.head_dim)
    heads = values.reshape(shape)
    return (heads.amax(1) if largest else heads.mean(1)).flatten()


def spread_channels(values: Tensor, group: ScaleGroup, decoder: DecoderConfig) -> Tensor:
    """Figures per producer channel -> per input channel [in]; query heads of a group share their value head's."""
    if not group.through_heads:
        return values
    heads = values.reshape(decoder.num_key_value_heads, 1, decoder.head_dim)
    return heads.expand(-1, decoder.num_query_groups, -1).flatten()


def storable_scale(scale: Tensor, vector: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The scale nearest to `scale` that divides a stored vector exactly, and the vector after division.

    Norm weights and biases are stored in 16 bits: the quotient is rounded first, and the scale becomes vector /
    rounded quotient, so that the product of the two is the vector up to float32. Where the vector is 0 (or would
    become 0) the scale is what it was (or 1).

    Args:
        scale: [channels] float32, positive.
        vector: [channels] in its stored type, or None where nothing rounds.
    """
    if vector is None:
        return scale, None
    exact = vector.double()
    divided = (exact / scale.double()).to(vector.dtype)
    lost = (divided == 0) & (vector != 0)
    divided = torch.where(lost | ~torch.isfinite(divided), vector, divided)
    fitted = torch.where(vector == 0, scale.double(), exact / divided.double())
    return fitted.float(), divided
