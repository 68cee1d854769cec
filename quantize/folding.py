"""Where input scales can be folded: a table of (producer, consumers) per architecture, and the exact algebra for it.

The consumers' weights are multiplied by s per input channel, and the producer of those inputs is divided by s. The
model therefore computes the same. The table uses canonical tensor names: value rows are always rows of v_proj, even
where a layout interleaves them (InternLM2's fused wqkv). A pair that cannot be folded exactly is not in the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from internvl_edge.model.config import DecoderConfig


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that share one input, and the tensor that the input's scale folds into.

    Attributes:
        producer: a norm, or a linear whose output channel i is the consumers' input channel i.
        consumers: linears by their name in the layer. The statistics of the input are stored under the first one.
        through_heads: True where the producer is v_proj. With grouped queries, one value channel then feeds several
            input channels.
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
# These architectures have the same canonical names. An architecture with another block needs its own line. The norms
# of q and k in Qwen3 are between no producer and its consumers.
SCALE_GROUPS: dict[str, tuple[ScaleGroup, ...]] = dict.fromkeys(("qwen2", "qwen3", "internlm2", "llama"), _LLAMA)
HEAD_GROUP = ScaleGroup("norm", ("lm_head",))


def reduce_channels(values: Tensor, group: ScaleGroup, decoder: DecoderConfig, largest: bool = False) -> Tensor:
    """Reduce values per input channel [in] to values per producer channel.

    The result is the mean (or the largest) over the input channels that a producer channel feeds.
    """
    if not group.through_heads:
        return values
    shape = (decoder.num_key_value_heads, decoder.num_query_groups, decoder.head_dim)
    heads = values.reshape(shape)
    return (heads.amax(1) if largest else heads.mean(1)).flatten()


def spread_channels(values: Tensor, group: ScaleGroup, decoder: DecoderConfig) -> Tensor:
    """Expand values per producer channel to values per input channel [in].

    All query heads of a group get the values of the value head that they share.
    """
    if not group.through_heads:
        return values
    heads = values.reshape(decoder.num_key_value_heads, 1, decoder.head_dim)
    return heads.expand(-1, decoder.num_query_groups, -1).flatten()


def storable_scale(scale: Tensor, vector: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the scale nearest to `scale` that divides a stored vector exactly, and the divided vector.

    Norm weights and biases are stored in 16 bits. The quotient is rounded first, and the scale becomes vector / rounded
    quotient, so that the product of the two is the vector up to float32. Where the vector is 0, the scale does not
    change. Where the quotient would become 0 or infinite, the vector does not change and the scale is 1.

    Args:
        scale: [channels] float32, positive.
        vector: [channels] in its stored type, or None where nothing is rounded.
    """
    if vector is None:
        return scale, None
    exact = vector.double()
    divided = (exact / scale.double()).to(vector.dtype)
    lost = (divided == 0) & (vector != 0)
    divided = torch.where(lost | ~torch.isfinite(divided), vector, divided)
    fitted = torch.where(vector == 0, scale.double(), exact / divided.double())
    return fitted.float(), divided
