"""The record of how a checkpoint was quantized (`quantization.json`).

`quantize` writes it, bundles carry it, and reports show it. An unknown value is None, and reports then omit it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.hub import HubSource
from internvl_edge.base.json_files import read
from internvl_edge.base.jsonable import decode
from internvl_edge.base.run_record import RunRecord
from internvl_edge.model.components import Component
from internvl_edge.model.linear import Scheme

RECORD = "quantization.json"
# What `evaluation.report` adds to a quantized checkpoint.
REPORTS = ("report.json", "report.html")


@dataclass(frozen=True)
class ActivationRange:
    """The range of a linear's input over calibration tokens, before smoothing.

    Attributes:
        largest: the largest |x|.
        p9999: the 99.99th percentile of |x|.
        typical: the median over channels of each channel's largest |x|. Outliers are large compared with it.
        clipped_at: the largest |x| that static int8 inputs represent, after smoothing; None where inputs stay float.
        channels: (channel, its largest |x|) of the few channels with the largest values, largest first.
    """

    largest: float | None = None
    p9999: float | None = None
    typical: float | None = None
    clipped_at: float | None = None
    channels: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class LinearReport:
    """One linear layer of a quantized checkpoint. It is quantized, or it was considered and stays float.

    Attributes:
        name: canonical, without `.weight`: "decoder.layers.3.mlp.down_proj".
        dtype: type of the float weights or of the scales: "bfloat16".
        scheme: how its weights are rounded; None for floats.
        bits_per_weight: including scales and zero points.
        error: relative output error on calibration tokens, sqrt(|Y' - Y|^2 / |Y|^2). For a linear of an int8 tower that
            stays float, that of its int8 form, which was not taken.
        sqnr_db: the same error in decibels, -20 log10(error).
        cosine: cosine between the outputs Y' and Y, with all tokens as one vector.
        part: its share of the error that is predicted for the whole model (of the image embeddings, or of the KL).
        reason: why its precision was chosen, where there was a choice.
        inputs: the range of its input.
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
        """A readable description of how it is stored: "int4 in groups of 128, symmetric", "bfloat16"."""
        return str(self.scheme or self.dtype)


@dataclass(frozen=True)
class TowerReport:
    """A comparison of an int8 vision tower with the float one, on calibration tiles: cosines of a tile's embeddings.

    `predicted_cosine` is None where the errors of its linears were not measured.
    """

    tiles: int
    cosine: float
    lowest_cosine: float
    predicted_cosine: float | None


@dataclass(frozen=True)
class QuantizationRecord:
    """The record of how a checkpoint was quantized.

    Attributes:
        checkpoint: hub id of the original, or the name of its folder.
        recipe: the recipe as JSON values.
        samples, tokens, image_tokens: sizes of the calibration set; 0 without data.
        broken: items of the data that were skipped.
        weights: file name -> bytes of the new checkpoint's weight files. They tie the record to the checkpoint.
        components: sizes of its parts.
        linears: the linears that were quantized, or were considered and stay float.
        tower: the comparison of the vision tower, where it is int8.
        bits_per_weight: average over the decoder's layers, as devices hold them.
        predicted_kl: in nats, where precision was chosen by sensitivity.
        run: of the quantizer.
        files: names of all other files of the checkpoint, the record and reports not counted.
        hub: where the original came from; None for a folder that nobody downloaded.
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
    hub: HubSource | None = None

    @property
    def errors(self) -> dict[str, float]:
        """The relative output error on calibration data of each quantized linear for which it is known."""
        linears = self.linears
        return {one.name: one.error for one in linears if one.scheme is not None and one.error is not None}


def weight_files(checkpoint: Path) -> dict[str, int]:
    """Return the names and sizes in bytes of a checkpoint's weight files."""
    return {path.name: path.stat().st_size for path in sorted(checkpoint.glob("*.safetensors"))}


def read_record(checkpoint: Path) -> QuantizationRecord | None:
    """Return the record of a checkpoint.

    Return None without a record, or with one of other weights or another version.
    """
    try:
        record = decode(QuantizationRecord, read(checkpoint / RECORD, CheckpointError, "quantize again"))
    except (CheckpointError, ValueError):
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
    return {RECORD, *REPORTS, "config.json", *record.weights, *record.files}
