"""Damaged images of every format: pixels or one line, within bounds of time and memory."""

from __future__ import annotations

from helpers.parsers import Images, outcomes

MUTANTS = 5_000


def test_mutated_images_are_read_or_refused() -> None:
    read = 0
    for _, image, line in outcomes(Images, MUTANTS):
        if line is None:
            read += 1
            assert image.mode == "RGB"
            assert image.width * image.height <= 100_000_000
        else:
            assert "image" in line
    assert MUTANTS / 20 < read < MUTANTS * 0.9
