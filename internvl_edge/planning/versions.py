"""What each TensorRT can do, as data with sources: operators by type and version, and known miscompilations.

Versions are (major, minor). This module knows numbers and names. It does not load a TensorRT.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Version = tuple[int, int]
TENSORRT, RTX = "tensorrt", "tensorrt_rtx"
# The versions that the tables tell apart: JetPack 6.2 has 10.3, JetPack 7.0 and 7.1 have 10.13, JetPack 7.2 has 10.16.
VERSIONS: dict[str, tuple[Version, ...]] = {
    TENSORRT: ((10, 3), (10, 7), (10, 13), (10, 14), (10, 15), (10, 16)),
    RTX: ((1, 7),),
}

_DOCS = "onnx-tensorrt docs/operators.md at 10.1-GA, 10.15 and 10.16"
_CHANGES = "onnx-tensorrt docs/Changelog.md at 10.16"
_BUILT = "parsed and built with TensorRT for RTX 1.7.1"


@dataclass(frozen=True)
class Row:
    """Operators that a TensorRT takes for one kind of data.

    Attributes:
        operators: ONNX names.
        kind: the kind of the first input: "plain" (floats, int32, int64 and bool), "int8", "int4", or for a conversion
            of bytes "uint8 to TYPE".
        since: flavour -> the first version; a flavour that is not named does not list it.
        source: where this was read or seen.
    """

    operators: tuple[str, ...]
    kind: str
    since: dict[str, Version]
    source: str


_ALWAYS: dict[str, Version] = {TENSORRT: (10, 1), RTX: (1, 7)}
_PLAIN = (
    *("Add", "And", "ArgMax", "Cast", "Concat", "Div", "Expand", "Gather", "Gelu", "LayerNormalization", "Less"),
    *("LessOrEqual", "MatMul", "Mul", "QuantizeLinear", "Range", "ReduceMean", "ReduceSum", "Reshape", "Shape"),
    *("Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
)
ROWS = (
    Row(
        _PLAIN,
        "plain",
        _ALWAYS,
        f"{_DOCS}; {_BUILT}",
    ),
    Row(("DequantizeLinear",), "int8", _ALWAYS, f"{_DOCS}; {_BUILT}"),
    Row(("DequantizeLinear",), "int4", _ALWAYS, f"onnx-tensorrt source at 10.1-GA, blocks along axis 0; {_BUILT}"),
    Row(("Cast",), "uint8 to float16", _ALWAYS, f"NvInfer.h, IIdentityLayer, 10.3 to 11.1; {_BUILT}"),
    Row(("Cast",), "uint8 to float32", _ALWAYS, f"NvInfer.h, IIdentityLayer, 10.3 to 11.1; {_BUILT}"),
    Row(("Cast",), "uint8 to bfloat16", {RTX: (1, 7)}, _BUILT),
    Row(("Attention",), "plain", {TENSORRT: (10, 14), RTX: (1, 7)}, f"{_CHANGES}; {_BUILT}"),
    Row(
        ("RMSNormalization", "RotaryEmbedding", "TensorScatter"),
        "plain",
        {TENSORRT: (10, 15), RTX: (1, 7)},
        f"{_CHANGES}; {_BUILT}",
    ),
    # The parts of an int8 KV cache. TensorRT does not list them, and a dequantization behind an int8 slice does not
    # build with 10.16 on compute capability 8.7.
    Row(("Concat", "Slice"), "int8", {RTX: (1, 7)}, f"{_BUILT}; not listed in {_DOCS}; NVIDIA/TensorRT issue 4832"),
)
_SINCE = {(operator, row.kind): row.since for row in ROWS for operator in row.operators}
_NEW_LAYERS = ("Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter")
_CACHE_PARTS = ("Concat", "Slice")
# onnx-tensorrt source at 10.15 and 10.16. Without it a build fails where there is no single kernel for a shape.
_DECOMPOSABLE: Version = (10, 15)


@dataclass(frozen=True)
class Miscompilation:
    """A fault of a TensorRT's compiler, and the setting that avoids it.

    Attributes:
        first, last: the versions of `tensorrt` that have it; None for no known end.
        setting: a word of the environment variable `COMPILER_SETTINGS`.
        fault: what happens without the setting.
        source: who found it.
    """

    first: Version
    last: Version | None
    setting: str
    fault: str
    source: str


# The environment variable from which TensorRT's compiler reads settings, words with spaces between.
COMPILER_SETTINGS = "__LUNOWUD"
# Do not join products that share an input. TensorRT for RTX 1.7 dequantizes joined int8 weights in memory for each step
# and those of single products inside the product (kernels of built engines, tests/compiler).
UNJOINED = "-peep:fc_h_fusion=off"
# Our graphs have batch 1, which both faults need, unless `build` is told of several rows. Prompts have it even then.
MISCOMPILATIONS = (
    Miscompilation(
        (10, 13),
        None,
        UNJOINED,
        "products that share an input (q, k and v; gate and up) are joined wrongly at batch 1, and answers are noise",
        "NVIDIA/TensorRT-Edge-LLM issues 105 and 151 (10.13 on Thor); its builder sets this from 10.13 on, at batch 1",
    ),
    Miscompilation(
        (10, 13),
        (10, 14),
        "-peep:match_dual_gemm=off",
        "gate and up projections are joined wrongly",
        "the builder of NVIDIA/TensorRT-Edge-LLM sets this for 10.13 and 10.14",
    ),
)


def numbers(version: str) -> Version:
    """Return major and minor version of text such as "10.16.1.11"."""
    found = [int(part) for part in re.findall(r"\d+", version)[:2]]
    major, minor = (*found, 0, 0)[:2]
    return major, minor


def since(operator: str, kind: str, flavour: str) -> Version | None:
    """Return the first version that takes an operator for a kind of data, None where no version lists it."""
    return _SINCE.get((operator, kind), {}).get(flavour)


def has_new_layers(flavour: str, version: Version) -> bool:
    """Return whether a TensorRT has layers for attention, RMS norms, rotary embedding and the KV cache."""
    firsts = [since(operator, "plain", flavour) for operator in _NEW_LAYERS]
    return all(first is not None and version >= first for first in firsts)


def keeps_int8_cache(flavour: str) -> bool:
    """Return whether a TensorRT takes the int8 tensors of an int8 KV cache. If not, the cache has 16 bits."""
    return all(since(operator, "int8", flavour) is not None for operator in _CACHE_PARTS)


def reads_decomposable(flavour: str, version: Version) -> bool:
    """Return whether the importer reads the attribute by which attention may become several kernels."""
    return flavour == TENSORRT and version >= _DECOMPOSABLE


def compiler_settings(flavour: str, version: Version, int8_body: bool = False) -> tuple[str, ...]:
    """Return the settings that avoid the known miscompilations and slow forms of a version.

    `int8_body` says that linears in the decoder's layers have int8 weights and floating-point inputs.
    """
    if flavour != TENSORRT:
        return (UNJOINED,) if int8_body else ()
    return tuple(
        fault.setting
        for fault in MISCOMPILATIONS
        if fault.first <= version and (fault.last is None or version <= fault.last)
    )
