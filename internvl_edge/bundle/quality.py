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
        device, engine, dialect: what computed the answers, as `InternVL.load` takes them.
        date: UTC, to the minute.
        answer_tokens: most tokens of an answer that were looked at; None where nobody recorded it.
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

    def __str__(self) -> str:
        return f"{self.questions} questions of {self.data}, {self.date}"

    def is_more_than(self, questions: int, answer_tokens: int) -> bool:
        """Whether a run of so many questions, and answers of at most so many tokens, would say less than this one."""
        return questions < self.questions or answer_tokens < (self.answer_tokens or 0)


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

    def is_of_another_suite(self, measured: Mapping[str, Measurement]) -> bool:
        """Whether a suite is among newer measurements, and the recorded figures are of another one."""
        newer, recorded = measured.get("suite"), self.measured.get("suite")
        return newer is not None and recorded is not None and newer.data != recorded.data

    def with_figures(
        self, figures: Mapping[str, float], measured: Mapping[str, Measurement], conditions: Iterable[Condition]
    ) -> Quality:
        """Return this quality with the figures of newer runs, and with newer conditions.

        A run replaces all figures of an earlier run of its kind, so that figures of two runs never stand together, and
        with a figure that it did not measure goes the condition on it. Conditions on a suite are about that suite: with
        the figures of another one, all of them go. A condition replaces an earlier one on the same
        side of the same metric (see `replaced`). The other conditions are held against the newer figures. What was
        accepted was accepted of the older figures.

        Args:
            figures: by metric.
            measured: how, by the kind of run that measured them.
            conditions: newer ones.
        """
        replaced = {name for name in self.figures if name in METRICS and METRICS[name].run in measured}
        gone = replaced - figures.keys()
        together = {name: value for name, value in self.figures.items() if name not in gone} | dict(figures)
        others = self.is_of_another_suite(measured)
        kept = {
            _side(condition): condition
            for condition in self.conditions
            if condition.metric not in gone and not (others and METRICS[condition.metric].run == "suite")
        }
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
