"""The report of a bundle that was just evaluated, from what evaluation found and what the bundle says of itself."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.base.errors import BundleError
from internvl_edge.base.json_files import read
from internvl_edge.base.jsonable import decode
from internvl_edge.base.run_record import RunRecord
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.names import QUANTIZATION
from internvl_edge.bundle.quality import Quality
from internvl_edge.checkpoint.record import QuantizationRecord
from internvl_edge.model.description import architecture
from internvl_edge.model.preprocess import load_image

from .. import Answered, Comparison, SuiteScore
from ..divergence import Summary
from .content import (
    ComparisonFacts,
    Figures,
    Gate,
    Histogram,
    Judged,
    Mistake,
    Report,
    Sample,
    SuiteFacts,
    Task,
)

# Divergences are shown on a logarithmic axis, four bins for each power of ten.
_EDGES = tuple(float(edge) for edge in np.logspace(-7, 2, 37))
_PICTURE_SIDE = 480
_PICTURE_QUALITY = 78
_PICTURES = 3
_MISTAKES = 40


@dataclass(frozen=True)
class Asked:
    """What an evaluation was asked to do, for people: names instead of paths."""

    reference: str
    data: str
    seed: int
    max_tiles: int | None
    max_new_tokens: int


def bundle_report(
    folder: Path,
    manifest: Manifest,
    quality: Quality,
    comparison: ComparisonFacts | None = None,
    suite: SuiteFacts | None = None,
) -> Report:
    """Everything that is known of a bundle.

    Args:
        folder, manifest: the bundle.
        quality: its figures and its gate, the newest included.
        comparison, suite: what was just measured.
    """
    conditions = tuple(
        Judged(verdict.condition, None if math.isnan(verdict.value) else verdict.value, verdict.failed)
        for verdict in quality.gate
    )
    return Report(
        kind="bundle",
        name=folder.resolve().name,
        source=manifest.source,
        architecture=(*architecture(manifest.model), ("KV cache", manifest.kv_cache or manifest.activations)),
        quantized=manifest.is_quantized,
        bytes=sum(entry.bytes for entry in manifest.files.values()),
        components=manifest.components,
        files=manifest.fingerprint,
        figures=quality.figures,
        gate=Gate(quality.state, conditions, quality.accepted),
        quantization=_quantization(folder, manifest),
        comparison=comparison,
        suite=suite,
    )


def comparison_facts(found: Comparison, asked: Asked, run: RunRecord) -> ComparisonFacts:
    """A comparison as the report shows it."""
    return ComparisonFacts(
        reference=asked.reference,
        data=asked.data,
        cases=found.cases,
        image_tokens=found.image_tokens,
        seed=asked.seed,
        max_tiles=asked.max_tiles,
        max_new_tokens=asked.max_new_tokens,
        figures=_figures(found.greedy),
        kinds={kind: _figures(summary) for kind, summary in found.kinds.items()},
        same_answers=found.same_answers,
        same_tokens=found.same_prefix,
        answers=_figures(found.answers) if found.answers else None,
        worst=found.worst,
        histogram=histogram(found.kl),
        samples=tuple(map(_sample, found.answered)),
        run=run,
    )


def suite_facts(name: str, seed: int, score: SuiteScore, reference: SuiteScore | None, run: RunRecord) -> SuiteFacts:
    """A suite's score as the report shows it, beside that of the reference where it was asked too."""
    tasks = {
        task: Task(count, score.share(task), reference.share(task) if reference else None)
        for task, count in score.asked.items()
    }
    return SuiteFacts(
        name=name,
        seed=seed,
        total=Task(sum(score.asked.values()), score.total, reference.total if reference else None),
        tasks=tasks,
        mistakes=tuple(Mistake(*entry) for entry in score.wrong[:_MISTAKES]),
        run=run,
    )


def histogram(kl: NDArray[np.float64]) -> Histogram:
    """Counts of divergences [positions] on a logarithmic scale; what is no number is left out."""
    inside = np.clip(kl[np.isfinite(kl)], _EDGES[0], np.nextafter(_EDGES[-1], 0))
    counts, _ = np.histogram(inside, _EDGES)
    return Histogram(_EDGES, tuple(counts.tolist()))


def _quantization(folder: Path, manifest: Manifest) -> QuantizationRecord | None:
    if QUANTIZATION not in manifest.files:
        return None
    try:
        return decode(QuantizationRecord, read(folder / QUANTIZATION, BundleError, "export the bundle again"))
    except (BundleError, ValueError):  # that of another version
        return None


def _figures(summary: Summary) -> Figures:
    return Figures(**summary.to_dict())  # type: ignore[arg-type]  # positions is a number in both


def _sample(answered: Answered) -> Sample:
    case = answered.case
    return Sample(
        name=case.name,
        question=case.question,
        pictures=_pictures(case.images),
        reference=answered.reference,
        candidate=answered.candidate,
        expected=case.answer,
        kl=answered.kl,
        same=answered.same,
    )


def _pictures(images: Sequence[Path | Image.Image]) -> tuple[str, ...]:
    return tuple(small_picture(image) for image in images[:_PICTURES])


def small_picture(source: Path | Image.Image) -> str:
    """A small JPEG as a `data:` address."""
    picture = load_image(source).convert("RGB")
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_PICTURE_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
