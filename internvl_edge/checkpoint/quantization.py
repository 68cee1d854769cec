"""Read how a checkpoint is quantized, and refuse unsupported quantizations with the reason.

This module knows the places of `quantization_config` in published checkpoints. The packing itself is in `codecs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.text import shown
from internvl_edge.model.config import VisionConfig
from internvl_edge.model.linear import Scheme

from .codecs import autoawq, compressed_tensors

# From this size on a vision tower counts as large (InternViT-6B: 3200 wide, 45 deep; InternViT-300M: 1024 wide, 24
# deep).
LARGE_TOWER_WIDTH = 3200
LARGE_TOWER_DEPTH = 45

_CODECS = {autoawq.METHOD: autoawq, compressed_tensors.METHOD: compressed_tensors}
# The sections of config.json that can hold a model's configuration; "" is the top level.
_SECTIONS = ("", "llm_config", "text_config", "vision_config")
# The prefix of a regular expression in a list of module names.
_REGULAR = "re:"
_BNB_METHOD = re.compile(r"bitsandbytes|bnb")
_BNB_FLAG = re.compile(r"_?load_in_[48]bit|bnb_.*|llm_int8_.*")
_BNB_TENSOR = re.compile(r"\.quant_state\.|\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format)$")


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's linears are packed.

    Attributes:
        method: "awq" or "compressed-tensors".
        schemes: all schemes that occur.
        targets: for each scheme its modules in config.json: stored names, `re:` and a regular expression, or "Linear".
        ignore: modules that stay float, in the same notation.
    """

    method: str
    schemes: tuple[Scheme, ...]
    targets: tuple[tuple[str, ...], ...] = field(default=(), compare=False)
    ignore: tuple[str, ...] = field(default=(), compare=False)

    def named_scheme(self, names: Iterable[str]) -> Scheme | None:
        """Return the scheme that config.json names for a module, or None for floats.

        Stored tensors, where there are any, are more reliable.

        Args:
            names: the names that the module can have, the most specific first.
        """
        names = list(names)
        if any(_matches(pattern, name) for pattern in self.ignore for name in names):
            return None
        pairs = [(pattern, scheme) for scheme, each in zip(self.schemes, self.targets, strict=True) for pattern in each]
        return next((scheme for name in names for pattern, scheme in pairs if _matches(pattern, name)), None)


def read_quantization(config: Mapping[str, Any], vision: VisionConfig) -> Quantization | None:
    """Return the quantization that the content of a `config.json` describes, or None for float weights.

    Raises:
        CheckpointError: bitsandbytes, another method or packing that is not supported, or two contradictory ones.
    """
    found: dict[str, Quantization] = {}
    for name in _SECTIONS:
        section = config if not name else config.get(name)
        if not isinstance(section, Mapping):
            continue
        prefix = f"{name}." if name else ""
        described = section.get("quantization_config")
        _refuse_bitsandbytes(section, described, prefix, vision)
        if described:
            found[f"{prefix}quantization_config"] = _read_one(described, f"{prefix}quantization_config")
    if len(set(found.values())) > 1:
        raise CheckpointError(f"config.json: {' and '.join(found)} contradict each other; keep the right one")
    return next(iter(found.values()), None)


def refuse_bitsandbytes_tensors(names: Iterable[str], vision: VisionConfig) -> None:
    """Raise CheckpointError where stored tensors are those of bitsandbytes, whatever config.json says."""
    for name in names:
        if _BNB_TENSOR.search(name):
            raise CheckpointError(bitsandbytes_refusal(f"tensor {name}", vision))


def is_large_tower(vision: VisionConfig) -> bool:
    """Return whether a vision tower has the size of the 6B kind."""
    return vision.hidden_size >= LARGE_TOWER_WIDTH or vision.num_hidden_layers >= LARGE_TOWER_DEPTH


def bitsandbytes_refusal(found: str, vision: VisionConfig) -> str:
    """Return the error message for bitsandbytes weights or flags: the reason, and what to use instead."""
    if is_large_tower(vision):
        return (
            f"{found} is bitsandbytes, with which a vision tower of this size ({vision.hidden_size} wide, "
            f"{vision.num_hidden_layers} layers) gives nonsensical output; use the AWQ checkpoint of this model or "
            "quantize the original with internvl-edge quantize, both leave the tower in 16 bits"
        )
    return (
        f"{found} is bitsandbytes, whose packing only its own CUDA kernels compute, so it cannot be exported; use "
        "the original checkpoint, its AWQ version, or internvl-edge quantize"
    )


def refuse_few_bits(bits: Any, where: str) -> None:
    """Raise CheckpointError for 2 bits and fewer."""
    if isinstance(bits, int) and bits <= 2:
        raise CheckpointError(
            f"{where} has {bits} bits, which leave too little of a model of this size; use 4 or 8 bits"
        )


def refuse_vision_bits(name: str, scheme: Scheme) -> None:
    """Raise CheckpointError where a linear of the vision tower has 4 bits."""
    if name.startswith("vision.") and scheme.bits < 8:
        raise CheckpointError(
            f"{name} has {scheme.bits} bits; a vision tower does not stand fewer than 8, keep it in 16 bits or int8"
        )


def _refuse_bitsandbytes(section: Mapping[str, Any], described: Any, prefix: str, vision: VisionConfig) -> None:
    flags = {f"config.json: {prefix}{key}": value for key, value in section.items() if _BNB_FLAG.fullmatch(str(key))}
    if isinstance(described, Mapping):
        path = f"config.json: {prefix}quantization_config"
        if _BNB_METHOD.search(str(described.get("quant_method", ""))):
            flags[path] = True
        flags |= {f"{path}.{key}": value for key, value in described.items() if _BNB_FLAG.fullmatch(str(key))}
    for path, value in flags.items():
        if value not in (False, None):
            raise CheckpointError(bitsandbytes_refusal(path, vision))


def _read_one(described: Any, path: str) -> Quantization:
    if not isinstance(described, Mapping):
        raise CheckpointError(f"config.json: {path} is not an object; download the file again")
    method = described.get("quant_method")
    if not isinstance(method, str) or method not in _CODECS:
        raise CheckpointError(
            f"config.json: {path}.quant_method is {shown(method)}, supported: {', '.join(_CODECS)}; "
            "use the AWQ or the original checkpoint"
        )
    refuse_few_bits(described.get("bits"), f"config.json: {path}")
    groups = described.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        refuse_few_bits(
            weights.get("num_bits") if isinstance(weights, Mapping) else None, f"config.json: {path}: {name}"
        )
    schemes = _CODECS[method].read_configuration(described)
    targets, ignore = _CODECS[method].read_targets(described)
    for pattern in (*chain.from_iterable(targets), *ignore):
        if pattern.startswith(_REGULAR):
            _require_regular(pattern, path)
    return Quantization(method, schemes, targets, ignore)


def _require_regular(pattern: str, path: str) -> None:
    try:
        re.compile(pattern.removeprefix(_REGULAR))
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"config.json: {path} names modules by {shown(pattern)}, which is no regular expression "
            f"({error}); correct it"
        ) from None


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith(_REGULAR):
        return re.match(pattern.removeprefix(_REGULAR), name) is not None
    return name == pattern or name.endswith(f".{pattern}")
