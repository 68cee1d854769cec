"""The steps in which an engine computes a prompt.

One row and several rows are multiplied by different kernels, which sum in another order. The difference is in the last
bit, but 4-bit products round their inputs to int8, and there it becomes visible. ONNX Runtime's 4-bit kernel also takes
rows in pairs and an odd last row alone; prompts in int8 leave their last token to the 4-bit graph; OpenVINO sums
differently for each shape. The entries of the KV cache therefore depend on where the steps of a prompt begin and end.
Steps follow from the length of the whole prompt alone, so that a prompt which continues in a cache at the end of one of
its steps gets the numbers that it would get in an empty cache (`benchmarks/warm_cold.py`).
"""

from __future__ import annotations

from collections.abc import Sequence


def steps(tokens: int, sizes: Sequence[int]) -> list[int]:
    """Return the sizes of the steps of a prompt: the largest as often as it fits, then the next one, then the rest.

    Args:
        tokens: length of the prompt.
        sizes: sizes of steps, the largest first.
    """
    found = []
    for size in sizes:
        found += [size] * (tokens // size)
        tokens %= size
    return [*found, tokens] if tokens else found


def steps_from(planned: Sequence[int], start: int) -> list[int]:
    """Return the planned steps from position `start` on; none where no step begins there."""
    done = 0
    for index, size in enumerate(planned):
        if done == start:
            return list(planned[index:])
        done += size
    return []


def common_steps(one: Sequence[int], other: Sequence[int], longest: int) -> list[int]:
    """Return the leading steps that two prompts share, `longest` tokens at most."""
    found: list[int] = []
    for size, other_size in zip(one, other, strict=False):
        if size != other_size or sum(found) + size > longest:
            break
        found.append(size)
    return found
