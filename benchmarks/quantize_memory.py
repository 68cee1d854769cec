"""Time and memory of calibrating and quantizing a checkpoint in one command, against the limits set for it.

    python benchmarks/quantize_memory.py CHECKPOINT [--limit-seconds 600] [--limit-anonymous-gb 3]
    python benchmarks/quantize_memory.py CHECKPOINT --work WORK --minutes 60    # again and again, until it has finished

The data: 64 samples of about 512 tokens, each with one picture of one tile. Anonymous memory is what a machine must
really have free; hidden states and weights are mapped files, whose pages can be dropped at any time. With --minutes the
quantizer is killed after that time; repeated with the same WORK, it continues, and the attempts' times are added up.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image
from record import Run, run_measured, write_results

from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.tokenizer_files import build_tokenizer

WORDS = "the of and a total price date 图像 文字 number page name what is in this picture 2024 17.50".split()  # noqa: SIM905


def write_data(folder: Path, checkpoint: Path, samples: int, tokens: int) -> Path:
    """Pictures of smooth noise and answers long enough for `tokens` tokens with the picture's."""
    folder.mkdir(parents=True, exist_ok=True)
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


def add_attempt(file: Path, run: Run) -> list[dict[str, float]]:
    """What all attempts have cost so far, this one included."""
    attempts: list[dict[str, float]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    attempts.append({name: getattr(run, name) for name in ("wall_s", "cpu_s", "peak_rss", "peak_anonymous")})
    file.write_text(json.dumps(attempts), encoding="utf-8")
    return attempts


def main() -> None:
    """Quantize once and write `results/quantize-NAME.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="about this many in each sample")
    parser.add_argument("--limit-seconds", type=float)
    parser.add_argument("--limit-anonymous-gb", type=float)
    parser.add_argument("--name", help="of the results, beside the checkpoint's")
    parser.add_argument("--work", type=Path, help="keep data and checkpoint here, and continue what is there")
    parser.add_argument("--minutes", type=float, default=math.inf, help="kill the quantizer after this time")
    arguments, options = parser.parse_known_args()  # the rest goes to internvl-edge quantize
    work = arguments.work or Path(tempfile.mkdtemp(dir=arguments.checkpoint.resolve().parent))
    program = [sys.executable, "-c", "from internvl_edge.cli import main; main()"]
    try:
        data = write_data(work / "data", arguments.checkpoint, arguments.samples, arguments.tokens)
        command = ["quantize", str(arguments.checkpoint), "--data", str(data), "-o", str(work / "out"), "--json"]
        run = run_measured([*program, *command, *options], interval_s=0.05, limit_s=60 * arguments.minutes)
        attempts = add_attempt(work / "attempts.json", run)
    finally:
        if arguments.work is None:
            shutil.rmtree(work)
    if run.stopped:
        sys.exit(f"stopped after {run.wall_s:.0f} s; the same command continues")
    facts = json.loads(run.stdout)
    figures = {
        "checkpoint": arguments.checkpoint.name,
        **{name: facts[name] for name in ("recipe", "samples", "tokens", "image_tokens", "bytes")},
        "attempts": len(attempts),
        "wall_s": round(sum(attempt["wall_s"] for attempt in attempts), 1),
        "cpu_s": round(sum(attempt["cpu_s"] for attempt in attempts), 1),
        "peak_rss": max(attempt["peak_rss"] for attempt in attempts),
        "peak_anonymous": max(attempt["peak_anonymous"] for attempt in attempts),
        "limit_seconds": arguments.limit_seconds,
        "limit_anonymous": arguments.limit_anonymous_gb and int(arguments.limit_anonymous_gb * 1e9),
    }
    name = "-".join(filter(None, ["quantize", arguments.checkpoint.name, arguments.name]))
    path = write_results(name, figures)
    memory = f"{figures['peak_anonymous'] / 1e9:.2f} GB anonymous"
    print(f"{path}: {figures['wall_s']} s, {figures['cpu_s']} CPU s, {memory}")


if __name__ == "__main__":
    main()
