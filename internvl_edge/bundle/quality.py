"""What a bundle's manifest says of its quality: figures, the gate they were held against, and who accepted what.

Tied to the bundle's files: figures under a manifest with other files are nobody's and do not count. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import BundleError, EdgeError
from internvl_edge.base.jsonable import encode

from .gate import METRICS, Condition, Verdict, as_figure, judge, parse_condition
from .manifest import Manifest


@dataclass(frozen=True)
class Quality:
    """What is known of one bundle.

    Attributes:
        files: `Manifest.fingerprint` of the bundle that was measured.
        figures: by metric, as `gate.METRICS` names them.
        measured: how, by what was measured ("comparison", "suite"): reference, data, samples, device and so on.
        gate: conditions, each held against its newest figure.
        accepted: why the bundle is used although its gate failed or is missing; "" where nobody said so.
    """

    files: str
    figures: dict[str, float] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
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

    def with_figures(
        self, figures: Mapping[str, float], measured: Mapping[str, dict[str, Any]], conditions: Iterable[Condition]
    ) -> Quality:
        """Newer figures and conditions added.

        A condition replaces an earlier one on the same side of the same metric; earlier ones are held against the newer
        figures. What was accepted was accepted of the older figures.
        """
        together = {**self.figures, **figures}
        kept = {_side(parsed): parsed for parsed in (parse_condition(verdict.condition) for verdict in self.gate)}
        kept |= {_side(condition): condition for condition in conditions}
        return replace(
            self,
            figures=together,
            measured={**self.measured, **measured},
            gate=judge(kept.values(), together),
            accepted="",
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; figures that are no numbers become None."""
        values: dict[str, Any] = encode(self)
        return values


def quality_of(manifest: Manifest) -> Quality:
    """What is known of the bundle with this manifest.

    Nothing where the figures belong to other files, or cannot be read: they may be those of a newer version, and no
    bundle should fail to load for that. The bundle then counts as never measured.
    """
    empty = Quality(manifest.fingerprint)
    if manifest.quality is None:
        return empty
    try:
        gate = tuple(map(Verdict.from_dict, manifest.quality["gate"]))
        for verdict in gate:
            parse_condition(verdict.condition)
        figures = {name: as_figure(value) for name, value in manifest.quality["figures"].items()}
        found = Quality(**(manifest.quality | {"figures": figures, "gate": gate}))
    except (EdgeError, KeyError, TypeError, ValueError, AttributeError):
        return empty
    return found if found.files == empty.files else empty


def record(folder: Path, quality: Quality) -> None:
    """Put the figures into the bundle's manifest, in one step.

    Raises:
        BundleError: the bundle's files are not those that were measured, or the manifest cannot be written.
    """
    manifest = Manifest.read(folder)
    if manifest.fingerprint != quality.files:
        raise BundleError(f"{folder} was changed while it was evaluated; the figures were not recorded, evaluate again")
    try:
        replace(manifest, quality=quality.to_dict()).write(folder)
    except OSError as error:
        raise BundleError(
            f"the figures cannot be written into {folder} ({error.strerror}); make it writable, or pass --no-record"
        ) from None


def quality_warning(folder: Path, manifest: Manifest) -> str | None:
    """Say in one line that the bundle's gate failed; None where it did not, or where somebody accepted the bundle."""
    quality = quality_of(manifest)
    if quality.accepted or not quality.failed:
        return None
    failed = "; ".join(map(str, quality.failed))
    return (
        f"{folder} failed its quality gate: {failed}; use another bundle, or accept it: "
        f'internvl-edge evaluate {folder} --accept "REASON"'
    )


def figure_rows(figures: Mapping[str, float]) -> list[tuple[str, str]]:
    """(metric, value) for people, in the order of `METRICS`; metrics that this version does not know are left out."""
    return [(name, metric.show(figures[name])) for name, metric in METRICS.items() if name in figures]


def _side(condition: Condition) -> tuple[str, str]:
    """What two conditions share when one replaces the other."""
    return condition.metric, condition.sign[0]
