"""What quantization says of one linear layer. Plain data: filled by `quantize`, shown by the report.

Whatever is not known stays None, and what would show it is left out. Needs no package beyond the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass


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
class LinearFacts:
    """One linear layer of a quantized checkpoint, or one that was to be quantized and kept its floats.

    Attributes:
        name: canonical, without `.weight`: "decoder.layers.3.mlp.down_proj".
        scheme: how it is stored, for people: "int4 in groups of 128, symmetric", "bfloat16".
        bits_per_weight: scales and zero points included.
        error: relative output error on calibration tokens, sqrt(|Y' - Y|^2 / |Y|^2).
        sqnr_db: the same in decibels, -20 log10(error).
        cosine: between the outputs Y' and Y, all tokens as one vector.
        part: its share of the error that is predicted for the whole model (of the image embeddings, or of the KL).
        reason: why it got what it got, where that was a choice.
        inputs: of its activations.
    """

    name: str
    scheme: str
    bits_per_weight: float
    error: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    part: float | None = None
    reason: str = ""
    inputs: ActivationRange | None = None
