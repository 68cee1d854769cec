"""How a checkpoint was quantized, in `quantization.json`: written by `quantize`, carried by bundles, shown by reports.

What is not known is None, and what would show it is left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.jsonable import decode
from internvl_edge.base.run_record import RunRecord
from internvl_edge.model.components import Component
from internvl_edge.model.linear import Scheme

RECORD = "quantization.json"
# What `evaluation.report` adds to a quantized checkpoint.
_REPORTS = ("report.json", "report.html")


@dataclass(frozen=True)
class ActivationRange:
    """What the input of a linear looks like over calibration tokens, before smoothing.

    Attributes:
        largest: the largest |x|.
        p9999: the 99.99th percentile of |x|.
        typical: the median over channels of each channel's largest |x|; outliers stand out against it.
        clipped_at: the largest |x| that static int8 inputs represent, after smoothing; None where inputs stay floats.
        channels: (channel, its largest |x|) of the few channels with the largest values, largest first.
    """

    largest: float | None = None
    p9999: float | None = None
    typical: float | None = None
    clipped_at: float | None = None
    channels: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class LinearReport:
    """One linear layer of a quantized checkpoint, or one that was to be quantized and kept its floats.

    Attributes:
        name: canonical, without `.weight`: "decoder.layers.3.mlp.down_proj".
        dtype: of floats, or of the scales: "bfloat16".
        scheme: how its weights are rounded; None for floats.
        bits_per_weight: scales and zero points included.
        error: relative output error on calibration tokens, sqrt(|Y' - Y|^2 / |Y|^2).
        sqnr_db: the same in decibels, -20 log10(error).
        cosine: between the outputs Y' and Y, all tokens as one vector.
        part: its share of the error that is predicted for the whole model (of the image embeddings, or of the KL).
        reason: why it got what it got, where that was a choice.
        inputs: of its activations.
    """

    name: str
    dtype: str
    scheme: Scheme | None
    bits_per_weight: float
    error: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    part: float | None = None
    reason: str = ""
    inputs: ActivationRange | None = None

    @property
    def stored(self) -> str:
        """How it is stored, for people: "int4 in groups of 128, symmetric", "bfloat16"."""
        return str(self.scheme or self.dtype)


@dataclass(frozen=True)
class TowerReport:
    """An int8 vision tower against the float one, on calibration tiles: cosines of a tile's embeddings."""

    tiles: int
    cosine: float
    lowest_cosine: float
    predicted_cosine: float


@dataclass(frozen=True)
class QuantizationRecord:
    """How a checkpoint was quantized.

    Attributes:
        checkpoint: name of the folder it was made from.
        recipe: as values.
        samples, tokens, image_tokens: of the calibration set; 0 without data.
        broken: items of the data that were skipped.
        weights: file name -> bytes of the checkpoint that was made; ties this to it.
        components: sizes of its parts.
        linears: what was quantized or was to be.
        tower: where it is int8.
        bits_per_weight: of the decoder's layers on average, as devices hold them.
        predicted_kl: in nats, where precision was chosen by sensitivity.
        run: of the quantizer.
        files: names of all other files of the checkpoint, the record and reports not counted.
    """

    checkpoint: str
    recipe: dict[str, Any]
    samples: int
    tokens: int
    image_tokens: int
    broken: tuple[str, ...]
    weights: dict[str, int]
    components: tuple[Component, ...]
    linears: tuple[LinearReport, ...]
    tower: TowerReport | None
    bits_per_weight: float
    predicted_kl: float | None
    run: RunRecord
    files: tuple[str, ...] = ()


def weight_files(checkpoint: Path) -> dict[str, int]:
    """Name and bytes of a checkpoint's weight files."""
    return {path.name: path.stat().st_size for path in sorted(checkpoint.glob("*.safetensors"))}


def read_record(checkpoint: Path) -> QuantizationRecord | None:
    """How a checkpoint was quantized; None without a record, or with one of other weights or of another version."""
    try:
        record = decode(QuantizationRecord, json.loads((checkpoint / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    return record if record.weights == weight_files(checkpoint) else None


def quantized_files(checkpoint: Path) -> set[str]:
    """The own files of a checkpoint that `quantize` made.

    Raises:
        CheckpointError: there is no record in it, or one of other weights.
    """
    record = read_record(checkpoint)
    if record is None:
        raise CheckpointError(f"{checkpoint} is no quantized checkpoint with a {RECORD} that fits its weights")
    return {RECORD, *_REPORTS, "config.json", *record.weights, *record.files}
