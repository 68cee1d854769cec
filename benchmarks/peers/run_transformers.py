"""transformers' own logits of the model in the wheel: run_transformers.py GGUF TOKENS.npy OUT.npy.

Needs an environment with torch, transformers and gguf (`modelopt` has them). transformers reads the file by itself,
so nothing of this project lies between the wheel and OUT, float32 [sequences, tokens, vocab].
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    gguf, tokens, out = map(Path, sys.argv[1:4])
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    with torch.no_grad():
        np.save(out, model(torch.from_numpy(np.load(tokens)).long()).logits.float().numpy())


if __name__ == "__main__":
    main()
