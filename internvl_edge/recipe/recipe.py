"""The recipe: the frozen choices that `quantize` carries out.

This module does not know weights. All errors that depend only on the choices are raised here. `recipe.files` knows how
recipes are written in files.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.field_types import require_types
from internvl_edge.model.linear import GROUP_SIZES, INT8, W8A8, Scheme

LM_HEADS = ("fp", "int8", "int4")
ROUNDINGS = ("computed", "learned")
VISION = ("fp", "int8")
KV_CACHES = ("fp", "int8")
# Fields of a recipe that have few values.
_VALUES = {"group_size": GROUP_SIZES, "lm_head": LM_HEADS, "rounding": ROUNDINGS, "kv_cache": KV_CACHES}
CALIBRATORS = ("best", "minmax", "percentile-99.9", "percentile-99.99", "entropy", "mse")

_PRECISION = re.compile(r"(?P<method>.+?)(-g(?P<group>\d{1,9}))?")


@dataclass(frozen=True)
class Method:
    """What a scheme does to a linear of the decoder.

    Attributes:
        bits: of each weight; None where weights stay float.
        groups: each group of inputs has a scale of its own; otherwise each output has one.
        scales: what divides the inputs and multiplies the weights: the scales of AWQ, those of SmoothQuant, or nothing.
        clips: the range of each group is shrunk to the one with the least error.
        compensates: rounding errors are spread over the columns not yet rounded (GPTQ), if the recipe wants it.
        learns: integers are learned, if the recipe wants it.
        rounds_inputs: inputs are int8 too, with one static scale.
    """

    bits: int | None
    groups: bool = False
    scales: Literal["awq", "smooth"] | None = None
    clips: bool = False
    compensates: bool = False
    learns: bool = False
    rounds_inputs: bool = False

    def scheme(self, group_size: int, symmetric: bool) -> Scheme | None:
        """Return how weights are rounded; None for floats. The arguments count only where there are groups."""
        if self.bits is None:
            return None
        if self.groups:
            return Scheme(self.bits, group_size, symmetric)
        return W8A8 if self.rounds_inputs else INT8


METHODS = {
    "w4a16-awq": Method(4, groups=True, scales="awq", clips=True, compensates=True, learns=True),
    "w4a16-rtn": Method(4, groups=True),
    "w8a16": Method(8, compensates=True),
    "w8a8": Method(8, scales="smooth", rounds_inputs=True),
    "fp": Method(None),
}
DECODER_SCHEMES = tuple(METHODS)
_GROUPED = tuple(name for name, method in METHODS.items() if method.groups)
# The error where a recipe, or what it means for a checkpoint, keeps everything in float.
NOTHING_ROUNDED = "decoder, lm_head and vision all keep their floats; quantize at least one of them"
# The error where rounding is to be learned and no linear has a precision that learns.
NOTHING_LEARNS = (
    f"only the rounding of {' and '.join(name for name, method in METHODS.items() if method.learns)} is learned, "
    "and no linear here is; use rounding = computed"
)


@dataclass(frozen=True)
class Precision:
    """How one linear of the decoder is stored and computed.

    Attributes:
        name: one of `DECODER_SCHEMES`.
        scheme: how weights are rounded; None for floats.
    """

    name: str
    scheme: Scheme | None

    @property
    def method(self) -> Method:
        """What is done to the linear."""
        return METHODS[self.name]

    def __str__(self) -> str:
        """Return the notation of recipes, with the group size: w4a16-awq-g64."""
        grouped = self.scheme is not None and self.scheme.group_size is not None
        return f"{self.name}-g{self.scheme.group_size}" if grouped and self.scheme else self.name

    @property
    def needs_data(self) -> bool:
        """Whether the method needs calibration data: it uses a layer's inputs, and not only its weights."""
        return self.method.scales is not None


def _require_calibrator(name: str) -> None:
    if name not in CALIBRATORS:
        raise EdgeError(f"calibrator {name!r} is not one of {', '.join(CALIBRATORS)}")


@dataclass(frozen=True)
class VisionInt8:
    """How a vision tower and its projector are quantized to int8, weights and inputs.

    Attributes:
        calibrator: finds the range of inputs: one of `CALIBRATORS`; "best" takes for each linear the one with the
            smallest output error.
        smoothing: SmoothQuant, folded into the norms before qkv, fc1 and the projector.
        cosine: linears stay float, the most harmful first, until the predicted cosine between the image embeddings and
            those of the float tower reaches this value; 0 for none: then the errors are not measured.
        keep: patterns (`*`, `?`) of canonical names of linears that stay float: "projector.*".

    Raises:
        EdgeError: from the constructor, for anything else.
    """

    calibrator: str = "best"
    smoothing: bool = True
    cosine: float = 0.9997
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_types(self)
        _require_calibrator(self.calibrator)
        if not 0 <= self.cosine < 1:
            raise EdgeError(f"a cosine of {self.cosine:g} is not possible for int8; give one from 0 to below 1")

    @property
    def measures(self) -> bool:
        """Whether the error that each linear causes is measured: only the limit of the cosine asks for it."""
        return self.cosine > 0


@dataclass(frozen=True)
class DecoderInt8:
    """How linears of the decoder are quantized to "w8a8".

    Attributes:
        calibrator: as for the tower.
        smoothing: SmoothQuant, folded into the producer of each input: norms, value rows, up rows.
        max_kl: linears keep float inputs or stay float, chosen by `Automatic`, until the predicted divergence is at
            most this; 0 for none. In one or two layers, language models have tokens whose values are a thousand times
            larger than all others. No static range fits both.

    Raises:
        EdgeError: from the constructor, for anything else.
    """

    calibrator: str = "best"
    smoothing: bool = True
    max_kl: float = 0.02

    def __post_init__(self) -> None:
        require_types(self)
        _require_calibrator(self.calibrator)
        if not 0 <= self.max_kl < math.inf:
            raise EdgeError(f"a divergence of {self.max_kl:g} is not possible; give one above 0, or 0 for no limit")


@dataclass(frozen=True)
class LearnedRounding:
    """How the rounding of a layer's weights is learned.

    Attributes:
        steps: steps of gradient descent for each layer.
        tokens: calibration tokens of each step, in whole samples.
        rate: the largest step of a weight, in units of its grid. Linears with more than 1536 inputs take smaller ones.
        seed: decides the order of the samples.

    Raises:
        EdgeError: from the constructor, for anything else.
    """

    steps: int = 32
    tokens: int = 1024
    rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        require_types(self)
        if not (1 <= self.steps <= 100_000 and 1 <= self.tokens <= 1 << 20 and 0 <= self.seed < 1 << 32):
            raise EdgeError("learning takes 1 to 100000 steps of 1 to 1048576 tokens each, and a seed below 2^32")
        if not 0 < self.rate <= 0.5:
            raise EdgeError(f"a rate of {self.rate:g} is not possible; give one above 0, at most 0.5, such as 0.01")


@dataclass(frozen=True)
class Automatic:
    """Choose the precision of each linear of the decoder by its measured sensitivity, within one of two limits.

    Attributes:
        target_bits: limit of the average bits per weight of the decoder's layers, including scales and zero points. The
            choice has the smallest divergence within it.
        max_kl: limit of the Kullback-Leibler divergence of the next token from the float model's, mean in nats, that is
            predicted for the decoder's layers. The choice has the fewest bits within it.
        among: precisions to choose from ("w4a16-awq-g32", "w8a16"); empty for the recipe's own decoder scheme, the same
            with half the group size, w8a16 and fp.

    Raises:
        EdgeError: from the constructor: both limits or none, or an impossible one.
    """

    target_bits: float | None = None
    max_kl: float | None = None
    among: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_types(self)
        if (self.target_bits is None) == (self.max_kl is None):
            raise EdgeError("precision is chosen by target_bits or by max_kl; give one of the two")
        if self.target_bits is not None and not 4 < self.target_bits <= 16:
            raise EdgeError(f"{self.target_bits:g} bits per weight are not possible; give more than 4, at most 16")
        if self.max_kl is not None and not 0 < self.max_kl < math.inf:
            raise EdgeError(f"a divergence of {self.max_kl:g} is not possible; give one above 0, such as 0.02")


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized. The token table of the checkpoint stays float (`export` rounds that of the bundle).

    Attributes:
        decoder: "w4a16-awq" (4 bits, scales and clipping from activations), "w4a16-rtn" (4 bits, rounding to nearest),
            "w8a16" (8 bits, one scale per output), "w8a8" (the same, and int8 inputs with one static scale each) or
            "fp" (unchanged).
        group_size: inputs that share one scale of 4-bit weights: 32, 64 or 128.
        symmetric: no zero points, as TensorRT needs; otherwise AutoAWQ's asymmetric form. 8-bit weights are always
            symmetric.
        negative_scales: scales of 4-bit weights without zero points may be negative: the grid of a group then ends at
            its largest weight, whatever the sign of that. TensorRT takes positive scales alone.
        lm_head: "fp" (unchanged), "int8" (one scale per output) or "int4" (as the decoder's 4-bit weights).
        error_compensation: spread each column's rounding error over the columns not yet rounded (GPTQ); for w4a16-awq
            and w8a16. Without it, w8a16 is rounding to nearest, without data. The same holds where only exceptions are
            w8a16 and nothing else needs data.
        rounding: "computed" (to nearest, after error compensation if there is one) or "learned": from there, weights of
            w4a16-awq move to the other neighbor where a layer's output comes nearer to the float model's. It takes
            longer.
        learning: options of learned rounding.
        vision: "fp" or "int8" (weights and inputs of tower and projector); fewer bits are refused.
        vision_int8: options of int8 vision.
        decoder_int8: options of "w8a8".
        kv_cache: "fp" or "int8".
        layers: (pattern, precision) exceptions; the last one that matches a linear applies. Patterns (`*`, `?`) match
            canonical names, with or without "decoder.": ("layers.0.*", "w8a16"), ("*.down_proj", "w4a16-awq-g32").
            Those of tower and projector can only be "fp".
        automatic: chooses the precision of the linears that no pattern matches. "w8a8" also chooses without it, see
            `DecoderInt8.max_kl`.

    Raises:
        EdgeError: from the constructor, for anything else.
    """

    decoder: str = "w4a16-awq"
    group_size: int = 128
    symmetric: bool = False
    negative_scales: bool = False
    lm_head: str = "fp"
    error_compensation: bool = True
    rounding: str = "computed"
    learning: LearnedRounding = LearnedRounding()
    vision: str = "fp"
    vision_int8: VisionInt8 = VisionInt8()
    decoder_int8: DecoderInt8 = DecoderInt8()
    kv_cache: str = "fp"
    layers: tuple[tuple[str, str], ...] = ()
    automatic: Automatic | None = None

    def __post_init__(self) -> None:
        require_types(self)
        if self.decoder not in DECODER_SCHEMES:
            raise EdgeError(_unknown_scheme(self.decoder))
        for name, allowed in _VALUES.items():
            if (value := getattr(self, name)) not in allowed:
                raise EdgeError(f"{name} {value!r} is not one of {', '.join(map(str, allowed))}")
        if self.vision not in VISION:
            raise EdgeError(
                f"vision {self.vision!r} is not supported: towers lose their answers below 8 bits; use int8 or fp"
            )
        if self.negative_scales and not self.symmetric:
            raise EdgeError("negative scales are for weights without zero points; use symmetric or positive scales")
        possible = self.possible
        self._require_choice()
        if self.rounding == "learned" and not any(precision.method.learns for precision in possible):
            raise EdgeError(NOTHING_LEARNS)
        floats = (self.lm_head, self.vision, self.kv_cache) == ("fp", "fp", "fp")
        if floats and all(precision.scheme is None for precision in possible):
            raise EdgeError(NOTHING_ROUNDED)

    def _require_choice(self) -> None:
        if self.automatic and self.base.scheme is None:
            raise EdgeError("precision is chosen from the decoder's scheme upwards; give a decoder scheme below fp")
        if self.choice and all(precision.scheme is None for precision in self.candidates):
            raise EdgeError("precision is chosen among fp alone; give at least one other, such as w8a16")
        if self.choice and self.choice.target_bits and any(p.method.rounds_inputs for p in self.candidates):
            raise EdgeError("w8a8 has as many bits as w8a16, so target_bits cannot choose between them; give max_kl")

    def precision(self, text: str) -> Precision:
        """Return the precision that a text like "w8a16" or "w4a16-awq-g32" means in this recipe.

        Raises:
            EdgeError: no such scheme or group size, or a group size where there are no groups.
        """
        found = _PRECISION.fullmatch(text)
        name = found["method"] if found else text
        if name not in METHODS:
            raise EdgeError(_unknown_scheme(text))
        group = int(found["group"]) if found and found["group"] else None
        if group is not None and name not in _GROUPED:
            raise EdgeError(f"{text!r}: only {' and '.join(_GROUPED)} have groups; write {name}")
        if group is not None and group not in GROUP_SIZES:
            raise EdgeError(f"{text!r}: group size {group} is not one of {', '.join(map(str, GROUP_SIZES))}")
        return Precision(name, METHODS[name].scheme(group or self.group_size, self.symmetric))

    @property
    def base(self) -> Precision:
        """The precision of linears in the decoder's layers that no pattern or choice changes."""
        return self.precision(self.decoder)

    @property
    def head(self) -> Precision:
        """The precision of lm_head. "int4" means the decoder's 4-bit scheme, where it has one."""
        four_bits = self.decoder if self.decoder in _GROUPED else _GROUPED[not self.needs_data]
        return self.precision({"fp": "fp", "int8": "w8a16", "int4": four_bits}[self.lm_head])

    @property
    def choice(self) -> Automatic | None:
        """The limits of the automatic choice; None where nothing is chosen."""
        limited = self.base.method.rounds_inputs and self.decoder_int8.max_kl > 0
        return self.automatic or (Automatic(max_kl=self.decoder_int8.max_kl) if limited else None)

    @property
    def candidates(self) -> list[Precision]:
        """The precisions that the automatic choice can use, without duplicates; empty where nothing is chosen."""
        if self.choice is None:
            return []
        halved = self.group_size // 2
        finer = [f"{self.decoder}-g{halved}"] if self.decoder in _GROUPED and halved in GROUP_SIZES else []
        among = self.choice.among or (self.decoder, *finer, "w8a16", "fp")
        return list(dict.fromkeys(self.precision(text) for text in among))

    @property
    def possible(self) -> list[Precision]:
        """The precisions that linears in the decoder's layers can get."""
        return [self.base, *(self.precision(text) for _, text in self.layers), *self.candidates]

    @property
    def needs_data(self) -> bool:
        """Whether the decoder's activations are needed: by a linear, by a choice, or for the range of the KV cache."""
        chosen = self.choice is not None or self.kv_cache == "int8"
        compensated = self.base.method.compensates and self.error_compensation
        return chosen or compensated or any(each.needs_data for each in self.possible)

    @property
    def is_autoawq(self) -> bool:
        """Whether AutoAWQ's format can represent the whole recipe."""
        uniform = not self.layers and self.choice is None
        others = (self.lm_head, self.vision, self.kv_cache) == ("fp", "fp", "fp")
        return self.decoder in _GROUPED and not self.symmetric and uniform and others


def _unknown_scheme(name: str) -> str:
    reason = "2-bit weights leave too little of models of this size; " if name.startswith("w2") else ""
    return f"scheme {name!r} is not supported; {reason}choose one of {', '.join(DECODER_SCHEMES)}"
