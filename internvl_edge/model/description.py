"""What a model is, in a few rows for people."""

from __future__ import annotations

from .config import ModelConfig


def architecture(config: ModelConfig) -> tuple[tuple[str, str], ...]:
    """(label, text) rows."""
    vision, decoder = config.vision, config.decoder
    return (
        ("Vision tower", f"{vision.num_hidden_layers} layers, {vision.hidden_size} wide, {vision.image_size} px tiles"),
        ("Image tokens", f"{config.tokens_per_tile} per tile, at most {config.max_tiles} tiles"),
        (
            "Decoder",
            f"{decoder.architecture}, {decoder.num_hidden_layers} layers, {decoder.hidden_size} wide, "
            f"{decoder.num_attention_heads} query and {decoder.num_key_value_heads} key/value heads",
        ),
        ("Vocabulary", f"{decoder.vocab_size} tokens"),
    )
