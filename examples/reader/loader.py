"""Batches made in a background process, in an order that depends on nothing but the seed and the batch number.

Batch `i` is always the same, so a resumed run continues with the data that an uninterrupted one would have seen.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_DEPTH = 6


def _work(make: Callable[[int], Any], start: int, stride: int, queue: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the trainer's own handler is inherited
    os.nice(max(0, 19 - os.nice(0)))
    parent = os.getppid()
    index = start
    while os.getppid() == parent:
        queue.put(make(index))
        index += stride


def batches(make: Callable[[int], Iterable[Any]], start: int, workers: int = 1) -> Iterator[Any]:
    """Yield the elements of make(start), make(start + 1), ... in order, made ahead of time by `workers` processes."""
    context = multiprocessing.get_context("fork")
    queues = [context.Queue(maxsize=_DEPTH) for _ in range(workers)]
    for i, queue in enumerate(queues):
        arguments = (make, start + i, workers, queue)
        context.Process(target=_work, args=arguments, daemon=True).start()
    index = 0
    while True:
        yield from queues[index % workers].get()
        index += 1
