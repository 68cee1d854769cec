"""Intel's AutoRound on a Llama folder: run_auto_round.py MODEL TOKENS.npy OUT --group-size 64.

Needs the `auto-round` environment. OUT becomes a folder with the float32 weights that the integers stand for. With zero
points, as ours, unless `--symmetric`; `--iters` is the number of optimization steps per block (the tool's default is
200, its light recipe has 50).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LIGHT_LEARNING_RATE = 5e-3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--symmetric", action="store_true")
    options = parser.parse_args()
    tokens = torch.from_numpy(np.load(options.tokens)).long()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rounding = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        scheme="W4A16",
        bits=4,
        group_size=options.group_size,
        sym=options.symmetric,
        dataset=[row[None] for row in tokens],
        iters=options.iters,
        lr=LIGHT_LEARNING_RATE if options.iters < 200 else None,
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=options.batch_size,
        device_map="cpu",
        amp=False,
    )
    quantized, _ = rounding.quantize()
    state = {name: value.float().contiguous().clone() for name, value in quantized.state_dict().items()}
    state.pop("lm_head.weight", None)  # the token table again
    _save(state, options.out)


def _save(state: dict[str, torch.Tensor], out: str) -> None:
    Path(out).mkdir(parents=True)
    save_file(state, Path(out) / "model.safetensors")


if __name__ == "__main__":
    main()
