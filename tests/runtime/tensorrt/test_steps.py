"""Which steps a prompt is computed in, and how many shapes they have."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.model.config import DecoderConfig, RopeConfig
from internvl_edge.model.rope import RotaryAngles
from internvl_edge.runtime.engines.tensorrt.buffers import HALVES
from internvl_edge.runtime.engines.tensorrt.steps import PackedAngles, split, step_sizes, window, windows


@pytest.mark.parametrize(("capacity", "count"), [(1, 1), (512, 1), (513, 2), (4096, 8), (8192, 12), (32768, 20)])
def test_attention_reads_few_lengths_of_the_cache(capacity: int, count: int) -> None:
    found = [window(used, capacity) for used in range(1, capacity + 1)]
    assert sorted(set(found)) == windows(capacity)
    assert len(set(found)) == count
    for used, slots in enumerate(found, 1):
        assert used <= slots <= capacity
        assert slots - used < max(512, used / 4)  # little is read in vain


def test_steps_of_a_prompt_have_few_sizes() -> None:
    assert step_sizes(512) == [64, 128, 256, 512]
    assert step_sizes(300) == [64, 128, 256, 300]
    assert step_sizes(64) == [64]
    assert step_sizes(16) == [16]


@given(st.integers(1, 600), st.integers(1, 3000), st.data())
def test_a_prompt_is_split_without_gaps_and_never_beyond_the_cache(
    largest: int, capacity: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, capacity - 1))
    count = data.draw(st.integers(1, capacity - start))
    sizes = step_sizes(largest)
    place = start
    for tokens, rows in split(count, start, sizes, capacity):
        assert 1 <= tokens <= rows <= largest
        assert place + rows <= capacity
        padded = rows > tokens
        assert rows in sizes or (not padded and rows & (rows - 1) == 0)
        assert not padded or place + tokens == start + count  # padding comes last
        place += tokens
    assert place == start + count


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scaling", ["none", "linear", "dynamic"])
def test_angles_of_the_table_are_those_of_each_step(scaling: str, dtype: str) -> None:
    """With dynamic NTK, a sequence longer than the model's 256 positions has angles of its own."""
    decoder = DecoderConfig(
        "qwen2", 64, 1, 4, 2, 16, 128, 100, 1e-6, 256, RopeConfig(1e4, scaling, 2.0), False, False, False
    )
    half = HALVES[dtype]
    angles, table = RotaryAngles(decoder), PackedAngles(decoder, 400, half)
    for start, count, total in ((0, 1, 1), (7, 30, 37), (250, 1, 251), (300, 100, 400), (0, 5, 10**6)):
        for mine, exact in zip(table.at(start, count, total), angles.at(start, count, total), strict=True):
            np.testing.assert_array_equal(mine, half.pack(exact))
