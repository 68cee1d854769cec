"""The main job, end to end: export a small checkpoint, ask it about a picture, print the answer.

The checkpoint has InternVL 2.5's architecture and random weights (it is the one that the tests hold to transformers'
outputs), so the answer is no sense, but exactly the original's nonsense.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from internvl_edge import InternVL, export_bundle

REPOSITORY = Path(__file__).resolve().parent.parent
CHECKPOINT = REPOSITORY / "tests" / "data" / "internvl-hf-qwen2-tiny" / "checkpoint"
PICTURE = REPOSITORY / "tests" / "data" / "images" / "wide_2000x800.jpg"
BUNDLE = REPOSITORY / "work" / "demo-bundle"


def main() -> None:
    """Export, load, ask, print."""
    shutil.rmtree(BUNDLE, ignore_errors=True)
    started = time.perf_counter()
    export_bundle(CHECKPOINT, BUNDLE)
    exported = time.perf_counter()
    with InternVL.load(BUNDLE) as model:
        reply = model.chat("What is the title?", [PICTURE], max_tiles=6, max_new_tokens=24)
    rows = {
        "checkpoint": CHECKPOINT.relative_to(REPOSITORY),
        "bundle": f"{BUNDLE.relative_to(REPOSITORY)} (made in {exported - started:.1f} s)",
        "picture": f"{PICTURE.relative_to(REPOSITORY)} ({reply.tiles[0]} tiles)",
        "question": "What is the title?",
        "answer": reply.text,
        "first token": f"{reply.timings['first_token_s']:.2f} s",
    }
    for name, value in rows.items():
        print(f"{name:<12} {value}")
    print(f'\nAsk more: internvl-edge run {BUNDLE.relative_to(REPOSITORY)} --image FILE "QUESTION"')


if __name__ == "__main__":
    main()
