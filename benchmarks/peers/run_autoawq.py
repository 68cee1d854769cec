"""AutoAWQ 0.2.9 on a Llama folder: run_autoawq.py MODEL TOKENS.npy OUT --group-size 64.

Needs the `autoawq` environment. OUT becomes an AutoAWQ checkpoint as the tool itself writes it, with its
defaults apart from what is said here.

One thing of it is mended. Before it tries scales it keeps a module's weights with `.cpu()`, which copies them from a
GPU and copies nothing on a CPU: the first scale it tries is multiplied into what it keeps, and stays in the model.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from transformers import AutoTokenizer


class CopyingQuantizer(AwqQuantizer):
    """Keeps copies of the weights while it tries scales, as the original does on a GPU."""

    def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, module: Any, *rest: Any) -> Any:
        kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        module.state_dict = lambda: kept
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module, *rest)
        finally:
            del module.state_dict


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
        quantizer_cls=CopyingQuantizer,
    )
    model.save_quantized(options.out)


if __name__ == "__main__":
    main()
