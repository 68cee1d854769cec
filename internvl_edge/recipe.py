"""What a quantised model should be: the frozen choices that `quantize` carries out.

Knows nothing about weights; every refusal that depends on the choices alone is made here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .errors import EdgeError

DECODER_SCHEMES = ("w4a16-awq", "w4a16-rtn", "w8a16")
GROUP_SIZES = (32, 64, 128)
LM_HEADS = ("fp", "int8", "int4")


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised. The vision tower, the projector and the token table keep their floats.

    Attributes:
        decoder: "w4a16-awq" (4 bits, scales and clipping from activations), "w4a16-rtn" (4 bits, rounding alone) or
            "w8a16" (8 bits, one scale per output).
        group_size: inputs that share one scale of 4-bit weights: 32, 64 or 128.
        symmetric: no zero points, as TensorRT needs; otherwise AutoAWQ's asymmetric form. 8-bit weights always are.
        lm_head: "fp" (as it is), "int8" (one scale per output) or "int4" (as the decoder's 4-bit weights).
        error_compensation: spread each column's rounding error over the columns not yet rounded (GPTQ); w4a16-awq only.
        vision: "fp"; int8 towers are a matter of export, fewer bits are refused.

    Raises:
        EdgeError: from the constructor, for anything else.
    """

    decoder: str = "w4a16-awq"
    group_size: int = 128
    symmetric: bool = False
    lm_head: str = "fp"
    error_compensation: bool = True
    vision: str = "fp"

    def __post_init__(self) -> None:
        if self.decoder not in DECODER_SCHEMES:
            raise EdgeError(_unknown_scheme(self.decoder))
        if self.group_size not in GROUP_SIZES:
            raise EdgeError(f"group size {self.group_size} is not one of {', '.join(map(str, GROUP_SIZES))}")
        if self.lm_head not in LM_HEADS:
            raise EdgeError(f"lm_head {self.lm_head!r} is not one of {', '.join(LM_HEADS)}")
        if self.vision != "fp":
            raise EdgeError(
                f"vision {self.vision!r} is not supported: towers lose their answers below 8 bits, and int8 is chosen "
                "when a bundle is exported; leave it at fp"
            )

    @property
    def bits(self) -> int:
        """Bits of a decoder weight."""
        return 8 if self.decoder == "w8a16" else 4

    @property
    def needs_data(self) -> bool:
        """Whether activations are needed."""
        return self.decoder == "w4a16-awq"

    @property
    def is_autoawq(self) -> bool:
        """Whether AutoAWQ's format can say all of it."""
        return self.bits == 4 and not self.symmetric and self.lm_head == "fp"

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return asdict(self)


def _unknown_scheme(name: str) -> str:
    reason = "2-bit weights leave too little of models of this size; " if name.startswith("w2") else ""
    return f"scheme {name!r} is not supported; {reason}choose one of {', '.join(DECODER_SCHEMES)}"
