"""Train the reader: `python vision_stage.py` first, then this; both can be stopped and started again at any time.

Stage two teaches the decoder to answer, with the vision tower learning at a lower rate and dense tiles kept in the
mix. State, log and plot go to --out. The same seed gives the same data in the same order. SIGTERM saves and stops.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from batches import GROUP, IGNORE, PLACES, Batch, Recipe, attention_bias, encoder, training_group
from checkpoint import starting_weights
from crew import Crew
from dense import CLASSES
from export_reader import LAYOUTS, layout_config
from judge import judge, validation_rows
from loader import batches
from model import Reader, ReaderConfig, rotary_table
from optim import Optimisers
from torch import Tensor, nn
from vision_stage import CELLS, slot_loss

from internvl_edge.calibration.synthetic import TASKS

TRUNK = ReaderConfig(vocab_size=encoder().get_vocab_size())
"""What both layouts grow from."""
BEGINNINGS = {"trunk": 0.4, "qwen2": 0.0, "internlm2": 1.0}
"""Share of the prompts that begin with `<s>`, by layout."""


class Student(nn.Module):
    """The reader and the slot head, as one module to make replicas of."""

    def __init__(self, dense_weight: float, layout: str) -> None:
        super().__init__()
        self.reader = Reader(TRUNK if layout == "trunk" else layout_config(layout))
        self.slots = nn.Linear(self.reader.config.hidden_size, CELLS * CLASSES)
        self.bond_slots = nn.Linear(self.reader.config.hidden_size, 2 * CLASSES)
        self.place_slots = nn.Linear(self.reader.config.hidden_size, PLACES)
        self.context = encoder().token_to_id("<IMG_CONTEXT>")
        self.dense_weight = dense_weight

    def tensor(self, array: np.ndarray) -> Tensor:
        """The array on the device of the weights."""
        return torch.from_numpy(array).to(self.slots.weight.device)

    def answers(self, batch: Batch, bf16: bool = True) -> Tensor:
        """Float32 logits [n, vocab] at the answer positions, in the order of `batch.targets`."""
        return self.read(batch, bf16)[0]

    def read(self, batch: Batch, bf16: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of `answers`, the image tokens [tokens, hidden] of all pictures, and hidden states half way up."""
        ids, segments, positions, targets, pixels = (
            self.tensor(a) for a in (batch.ids, batch.segments, batch.positions, batch.targets, batch.pixels)
        )
        cos, sin = rotary_table(self.reader.config, positions)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            embeds = self.reader.language_model.model.embed_tokens(ids)
            image = self.reader.see(pixels).to(embeds.dtype)
            embeds = embeds.masked_scatter((ids == self.context)[..., None], image)
            layers: list[Tensor] = []
            out = self.reader.think(embeds, cos, sin, attention_bias(segments), layers.append)
            logits = self.reader.language_model.lm_head(out[targets != IGNORE]).float()
            return logits, image.flatten(0, -2), layers[len(layers) // 2 - 1]


def loss_of(student: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    """Answer loss plus the weighted losses of the throw-away heads of one micro-batch, and the figures to log."""
    assert isinstance(student, Student)
    logits, image, middle = student.read(batch)
    targets = student.tensor(batch.targets)
    targets = targets[targets != IGNORE]
    total = F.cross_entropy(logits, targets)
    figures = {"loss": total.item(), "token": (logits.argmax(-1) == targets).float().mean().item()}
    for name, (loss, accuracy) in heads(student, batch, image, middle).items():
        total = total + student.dense_weight * loss
        figures[name] = accuracy.item()
    return total, figures | {"right": right_branches(batch, logits)}


def heads(student: Student, batch: Batch, image: Tensor, middle: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """(loss, accuracy) of the throw-away heads that have something to learn from a batch.

    `image` holds its image tokens, `middle` [rows, seq, hidden] its hidden states half way up the text model.
    """
    found = {}
    with torch.autocast(image.device.type, torch.bfloat16):
        if len(batch.dense):
            seen = student.reader.see(student.tensor(batch.dense))
            image = torch.cat([image, seen.flatten(0, 1)])
        if len(batch.dense_labels):
            slots = student.slots(seen[: len(batch.dense_labels)])
            found["dense"] = slot_loss(slots.view(-1, CLASSES), student.tensor(batch.dense_labels).view(-1))
        if len(batch.bonds):
            bonds = student.tensor(batch.bonds)
            said, labels = student.bond_slots(image[bonds[:, 0]]).view(-1, CLASSES).float(), bonds[:, 1:].flatten()
            found["bonds"] = F.cross_entropy(said, labels), (said.argmax(-1) == labels).float().mean()
        if len(batch.places):
            rows, positions, labels = student.tensor(batch.places).T
            said = student.place_slots(middle[rows, positions]).float()
            found["places"] = F.cross_entropy(said, labels), (said.argmax(-1) == labels).float().mean()
    return found


class Trainer:
    """Student, optimisers, averaged weights and the step count, saved and restored together."""

    def __init__(self, out: Path, arguments: argparse.Namespace) -> None:
        self.out, self.a = out, arguments
        torch.manual_seed(arguments.seed)
        self.student = Student(arguments.dense_weight, arguments.layout).to(arguments.device)
        self.model = self.student.reader
        self.step = 0
        self.load_start()
        named = [(n.removeprefix("reader."), p) for n, p in self.student.named_parameters()]
        self.optimisers = Optimisers(named, arguments.muon_lr, arguments.adam_lr, arguments.vision_rate)
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.restore()
        self.crew = Crew(self.student, arguments.threads)

    def load_start(self) -> None:
        """Start from another run's average or a checkpoint (--start), or from stage one when its file is there."""
        if self.a.start and self.a.start.is_dir():
            self.model.load_state_dict(starting_weights(self.a.start, self.model.config), strict=False)
        elif self.a.start:
            state = torch.load(self.a.start, weights_only=True, map_location=self.a.device)
            averaged = {f"reader.{name}": weight for name, weight in state["average"].items()}
            self.student.load_state_dict(state["student"] | averaged, strict=False)
        elif (self.out / "vision.pt").exists():
            state = torch.load(self.out / "vision.pt", weights_only=True, map_location=self.a.device)
            vision = {k: v for k, v in state["model"].items() if not k.startswith("language_model")}
            self.model.load_state_dict(vision, strict=False)
            self.student.slots.load_state_dict(state["slots"])

    def restore(self) -> None:
        """Continue from reader.pt when it is there."""
        file = self.out / "reader.pt"
        if file.exists():
            state = torch.load(file, weights_only=True, map_location=self.a.device)
            self.student.load_state_dict(state["student"])
            self.optimisers.load_state_dict(state["optimisers"])
            self.average, self.step = state["average"], state["step"]

    def save(self) -> None:
        """Write the whole state beside its place, then move it there."""
        state = {"student": self.student.state_dict(), "average": self.average, "step": self.step}
        torch.save(state | {"optimisers": self.optimisers.state_dict()}, self.out / "reader.tmp")
        (self.out / "reader.tmp").rename(self.out / "reader.pt")

    def update(self, pieces: list[Batch], multiplier: float) -> list[dict[str, Any]]:
        """One optimiser step over the micro-batches; returns each one's figures."""
        pieces = sorted(pieces, key=lambda piece: -piece.ids.size)  # the longest first, so that threads end together
        figures = self.crew.gradients(loss_of, pieces)
        self.optimisers.step(multiplier, self.crew)
        self.step += 1
        keep = min(0.998, self.step / (self.step + 20))
        with torch.no_grad():
            named = dict(self.model.named_parameters())
            torch._foreach_lerp_([self.average[name] for name in named], list(named.values()), 1 - keep)
        return figures

    def evaluate(self, rows: list[Batch]) -> dict[str, float]:
        """Exact match per task of the averaged weights on validation pictures (teacher-forced, so greedy)."""
        current = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                p.copy_(self.average[n])
            result = judge(rows, self.student.answers)
            for n, p in self.model.named_parameters():
                p.copy_(current[n])
        return result

    def multiplier(self, seconds: float) -> float:
        """Warm-up over 50 steps, then constant, then linear to 5 % over the last `decay` steps or minutes.

        `seconds` is how long this run has lasted; minutes count only with --decay-minutes.
        """
        left = (self.a.steps - self.step) / max(1, self.a.decay)
        if self.a.decay_minutes:
            left = min(left, (self.a.minutes - seconds / 60) / self.a.decay_minutes)
        return min(1.0, (self.step + 1) / 50, max(0.05, left))


def right_branches(batch: Batch, logits: Tensor) -> list[tuple[str, bool]]:
    """(task, whether every token of the answer is right) of every question."""
    targets = torch.from_numpy(batch.targets)
    where = targets != IGNORE
    segments, rows = torch.from_numpy(batch.segments)[where], where.nonzero()[:, 0]
    wrong = logits.argmax(-1).cpu() != targets[where]
    bad = {(int(r), int(s)) for r, s in zip(rows[wrong], segments[wrong], strict=True)}
    return [(task, (row, segment) not in bad) for row, segment, task in batch.branches]


def run(a: argparse.Namespace) -> None:
    trainer = Trainer(a.out, a)
    bos = BEGINNINGS[a.layout]
    recipe = Recipe(
        a.seed,
        a.batch // a.pieces,
        a.dense // a.pieces,
        a.charts // a.pieces,
        a.questions,
        a.drill,
        a.transcribe,
        tuple(a.tasks),
        bos,
    )
    data = batches(partial(training_group, recipe=recipe), trainer.step * a.pieces // GROUP, a.workers)
    held = validation_rows(a.validation, bos=bos == 1)
    started = saved = logged = time.time()
    steps = 0
    sums: dict[str, float] = defaultdict(float)
    hits: dict[str, list[bool]] = defaultdict(list)
    asked_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
    while trainer.step < a.steps and time.time() - started < 60 * a.minutes and not asked_to_stop.is_set():
        for figures in trainer.update([next(data) for _ in range(a.pieces)], trainer.multiplier(time.time() - started)):
            for task, right in figures.pop("right"):
                hits[task].append(right)
            for key, value in figures.items():
                sums[key] += value / a.pieces
        steps += 1
        if trainer.step % a.log_every == 0:
            entry: dict[str, Any] = {"step": trainer.step, "pictures": trainer.step * a.batch}
            entry |= {key: round(value / steps, 4) for key, value in sums.items()}
            entry["pictures_per_s"] = round(steps * a.batch / (time.time() - logged), 1)
            entry["train"] = {task: round(sum(h) / len(h), 3) for task, h in sorted(hits.items())}
            if trainer.step % (a.log_every * a.judge_every) == 0:
                entry["validation"] = trainer.evaluate(held)
            with (a.out / "reader.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            sums.clear()
            hits.clear()
            logged, steps = time.time(), 0
        if time.time() - saved > 60 * a.save_every:
            trainer.save()
            saved = time.time()
    trainer.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of state, log and plot")
    parser.add_argument("--layout", choices=("trunk", *LAYOUTS), default="trunk", help="trunk: no biases, no <s>")
    parser.add_argument("--start", type=Path, help="state of another run, or a Qwen2 checkpoint, to begin with")
    parser.add_argument("--steps", type=int, default=30000, help="where the learning rate ends")
    parser.add_argument("--decay", type=int, default=8000, help="steps of linear decay at the end")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop, resumable, after so long")
    parser.add_argument("--decay-minutes", type=float, default=0.0, help="let the rate fall over the last of --minutes")
    parser.add_argument("--batch", type=int, default=48, help="pictures a step")
    parser.add_argument("--dense", type=int, default=16, help="dense tiles a step")
    parser.add_argument("--charts", type=int, default=16, help="tiles of charts a step, for the vision tower")
    parser.add_argument("--dense-weight", type=float, default=0.5)
    parser.add_argument("--questions", type=int, default=2, help="questions a picture, at most")
    parser.add_argument("--drill", type=int, default=0, help="more of them from a picture's drill, at most")
    parser.add_argument("--transcribe", type=float, default=0.7, help="share of the pictures that are read out in full")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="tasks to train on (default: all)")
    parser.add_argument("--muon-lr", type=float, default=2e-3)
    parser.add_argument("--adam-lr", type=float, default=1e-3)
    parser.add_argument("--vision-rate", type=float, default=0.4, help="learning rate of the vision half, as a factor")
    parser.add_argument("--validation", type=int, default=200, help="validation pictures")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--judge-every", type=int, default=10, help="in log lines")
    parser.add_argument("--save-every", type=float, default=5, help="minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="micro-batches computed at a time (1 on a GPU)")
    parser.add_argument("--pieces", type=int, default=4, help="micro-batches a step (1 on a GPU)")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    run(arguments)


if __name__ == "__main__":
    main()
