"""A progress that shows nothing and keeps its phases, with the steps that were done in each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from internvl_edge.base.progress import Progress, Step


class RecordedProgress(Progress):
    """`steps` are the phases, in the order in which they began."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    @contextmanager
    def phase(self, label: str, total: int = 0, unit: str = "", units: int = 0) -> Iterator[Step]:
        with super().phase(label, total, unit, units) as step:
            self.steps.append(step)
            yield step
