"""Stage one: the vision tower and mlp1 learn letters from dense tiles, through a head that is thrown away."""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from crew import Crew
from dense import CLASSES, IGNORE, dense_tile
from loader import batches
from model import Reader, ReaderConfig
from optim import Optimisers
from torch import Tensor, nn

CELLS = 8


def slot_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy over cells (empty cells count 0.3) and accuracy over the cells that hold a character."""
    weight = torch.ones(CLASSES, device=logits.device)
    weight[0] = 0.3
    loss = F.cross_entropy(logits.float(), labels, weight, ignore_index=IGNORE)
    filled = labels > 0
    return loss, (logits.argmax(-1) == labels)[filled].float().mean()


def make_batch(seed: int, size: int, split: str, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batch `index`, alone in a list: uint8 [size, S, S, 3] and int64 [size, tokens, 8]."""
    rng = random.Random(f"dense-{seed}-{split}-{index}")
    tiles, labels = zip(*(dense_tile(rng, split=split) for _ in range(size)), strict=True)
    return [(np.stack(tiles), np.stack(labels))]


class VisionStage(nn.Module):
    """The model and the slot head, as one module to make replicas of."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader(ReaderConfig(vocab_size=512))
        self.slots = nn.Linear(self.reader.config.hidden_size, CELLS * CLASSES)
        nn.init.normal_(self.slots.weight, std=0.02)
        self.reader.language_model.requires_grad_(False)

    def forward(self, tiles: Tensor) -> Tensor:
        with torch.autocast(tiles.device.type, torch.bfloat16):
            return self.slots(self.reader.see(tiles))


def loss_of(stage: nn.Module, piece: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, tuple[float, float]]:
    """Loss of one micro-batch, with (loss, accuracy) as figures."""
    device = next(stage.parameters()).device
    logits = stage(torch.from_numpy(piece[0]).to(device))
    loss, hits = slot_loss(logits.view(-1, CLASSES), torch.from_numpy(piece[1]).to(device).view(-1))
    return loss, (loss.item(), hits.item())


def train(out: Path, total: int, batch: int, seed: int, save_every: float, device: str, workers: int) -> None:
    """Run up to step `total` from wherever `out`/vision.pt stands."""
    torch.manual_seed(seed)
    stage = VisionStage().to(device)
    named = [(n.removeprefix("reader."), p) for n, p in stage.named_parameters() if p.requires_grad]
    optimisers = Optimisers(named, muon_lr=2e-3, adam_lr=1.5e-3, vision=1.0)
    threads = 2 if device == "cpu" else 1
    pieces = 2 * threads if threads > 1 else 1
    crew = Crew(stage, threads)
    step, state_file = 0, out / "vision.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        stage.reader.load_state_dict(state["model"])
        stage.slots.load_state_dict(state["slots"])
        optimisers.load_state_dict(state["optimisers"])
        step = state["step"]

    def save() -> None:
        state = {"model": stage.reader.state_dict(), "slots": stage.slots.state_dict(), "step": step}
        torch.save(state | {"optimisers": optimisers.state_dict()}, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").rename(state_file)

    held = [make_batch(seed, 64, "validation", i)[0] for i in range(4)]
    data = batches(lambda i: make_batch(seed, batch // pieces, "train", i), step * pieces, workers)
    saved = logged = time.time()
    sums, count = [0.0, 0.0], 0
    while step < total:
        for loss, hits in crew.gradients(loss_of, [next(data) for _ in range(pieces)]):
            sums, count = [sums[0] + loss, sums[1] + hits], count + 1
        optimisers.step(min(1.0, (step + 1) / 100, 0.05 + 2.5 * (1 - step / total)), crew)
        step += 1
        if step % 50 == 0:
            entry = {"step": step, "tiles": step * batch, "loss": sums[0] / count, "accuracy": sums[1] / count}
            entry["tiles_per_s"] = count * batch / pieces / (time.time() - logged)
            if step % 250 == 0:
                with torch.no_grad():
                    entry["held"] = sum(loss_of(stage, piece)[1][1] for piece in held) / len(held)
            with (out / "vision.jsonl").open("a") as log:
                log.write(json.dumps({k: round(v, 4) for k, v in entry.items()}) + "\n")
            sums, count, logged = [0.0, 0.0], 0, time.time()
        if time.time() - saved > 60 * save_every:
            save()
            saved = time.time()
    save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    parser.add_argument("--save-every", type=float, default=4)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    train(a.out, a.steps, a.batch, a.seed, a.save_every, a.device, a.workers)
