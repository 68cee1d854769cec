"""The peer of the GPU acceptance run: transformers' own decoder in torch, bfloat16, static cache, compiled.

    python benchmarks/gpu_peer.py CHECKPOINT            prints one JSON object

Random weights in the checkpoint's shape; the decoder alone, as Qwen2, Qwen3 or Llama, whichever the text model is.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from gpu_rows import CAPACITY, DEPTHS, PROMPT, REPEATS, STEPS

from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.model.config import DecoderConfig


def main() -> None:
    """Measure and print; what is missing is said in the row."""
    try:
        row = measure(read_config(Path(sys.argv[1])).decoder)
    except ImportError as error:
        row = {"refused": f"{error.name} is not installed"}
    except RuntimeError as error:  # torch's own: out of memory, no kernel for this GPU, a failed compilation
        row = {"refused": " ".join(str(error).split())[:200]}
    print(json.dumps({"engine": "torch, compiled"} | row))


def measure(decoder: DecoderConfig) -> dict[str, Any]:
    """Prefill and decoding in tokens/s, and memory."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        StaticCache,
    )

    if not torch.cuda.is_available():
        return {"refused": "torch finds no GPU"}
    sizes = {
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": decoder.num_hidden_layers,
        "num_attention_heads": decoder.num_attention_heads,
        "num_key_value_heads": decoder.num_key_value_heads,
        "intermediate_size": decoder.intermediate_size,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.max_position_embeddings,
        "head_dim": decoder.head_dim,
    }
    kinds: tuple[Any, Any] = (Qwen2Config, Qwen2ForCausalLM) if decoder.qkv_bias else (LlamaConfig, LlamaForCausalLM)
    if decoder.qk_norm:
        kinds = (Qwen3Config, Qwen3ForCausalLM)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = kinds[1](kinds[0](**sizes)).eval()
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    prompt = 0.02 * torch.randn(1, PROMPT, decoder.hidden_size, device="cuda")
    row: dict[str, Any] = {}
    with torch.inference_mode():

        def run(forward: Any, embeds: Any, start: int) -> Any:
            positions = torch.arange(start, start + embeds.shape[1], device="cuda")
            cached = {"past_key_values": cache, "cache_position": positions, "position_ids": positions[None]}
            return forward(inputs_embeds=embeds, logits_to_keep=1, use_cache=True, **cached).logits

        def seconds(work: Any) -> float:
            times = []
            for _ in range(2 + REPEATS):
                torch.cuda.synchronize()
                started = time.perf_counter()
                work()
                torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
            return median(times[2:])

        row["prefill_tokens_per_s"] = round(PROMPT / seconds(lambda: run(model, prompt, 0)))
        for depth in DEPTHS:

            def steps(depth: int = depth) -> None:
                for n in range(STEPS):
                    run(step, prompt[:, n : n + 1], depth + n).argmax().item()

            row[f"decode_tokens_per_s@{depth}"] = round(STEPS / seconds(steps), 1)
    row["memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
    return row


if __name__ == "__main__":
    main()
