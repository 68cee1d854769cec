"""Time and memory of calibrating and quantising a checkpoint in one command, against the limits set for it.

    python benchmarks/quantize_memory.py CHECKPOINT [--limit-seconds 600] [--limit-anonymous-gb 3]

The data: 64 samples of about 512 tokens, each with one picture of one tile. Anonymous memory is what a machine must
really have free; hidden states and weights are mapped files, whose pages can be dropped at any time.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image
from record import run_measured, write_results

from internvl_edge.config_reader import read_config
from internvl_edge.export.tokenizer import build_tokenizer

WORDS = "the of and a total price date 图像 文字 number page name what is in this picture 2024 17.50".split()  # noqa: SIM905


def write_data(folder: Path, checkpoint: Path, samples: int, tokens: int) -> Path:
    """Pictures of smooth noise and answers long enough for `tokens` tokens with the picture's."""
    config = read_config(checkpoint)
    tokenizer = tokenizers.Tokenizer.from_buffer(build_tokenizer(checkpoint, config))
    size, chooser, noise = config.vision.image_size, random.Random(0), np.random.default_rng(0)
    lines = []
    for index in range(samples):
        coarse = Image.fromarray(noise.integers(0, 256, (14, 14, 3), np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg")
        answer = ""
        while len(tokenizer.encode(answer).ids) < tokens - config.tokens_per_tile - 90:
            answer += chooser.choice(WORDS) + " "
        lines.append(json.dumps({"images": [f"{index}.jpg"], "prompt": "What does it say?", "answer": answer}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def main() -> None:
    """Quantise once and write `results/quantize-NAME.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="about this many in each sample")
    parser.add_argument("--limit-seconds", type=float)
    parser.add_argument("--limit-anonymous-gb", type=float)
    parser.add_argument("--name", help="of the results, beside the checkpoint's")
    parser.add_argument("--keep", type=Path, help="keep the checkpoint here")
    arguments, options = parser.parse_known_args()  # the rest goes to internvl-edge quantize
    scratch = Path(tempfile.mkdtemp(dir=arguments.checkpoint.resolve().parent))
    out = arguments.keep or scratch / "out"
    program = [sys.executable, "-c", "from internvl_edge.cli import main; main()"]
    try:
        data = write_data(scratch, arguments.checkpoint, arguments.samples, arguments.tokens)
        command = ["quantize", str(arguments.checkpoint), "--data", str(data), "-o", str(out), "--json", *options]
        run = run_measured([*program, *command], interval_s=0.05)
    finally:
        shutil.rmtree(scratch)
    facts = json.loads(run.stdout)
    figures = {
        "checkpoint": arguments.checkpoint.name,
        **{name: facts[name] for name in ("recipe", "samples", "tokens", "image_tokens", "bytes")},
        "wall_s": round(run.wall_s, 1),
        "cpu_s": round(run.cpu_s, 1),
        "peak_rss": run.peak_rss,
        "peak_anonymous": run.peak_anonymous,
        "limit_seconds": arguments.limit_seconds,
        "limit_anonymous": arguments.limit_anonymous_gb and int(arguments.limit_anonymous_gb * 1e9),
    }
    name = "-".join(filter(None, ["quantize", arguments.checkpoint.name, arguments.name]))
    path = write_results(name, figures)
    print(f"{path}: {run.wall_s:.0f} s, {run.cpu_s:.0f} CPU s, {run.peak_anonymous / 1e9:.2f} GB anonymous")


if __name__ == "__main__":
    main()
