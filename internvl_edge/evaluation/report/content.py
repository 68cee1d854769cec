"""The content of a report: frozen data that `report.json` holds and `report.html` shows. Sections not known are None.

Shares are from 0 to 1, sizes in bytes, times in seconds, divergences in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from internvl_edge.base.run_record import RunRecord
from internvl_edge.checkpoint.record import QuantizationRecord
from internvl_edge.model.components import Component

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Figures:
    """Divergence over the tokens of one kind of question; as `evaluation.divergence.Summary`."""

    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    reference_perplexity: float
    candidate_perplexity: float


@dataclass(frozen=True)
class Histogram:
    """Counts between `edges`, one fewer than these; the outermost bins hold what lies beyond."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One question with both answers.

    Attributes:
        pictures: small JPEG images as `data:` addresses.
        expected: the right answer, "" where none is known.
        kl: mean along the reference's answer.
    """

    name: str
    question: str
    pictures: tuple[str, ...]
    reference: str
    candidate: str
    expected: str
    kl: float
    same: bool


@dataclass(frozen=True)
class ComparisonFacts:
    """A bundle against a reference.

    Attributes:
        reference, data: names, for people.
        cases, image_tokens, seed, max_tiles, max_new_tokens: what was asked.
        figures: along the reference's greedy answers, all together.
        kinds: the same apart for "images" and "text".
        same_answers, same_tokens: as `gate.METRICS`.
        answers: figures along given answers, None where there are none.
        worst: the case with the largest divergence at a token.
        histogram: of the divergence at each token.
        samples: some cases.
    """

    reference: str
    data: str
    cases: int
    image_tokens: int
    seed: int
    max_tiles: int | None
    max_new_tokens: int
    figures: Figures
    kinds: dict[str, Figures]
    same_answers: float
    same_tokens: float
    answers: Figures | None
    worst: str
    histogram: Histogram
    samples: tuple[Sample, ...]
    run: RunRecord


@dataclass(frozen=True)
class Task:
    """One kind of question of a suite; `reference` is None where no reference was asked."""

    asked: int
    exact_match: float
    reference: float | None = None


@dataclass(frozen=True)
class Mistake:
    """A question that was not answered exactly."""

    case: str
    expected: str
    answered: str


@dataclass(frozen=True)
class SuiteFacts:
    """A bundle, and where one was given the reference, asked a suite's questions.

    Attributes:
        total: over all tasks.
        mistakes: the first few.
    """

    name: str
    seed: int
    total: Task
    tasks: dict[str, Task]
    mistakes: tuple[Mistake, ...]
    run: RunRecord


@dataclass(frozen=True)
class Judged:
    """One condition of the gate, its figure (None: no number), and whether it failed."""

    condition: str
    value: float | None
    failed: bool


@dataclass(frozen=True)
class Gate:
    """The gate's `state` ("passed", "failed", "no gate"), its conditions, and why the bundle is accepted, if it is."""

    state: str
    conditions: tuple[Judged, ...] = ()
    accepted: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that is known.

    Attributes:
        kind: "checkpoint" or "bundle".
        name: of its folder.
        source: name of what it was made from.
        architecture: what the model is, (label, text) rows.
        quantized: whether it has fewer bits than floats anywhere.
        bytes: all files together.
        components: sizes of its parts.
        files: the bundle's fingerprint, "" for a checkpoint.
        figures: by metric of the gate.
        gate: of a bundle.
    """

    kind: str
    name: str
    source: str
    architecture: tuple[tuple[str, str], ...]
    quantized: bool
    bytes: int
    components: tuple[Component, ...]
    files: str = ""
    figures: dict[str, float] | None = None
    gate: Gate | None = None
    quantization: QuantizationRecord | None = None
    comparison: ComparisonFacts | None = None
    suite: SuiteFacts | None = None
    format_version: int = FORMAT_VERSION

    def completed_by(self, older: Report | None) -> Report:
        """With the older report's sections where this one has none; only of the same files."""
        if older is None or not self.files or older.files != self.files:
            return self
        return replace(self, comparison=self.comparison or older.comparison, suite=self.suite or older.suite)
