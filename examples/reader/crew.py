"""Training on several cores without barriers: one Python thread per core, each with its own piece of the step.

torch's own threads meet at a barrier in every operation, so one busy neighbour on the machine stops all of them. Here
every thread runs whole micro-batches on a replica that shares the weights' memory and only the end of a step is
waited for. Knows nothing of what is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn


class Crew:
    """`threads` replicas of a module; gradients of all micro-batches end up, averaged, on the module itself."""

    def __init__(self, module: nn.Module, threads: int) -> None:
        if threads > 1:
            torch.set_num_threads(1)
        self.module = module
        self.pool = ThreadPoolExecutor(threads)
        self.free: SimpleQueue[nn.Module] = SimpleQueue()
        self.replicas = []
        for _ in range(threads if threads > 1 else 0):
            replica = copy.deepcopy(module)
            for mine, shared in zip(replica.parameters(), module.parameters(), strict=True):
                mine.data = shared.data
            self.replicas.append(replica)
            self.free.put(replica)
        if threads == 1:
            self.free.put(module)

    def map(self, job: Callable[[nn.Module, Any], Any], pieces: Sequence[Any]) -> list[Any]:
        """job(replica, piece) for every piece, as many at a time as there are threads."""

        def work(piece: Any) -> Any:
            replica = self.free.get()
            try:
                return job(replica, piece)
            finally:
                self.free.put(replica)

        return list(self.pool.map(work, pieces))

    def gradients(self, loss: Callable[[nn.Module, Any], tuple[Tensor, Any]], pieces: Sequence[Any]) -> list[Any]:
        """Backward through loss(replica, piece)[0] for every piece; returns the second values."""

        def work(replica: nn.Module, piece: Any) -> Any:
            value, figures = loss(replica, piece)
            (value / len(pieces)).backward()
            return figures

        figures = self.map(work, pieces)
        if not self.replicas:
            return figures
        for parameter, *mine in zip(*(m.parameters() for m in (self.module, *self.replicas)), strict=True):
            found = [p.grad for p in mine if p.grad is not None]
            parameter.grad = sum(found[1:], start=found[0]) if found else None
            for p in mine:
                p.grad = None
        return figures

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run independent jobs on the threads and wait for all."""
        list(self.pool.map(lambda job: job(), jobs))
