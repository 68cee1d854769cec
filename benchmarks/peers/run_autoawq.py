"""AutoAWQ 0.2.9 on a Llama folder: run_autoawq.py MODEL TOKENS.npy OUT --group-size 64.

Needs the `autoawq` environment. OUT becomes an AutoAWQ checkpoint as the tool itself writes it, with its
defaults apart from what is said here.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from awq import AutoAWQForCausalLM
from transformers import AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--group-size", type=int, required=True)
    options = parser.parse_args()
    tokens = np.load(options.tokens).tolist()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoAWQForCausalLM.from_pretrained(
        options.model, torch_dtype=torch.float32, device_map="cpu", safetensors=True
    )
    config = {"zero_point": True, "q_group_size": options.group_size, "w_bit": 4, "version": "GEMM"}
    model.quantize(
        tokenizer,
        quant_config=config,
        calib_data=tokens,
        max_calib_samples=len(tokens),
        max_calib_seq_len=len(tokens[0]),
    )
    model.save_quantized(options.out)


if __name__ == "__main__":
    main()
