"""How far each row of an engine's KV cache is filled. A row holds one sequence: a prompt and its answer."""

from __future__ import annotations

from internvl_edge.base.errors import EngineError


class CacheRows:
    """The rows of one KV cache: equal capacities, and a length for each.

    Args:
        rows: how many sequences the cache holds side by side.
        capacity: tokens of each row, prompt and answer together.
    """

    def __init__(self, capacity: int, rows: int = 1) -> None:
        self.capacity = capacity
        self.rows = rows
        self._lengths = [0] * rows

    def length(self, row: int = 0) -> int:
        """Return the number of tokens in a row."""
        return self._lengths[row]

    def room_for(self, count: int, row: int = 0) -> int:
        """Return the number of tokens in a row after `count` more.

        Raises:
            EngineError: they do not fit, or there are none.
        """
        total = self._lengths[row] + count
        if count < 1 or total > self.capacity:
            used = f"{self._lengths[row]} of {self.capacity} are used"
            raise EngineError(f"{count} tokens do not fit the cache, {used}; give --context {total} or more")
        return total

    def append(self, count: int, row: int = 0) -> None:
        """Count tokens that a step has written behind the last one of a row."""
        self._lengths[row] += count

    def reset(self, length: int = 0, row: int = 0) -> None:
        """Drop a row's tokens from position `length` on. Their entries stay masked until later ones overwrite them."""
        self._lengths[row] = min(length, self._lengths[row])

    def copied(self, source: int, target: int, length: int) -> None:
        """Count the first `length` tokens of one row, which now are also those of another."""
        self._lengths[target] = min(length, self._lengths[source])
