"""The `pack-quantized` format of compressed-tensors: 4- or 8-bit weights in int32 words, grouped or one scale per row.

    weight_packed int32 [out, ceil(in * bits / 32)], weight_scale float [out, groups], weight_shape int64 [2] = out, in
    weight_zero_point int32 [ceil(out * bits / 32), groups], only with zero points

Integers are stored counted from the lowest value (signed value + 2**(bits-1)), in order, lowest bits first; weights are
packed along the inputs, zero points along the outputs. Field names as compressed-tensors 0.20 writes them and vLLM
reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from ..linear import PackedLinear, Scheme

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
BITS = (4, 8)

Words = NDArray[np.int32]


def pack(linear: PackedLinear, scale_dtype: Any = np.float32) -> dict[str, NDArray[Any]]:
    """The stored tensors of one layer by their last name. A bias is not included.

    Args:
        linear: any layer of 4 or 8 bits.
        scale_dtype: how scales are stored; a 16-bit type rounds them.
    """
    out, inputs = linear.values.shape
    offset = 0 if linear.zero_point is not None else linear.middle
    packed = {
        "weight_packed": _to_words(linear.values.view(np.uint8) + np.uint8(offset), linear.bits),
        "weight_scale": linear.scale.astype(scale_dtype),
        "weight_shape": np.array([out, inputs], np.int64),
    }
    if linear.zero_point is not None:
        packed["weight_zero_point"] = np.ascontiguousarray(_to_words(linear.zero_point.T, linear.bits).T)
    return packed


def unpack(
    weight_packed: Words,
    weight_scale: NDArray[Any],
    weight_shape: NDArray[Any],
    bits: int,
    weight_zero_point: Words | None = None,
) -> PackedLinear:
    """The layer behind the stored tensors, bit for bit: `pack(unpack(...))` gives the integers back."""
    out, inputs = (int(size) for size in weight_shape)
    values = _from_words(weight_packed, bits, inputs)
    scale = np.ascontiguousarray(weight_scale, np.float32)
    if weight_zero_point is None:
        return PackedLinear((values - np.uint8(1 << (bits - 1))).view(np.int8), scale, None, bits)
    zeros = _from_words(weight_zero_point.T, bits, out)
    return PackedLinear(values, scale, np.ascontiguousarray(zeros.T), bits)


def _to_words(values: NDArray[np.uint8], bits: int) -> Words:
    """[rows, columns] -> [rows, ceil(columns * bits / 32)]; what is left of the last word is zero."""
    rows, columns = values.shape
    words = -(-columns * bits // 32)
    padded = np.zeros((rows, words * 32 // bits), np.uint8)
    padded[:, :columns] = values
    data = padded if bits == 8 else padded[:, 0::2] | padded[:, 1::2] << 4
    return data.view("<i4")


def _from_words(words: Words, bits: int, columns: int) -> NDArray[np.uint8]:
    data = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 4:
        nibbles = np.empty((len(data), 2 * data.shape[1]), np.uint8)
        nibbles[:, 0::2], nibbles[:, 1::2] = data & 15, data >> 4
        data = nibbles
    return np.ascontiguousarray(data[:, :columns])


def configuration(targets: Mapping[Scheme, Iterable[str]], ignore: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of a checkpoint.

    Args:
        targets: for each scheme the modules that have it: stored names, `re:` and a regular expression, or "Linear".
        ignore: modules that keep float weights, written the same way.
    """
    groups = {
        f"group_{index}": {
            "targets": list(names),
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "group_size": scheme.group_size,
                "strategy": "channel" if scheme.group_size is None else "group",
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        for index, (scheme, names) in enumerate(targets.items())
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def read_configuration(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The schemes of a `quantization_config`; which layer has which follows from its stored tensors.

    Raises:
        CheckpointError: another format, quantised activations or cache, or weights other than int4 and int8.
    """
    groups = config.get("config_groups")
    if config.get("format") != FORMAT or not isinstance(groups, dict) or not groups:
        raise CheckpointError(
            f"quantization_config: format {config.get('format')!r} of {METHOD} is not supported, only {FORMAT}; "
            "use an AWQ or unquantised checkpoint"
        )
    if config.get("kv_cache_scheme"):
        raise CheckpointError("quantization_config: kv_cache_scheme is not supported; use a weight-only checkpoint")
    return tuple(_scheme(name, group) for name, group in groups.items())


def _scheme(name: str, group: Any) -> Scheme:
    if not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
        raise CheckpointError(f"quantization_config: config_groups.{name} has no weights, expected an object")
    if group.get("input_activations") or group.get("output_activations"):
        raise CheckpointError(
            f"quantization_config: config_groups.{name} quantises activations; only weights may be quantised"
        )
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    if bits not in BITS or kind != "int" or strategy not in ("group", "channel") or weights.get("actorder") == "group":
        raise CheckpointError(
            f"quantization_config: config_groups.{name} is {kind}{bits} by {strategy}, "
            "supported: int4 and int8, by group or channel, in the order of the inputs"
        )
    group_size = weights.get("group_size") if strategy == "group" else None
    return Scheme(bits, group_size, weights.get("symmetric", True) is True)
