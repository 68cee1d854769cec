"""What a bundle's manifest says of its quality: figures, the gate they were held against, and who accepted what.

Tied to the bundle's files: figures under a manifest with other files are nobody's and do not count. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from .gate import METRICS, Condition, Verdict, judge, parse_condition


@dataclass(frozen=True)
class Measurement:
    """How figures were measured.

    Attributes:
        data: the data set's or the suite's name.
        questions: how many were asked.
        seed: which of them.
        reference: name of what the bundle was compared with; "" where it was asked alone.
        device, engine, dialect: what computed the answers, as `InternVL.load` takes them; "auto" was the CPU.
        date: UTC, to the minute.
        answer_tokens: most tokens of an answer that were looked at; None where nobody recorded it.
        max_tiles: most tiles of an image; None is the checkpoint's own limit.
        exact: whether every engine computed in the bundle's own types.
    """

    data: str
    questions: int
    seed: int
    device: str
    engine: str
    date: str
    dialect: str | None = None
    reference: str = ""
    answer_tokens: int | None = None
    max_tiles: int | None = None
    exact: bool = False

    def __str__(self) -> str:
        parts = [f"{self.questions} questions of {self.data}"]
        if self.reference:
            parts.append(f"against {self.reference}")
        if self.answer_tokens:
            parts.append(f"answers of up to {self.answer_tokens} tokens")
        return f"{', '.join(parts)}, {self.date}".removesuffix(", ")

    def why_kept(self, newer: Measurement) -> str:
        """Say why a newer run must not replace this one unasked; "" where it says as much, of the same.

        Fewer questions or shorter answers say less, although their figures look the same. Figures of other questions,
        another reference or another engine cannot be held against the conditions that were stated of these.
        """
        if newer.questions < self.questions:
            return f"{newer.questions} questions say less than {self.questions}"
        if (newer.answer_tokens or 0) < (self.answer_tokens or 0):
            return f"answers of up to {newer.answer_tokens} tokens say less than of {self.answer_tokens}"
        return self.difference(newer)

    def difference(self, other: Measurement) -> str:
        """Say which setting makes figures of the two runs tell nothing of each other; "" where none does."""
        for name in _COMPARED:
            mine, others = _said(getattr(self, name)), _said(getattr(other, name))
            if mine != others:
                return f"{name.replace('_', ' ')} is {mine} in one run and {others} in the other"
        return ""


# What must be the same of two runs for their figures to be comparable.
_COMPARED = ("data", "seed", "reference", "max_tiles", "device", "engine", "dialect", "exact")


def _said(value: object) -> str:
    return "not set" if value in (None, "") else "cpu" if value == "auto" else str(value)


@dataclass(frozen=True)
class Quality:
    """What is known of one bundle.

    Attributes:
        files: `Manifest.fingerprint` of the bundle that was measured.
        figures: by metric, as `gate.METRICS` names them.
        measured: how, by what was measured: "comparison", "suite".
        gate: conditions, each held against its newest figure.
        accepted: why the bundle is used although its gate failed or is missing; "" where nobody said so.
    """

    files: str
    figures: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Measurement] = field(default_factory=dict)
    gate: tuple[Verdict, ...] = ()
    accepted: str = ""

    @property
    def failed(self) -> tuple[Verdict, ...]:
        """The conditions that were not met."""
        return tuple(verdict for verdict in self.gate if verdict.failed)

    @property
    def state(self) -> str:
        """In one word: "failed", "passed", or "no gate"; accepted or not."""
        return "failed" if self.failed else "passed" if self.gate else "no gate"

    @property
    def conditions(self) -> list[Condition]:
        """The conditions of the gate, parsed."""
        return [parse_condition(verdict.condition) for verdict in self.gate]

    def replaced(self, conditions: Iterable[Condition]) -> list[tuple[Condition, Condition]]:
        """The (earlier, newer) conditions of which `with_figures` keeps the newer alone."""
        newer = {_side(condition): condition for condition in conditions}
        pairs = [(earlier, newer.get(_side(earlier), earlier)) for earlier in self.conditions]
        return [(earlier, later) for earlier, later in pairs if earlier != later]

    def unmeasured(self, figures: Mapping[str, float], measured: Mapping[str, Measurement]) -> list[Condition]:
        """The conditions on figures that newer runs of their kind did not measure, or measured of another suite."""
        newer, recorded = measured.get("suite"), self.measured.get("suite")
        other_suite = newer is not None and recorded is not None and newer.data != recorded.data
        return [
            condition
            for condition in self.conditions
            if (run := METRICS[condition.metric].run) in measured
            and (condition.metric not in figures or (other_suite and run == "suite"))
        ]

    def with_figures(
        self,
        figures: Mapping[str, float],
        measured: Mapping[str, Measurement],
        conditions: Iterable[Condition],
        *,
        drop_unmeasured: bool = False,
    ) -> Quality:
        """Return this quality with the figures of newer runs, and with newer conditions.

        A run replaces all figures of an earlier run of its kind, so that figures of two runs never stand together. A
        condition replaces an earlier one on the same side of the same metric (see `replaced`). The other conditions are
        held against the newer figures. One whose figure the newer run did not measure fails, unless it is dropped. What
        was accepted was accepted of the older figures.

        Args:
            figures: by metric.
            measured: how, by the kind of run that measured them.
            conditions: newer ones.
            drop_unmeasured: remove conditions on figures that the newer runs did not measure (see `unmeasured`).
        """
        replaced = {name for name in self.figures if name in METRICS and METRICS[name].run in measured}
        gone = replaced - figures.keys()
        together = {name: value for name, value in self.figures.items() if name not in gone} | dict(figures)
        dropped = self.unmeasured(figures, measured) if drop_unmeasured else []
        kept = {_side(condition): condition for condition in self.conditions if condition not in dropped}
        kept |= {_side(condition): condition for condition in conditions}
        return replace(
            self,
            figures=together,
            measured={**self.measured, **measured},
            gate=judge(kept.values(), together),
            accepted="",
        )


def figure_rows(figures: Mapping[str, float]) -> list[tuple[str, str]]:
    """(metric, value) for people, in the order of `METRICS`; metrics that this version does not know are left out."""
    return [(name, metric.show(figures[name])) for name, metric in METRICS.items() if name in figures]


def _side(condition: Condition) -> tuple[str, str]:
    """What two conditions share when one replaces the other."""
    return condition.metric, condition.sign[0]
