"""What a quantised model should be: the frozen choices that `quantize` carries out.

Knows nothing about weights; every refusal that depends on the choices alone is made here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .errors import EdgeError

DECODER_SCHEMES = ("w4a16-awq", "w4a16-rtn", "w8a16", "fp")
GROUP_SIZES = (32, 64, 128)
LM_HEADS = ("fp", "int8", "int4")
VISION = ("fp", "int8")
CALIBRATORS = ("best", "minmax", "percentile-99.9", "percentile-99.99", "entropy", "mse")


@dataclass(frozen=True)
class VisionInt8:
    """How a tower and its projector become int8, weights and inputs.

    Attributes:
        calibrator: finds the range of inputs: one of `CALIBRATORS`; "best" takes for each linear the one with the
            smallest output error.
        smoothing: SmoothQuant, folded into the norms before qkv, fc1 and the projector.
        cosine: linears keep their floats, the most harmful first, until this cosine between the image embeddings and
            those of the float tower is to be expected; 0 for none.
        keep: patterns (`*`, `?`) of canonical linear names that keep their floats: "projector.*".

    Raises:
        EdgeError: from the constructor, for anything else.
    """

    calibrator: str = "best"
    smoothing: bool = True
    cosine: float = 0.9995
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.calibrator not in CALIBRATORS:
            raise EdgeError(f"calibrator {self.calibrator!r} is not one of {', '.join(CALIBRATORS)}")
        if not 0 <= self.cosine < 1:
            raise EdgeError(f"a cosine of {self.cosine:g} is not possible for int8; give one from 0 to below 1")


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised. The token table keeps its floats.

    Attributes:
        decoder: "w4a16-awq" (4 bits, scales and clipping from activations), "w4a16-rtn" (4 bits, rounding alone),
            "w8a16" (8 bits, one scale per output) or "fp" (as it is).
        group_size: inputs that share one scale of 4-bit weights: 32, 64 or 128.
        symmetric: no zero points, as TensorRT needs; otherwise AutoAWQ's asymmetric form. 8-bit weights always are.
        lm_head: "fp" (as it is), "int8" (one scale per output) or "int4" (as the decoder's 4-bit weights).
        error_compensation: spread each column's rounding error over the columns not yet rounded (GPTQ); w4a16-awq only.
        vision: "fp" or "int8" (weights and inputs of tower and projector); fewer bits are refused.
        vision_int8: how, where it is.

    Raises:
        EdgeError: from the constructor, for anything else.
    """

    decoder: str = "w4a16-awq"
    group_size: int = 128
    symmetric: bool = False
    lm_head: str = "fp"
    error_compensation: bool = True
    vision: str = "fp"
    vision_int8: VisionInt8 = VisionInt8()

    def __post_init__(self) -> None:
        if self.decoder not in DECODER_SCHEMES:
            raise EdgeError(_unknown_scheme(self.decoder))
        if self.group_size not in GROUP_SIZES:
            raise EdgeError(f"group size {self.group_size} is not one of {', '.join(map(str, GROUP_SIZES))}")
        if self.lm_head not in LM_HEADS:
            raise EdgeError(f"lm_head {self.lm_head!r} is not one of {', '.join(LM_HEADS)}")
        if self.vision not in VISION:
            raise EdgeError(
                f"vision {self.vision!r} is not supported: towers lose their answers below 8 bits; use int8 or fp"
            )
        if (self.decoder, self.lm_head, self.vision) == ("fp", "fp", "fp"):
            raise EdgeError("decoder, lm_head and vision all keep their floats; quantise at least one of them")

    @property
    def bits(self) -> int:
        """Bits of a quantised decoder weight."""
        return 8 if self.decoder == "w8a16" else 4

    @property
    def needs_data(self) -> bool:
        """Whether the decoder's activations are needed."""
        return self.decoder == "w4a16-awq"

    @property
    def is_autoawq(self) -> bool:
        """Whether AutoAWQ's format can say all of it."""
        four_bits = self.decoder in ("w4a16-awq", "w4a16-rtn")
        return four_bits and not self.symmetric and (self.lm_head, self.vision) == ("fp", "fp")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return asdict(self)


def _unknown_scheme(name: str) -> str:
    reason = "2-bit weights leave too little of models of this size; " if name.startswith("w2") else ""
    return f"scheme {name!r} is not supported; {reason}choose one of {', '.join(DECODER_SCHEMES)}"
