"""transformers on torch in bfloat16 as a worker: cpu_transformers.py TEXT_MODEL.

The tower and projector are transformers' own classes with random weights in the published shapes, made when the first
tile comes.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from cpu_worker import STEPS, TEXT, THREADS, TILE, TILE_TOKENS, TOKEN, Action, serve, timed
from transformers import AutoModelForCausalLM, DynamicCache, InternVLConfig, InternVLModel, Qwen2Config

torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)


@cache
def tower(hidden_size: int) -> Any:
    """Tower and projector, under a text model of one small layer that is never called."""
    text = Qwen2Config(
        hidden_size=hidden_size, num_hidden_layers=1, intermediate_size=64, num_attention_heads=14, vocab_size=151674
    )
    vision = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": [TILE, TILE],
        "patch_size": [14, 14],
        "attention_bias": True,
    }
    torch.set_default_dtype(torch.bfloat16)
    return InternVLModel(InternVLConfig(vision_config=vision, text_config=text.to_dict())).eval()


def back_to(cache: DynamicCache, context: int) -> DynamicCache:
    """Forget what follows the first `context` tokens."""
    if further := cache.get_seq_length() - context:
        cache.crop(-further)
    return cache


def steps(model: Any, cache: DynamicCache, rows: int = 1) -> float:
    """Seconds of STEPS further tokens of each row of a cache."""
    tokens = torch.full((rows, 1), TOKEN)
    return timed(lambda: [model(tokens, past_key_values=cache, logits_to_keep=1) for _ in range(STEPS)])


def load() -> dict[str, Action]:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
    pixels = torch.randn(1, 3, TILE, TILE, dtype=torch.bfloat16)

    def prompted(count: int, image: Any = None, rows: int = 1) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        embeds = model.get_input_embeddings()(torch.full((rows, count), TOKEN))
        if image is not None:
            embeds = torch.cat([image, embeds], 1)
        model(inputs_embeds=embeds, past_key_values=cache, logits_to_keep=1)
        return cache

    def prefill(count: int) -> float:
        return timed(lambda: prompted(count))

    held: dict[int, DynamicCache] = {}  # by the tokens of their prompt; one at most

    def decode(context: int) -> float:
        if context not in held:
            held.clear()
            held[context] = prompted(context)
        return steps(model, back_to(held[context], context))

    def several(count: int) -> float:
        return steps(model, prompted(TEXT, rows=count), count)

    def encoded(count: int) -> Any:
        features = [
            tower(model.config.hidden_size).get_image_features(pixel_values=pixels).pooler_output for _ in range(count)
        ]
        return torch.cat(features).reshape(1, count * TILE_TOKENS, -1)

    def vision(count: int) -> float:
        tower(model.config.hidden_size)
        return timed(lambda: encoded(count))

    def first_token(count: int) -> float:
        tower(model.config.hidden_size)
        return timed(lambda: prompted(TEXT, encoded(count)))

    return {"prefill": prefill, "decode": decode, "vision": vision, "first_token": first_token, "rows": several}


if __name__ == "__main__":
    serve(load)
