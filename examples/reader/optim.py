"""Two optimisers under one hat: Muon for the weight matrices inside blocks, AdamW for everything else."""

from __future__ import annotations

import torch
from crew import Crew
from torch import nn


def is_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether Muon takes the parameter: a plain 2-D weight that is neither a table nor an output head."""
    return p.dim() == 2 and not any(part in name for part in ("embed", "lm_head", "slots"))


class Optimisers:
    """Muon (momentum .95, updates scaled to AdamW's size) and AdamW (.9, .98), with one learning-rate multiplier.

    Muon is split in two halves that can run on two threads."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], muon_lr: float, adam_lr: float, vision: float) -> None:
        """`vision` multiplies the rates of the vision tower, mlp1 and slot head."""
        shards: list[dict[float, list[nn.Parameter]]] = [{}, {}]
        others: dict[float, list[nn.Parameter]] = {}
        sizes = [0, 0]
        for name, p in named:
            factor = vision if name.startswith(("vision_model", "slots")) else 1.0
            if is_matrix(name, p):
                lighter = sizes.index(min(sizes))
                shards[lighter].setdefault(factor, []).append(p)
                sizes[lighter] += p.numel()
            else:
                others.setdefault(factor, []).append(p)
        self.all: list[torch.optim.Optimizer] = []
        for shard in shards:
            groups = [{"params": ps, "lr": muon_lr * f} for f, ps in shard.items()]
            self.all.append(torch.optim.Muon(groups, lr=muon_lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"))
        groups = [{"params": ps, "lr": adam_lr * f} for f, ps in others.items()]
        self.all.append(torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0))
        self.base = [[group["lr"] for group in optimiser.param_groups] for optimiser in self.all]

    def step(self, multiplier: float, crew: Crew) -> None:
        """One update at `multiplier` times the base rates; gradients are dropped afterwards."""
        for optimiser, rates in zip(self.all, self.base, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * multiplier
        crew.run([optimiser.step for optimiser in self.all])
        for optimiser in self.all:
            optimiser.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [optimiser.state_dict() for optimiser in self.all]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimiser, state in zip(self.all, states, strict=True):
            optimiser.load_state_dict(state)
