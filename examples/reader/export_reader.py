"""Write the trained reader as a checkpoint folder: `python export_reader.py --state STATE --layout qwen2 --out FOLDER`.

Uses the averaged weights of a training state. The folder is an ordinary InternVL 2.5 checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from batches import encoder
from checkpoint import write_checkpoint
from model import Reader, ReaderConfig
from torch import Tensor

LAYOUTS = ("qwen2", "internlm2")
RMS_NORM_EPS = {"qwen2": 1e-6, "internlm2": 1e-5}


def layout_config(layout: str) -> ReaderConfig:
    """Sizes and constants of a layout: Qwen2 has biases on q, k and v, InternLM2 a larger epsilon."""
    return ReaderConfig(encoder().get_vocab_size(), rms_norm_eps=RMS_NORM_EPS[layout], qkv_bias=layout == "qwen2")


def rounded_reader(weights: dict[str, Tensor], layout: str) -> Reader:
    """The network a checkpoint of these weights holds: values rounded to bfloat16, computed in float32."""
    reader = Reader(layout_config(layout))
    reader.load_state_dict({name: w.to(torch.bfloat16).float() for name, w in weights.items()}, strict=False)
    return reader.eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="reader.pt of a training run")
    parser.add_argument("--layout", choices=LAYOUTS, default="qwen2")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    state = torch.load(a.state, weights_only=True)
    write_checkpoint(state["average"], layout_config(a.layout), a.layout, a.out)
    print(f"{a.out}: {a.layout} layout after {state['step']} steps")


if __name__ == "__main__":
    main()
