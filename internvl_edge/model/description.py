"""What a model is, in a few rows for people: for `inspect` and for reports."""

from __future__ import annotations

from internvl_edge.base.units import size

from .components import DTYPE_BYTES
from .config import ModelConfig

# The families of checkpoints by what tells them apart, the first that fits.
_FAMILIES: tuple[tuple[str, dict[str, tuple[str, ...]]], ...] = (
    ("InternVL2", {"template": ("Hermes-2", "internlm2-chat")}),
    ("InternVL3.5", {"architecture": ("qwen3",)}),
    ("InternVL3", {"architecture": ("qwen2",), "scaling": ("dynamic",)}),
    ("InternVL2.5", {}),
)


def family(config: ModelConfig) -> str:
    """Return the family of published checkpoints that a model has the form of."""
    decoder = config.decoder
    facts = {
        "template": config.template,
        "architecture": decoder.architecture,
        "scaling": decoder.rope.scaling,
    }
    return next(name for name, form in _FAMILIES if all(facts[key] in values for key, values in form.items()))


def describe(config: ModelConfig, cache: str) -> tuple[tuple[str, str], ...]:
    """Return (label, text) rows.

    Args:
        config: the model.
        cache: what its KV cache holds: "float32", "float16", "bfloat16" or "int8".
    """
    vision, decoder = config.vision, config.decoder
    rope = f"theta {decoder.rope.theta:g}"
    if decoder.rope.scaling != "none":
        rope += f", {decoder.rope.scaling} x {decoder.rope.factor:g} beyond {decoder.max_position_embeddings} tokens"
    heads = f"{decoder.num_attention_heads} query, {decoder.num_key_value_heads} key/value, {decoder.head_dim} wide"
    numbers = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    return (
        ("family", family(config)),
        (
            "vision",
            f"{vision.num_hidden_layers} layers x {vision.hidden_size}, {vision.norm_type}, {vision.image_size} px",
        ),
        ("tiles", f"{config.min_tiles} to {config.max_tiles}, {config.tokens_per_tile} tokens each"),
        ("decoder", f"{decoder.architecture}, {decoder.num_hidden_layers} layers x {decoder.hidden_size}"),
        ("heads", heads),
        ("vocabulary", str(decoder.vocab_size)),
        ("rotary", rope),
        ("KV cache", f"{size(numbers * DTYPE_BYTES[cache])} per token in {cache}"),
        ("template", config.template),
    )
