"""An engine whose answers are known: logits are a fixed function of the last tokens of a row. It checks its callers."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence

import numpy as np

from internvl_edge.runtime.engines import Engine
from internvl_edge.runtime.engines.rows import CacheRows
from internvl_edge.runtime.engines.steps import steps, steps_from

VOCABULARY = 12


def logits_after(tokens: Sequence[int]) -> np.ndarray:
    """Return logits [VOCABULARY] that depend on the last two tokens and on whether the first is odd."""
    state = sum(token * 5**place for place, token in enumerate(tokens[-2:])) + tokens[0] % 2
    return np.random.default_rng(state).standard_normal(VOCABULARY).astype(np.float32)


def greedy(prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
    """Return the answer to a prompt, the stop token included."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] not in stop):
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens[len(prompt) :]


class RememberingEngine(Engine):
    """Embeddings are the token itself, and each row remembers its tokens.

    `failing` is an error that the next step raises. `calls` counts steps, `most` the rows of the largest one.
    """

    tiles_at_once = 1
    dialect = "standard"

    def __init__(self, rows: int = 1, capacity: int = 10_000, chunk: int = 16) -> None:
        self.cache = CacheRows(capacity, rows)
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.calls = self.most = self.computed = self.copied = 0
        self.failing: BaseException | None = None
        self._chunk = chunk
        self._busy = threading.Lock()

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def steps(self, length: int) -> list[int]:
        return steps(length, (self._chunk, 4))

    def prefill_steps(self, embeds: np.ndarray, row: int = 0) -> Generator[None, None, np.ndarray]:
        start, total = self.cache.length(row), self.cache.room_for(len(embeds), row)
        for chunk in np.split(embeds, np.cumsum(steps_from(self.steps(total), start))[:-1]):
            assert len(chunk), "the prompt continues inside of a step"
            self.computed += len(chunk)
            self._append(chunk, row)
            yield
        return logits_after(self.tokens[row])

    def decode_rows(self, embeds: np.ndarray, rows: Sequence[int]) -> list[np.ndarray]:
        assert len(set(rows)) == len(rows) == len(embeds)
        self.most = max(self.most, len(rows))
        return [self._append(embed[None], row)[0] for embed, row in zip(embeds, rows, strict=True)]

    def score(self, embeds: np.ndarray, row: int = 0) -> np.ndarray:
        return np.stack(self._append(embeds, row))

    def copy(self, source: int, target: int, length: int) -> None:
        assert length <= self.cache.length(source)
        self.copied += length
        self.tokens[target] = self.tokens[source][:length]
        self.cache.copied(source, target, length)

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        self.tokens = []

    def _append(self, embeds: np.ndarray, row: int) -> list[np.ndarray]:
        assert self._busy.acquire(blocking=False), "two threads use the engine at once"
        try:
            if (error := self.failing) is not None:
                self.failing = None
                raise error
            self.calls += 1
            tokens = self.tokens[row]
            del tokens[self.cache.length(row) :]
            logits = []
            for embed in embeds:
                self.cache.room_for(1, row)
                tokens.append(int(embed[0]))
                self.cache.append(1, row)
                logits.append(logits_after(tokens))
            return logits
        finally:
            self._busy.release()
