"""Two formats of compressed-tensors: `pack-quantized` and `int-quantized`.

`pack-quantized` holds 4- or 8-bit weights in int32 words, with a scale per group or per row:

    weight_packed int32 [out, ceil(in * bits / 32)], weight_scale float [out, groups], weight_shape int64 [2] = out, in
    weight_zero_point int32 [ceil(out * bits / 32), groups], only with zero points

Integers are stored as their distance from the lowest value (signed value + 2**(bits-1)), in order, lowest bits first.
Weights are packed along the inputs, zero points along the outputs.

`int-quantized` holds int8 weights unpacked, with int8 inputs of one static scale:

    weight int8 [out, in], weight_scale float [out, 1], input_scale float [1]

A checkpoint with both is `mixed-precision`. Field names are those that compressed-tensors 0.20 writes and vLLM reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.text import one_line, shown
from internvl_edge.model.linear import W8A8, PackedLinear, Scheme

from .fields import inputs_per_group, module_names

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
INTEGER_FORMAT = "int-quantized"
_MIXED = "mixed-precision"
BITS = (4, 8)
_INT8_DEFAULTS: dict[str, Any] = {"type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
_INT8_INPUTS: dict[str, Any] = {"num_bits": 8, **_INT8_DEFAULTS}

Words = NDArray[np.int32]


def pack(linear: PackedLinear, scale_dtype: Any = np.float32) -> dict[str, NDArray[Any]]:
    """Return the stored tensors of one layer by the last part of their name, without its bias.

    Args:
        linear: any layer of 4 or 8 bits.
        scale_dtype: stored type of the scales; a 16-bit type rounds them. Those of `int-quantized` are always float32.
    """
    if linear.input_scale is not None:
        scales = {"weight_scale": linear.scale, "input_scale": np.array([linear.input_scale], np.float32)}
        return {"weight": linear.values, **scales}
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
    """Return the layer in the stored tensors. `pack(unpack(...))` returns the same integers."""
    out, inputs = (int(size) for size in weight_shape)
    values = _from_words(weight_packed, bits, inputs)
    scale = np.ascontiguousarray(weight_scale, np.float32)
    if weight_zero_point is None:
        return PackedLinear((values - np.uint8(1 << (bits - 1))).view(np.int8), scale, None, bits)
    zeros = _from_words(weight_zero_point.T, bits, out)
    return PackedLinear(values, scale, np.ascontiguousarray(zeros.T), bits)


def unpack_integers(weight: NDArray[np.int8], weight_scale: NDArray[Any], input_scale: NDArray[Any]) -> PackedLinear:
    """Return the layer in the stored tensors of `int-quantized`."""
    scale = np.ascontiguousarray(weight_scale, np.float32)
    return PackedLinear(weight, scale, None, 8, input_scale=float(input_scale.astype(np.float32).reshape(())))


def _to_words(values: NDArray[np.uint8], bits: int) -> Words:
    """Pack [rows, columns] to [rows, ceil(columns * bits / 32)]. The unused rest of the last word is zero."""
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
    """Return the `quantization_config` of a checkpoint.

    Args:
        targets: for each scheme its modules: stored names, `re:` and a regular expression, or "Linear".
        ignore: modules that stay float, in the same notation.
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
            "input_activations": {**_INT8_INPUTS, "group_size": None, "observer": "minmax"}
            if scheme.static_inputs
            else None,
            "output_activations": None,
            "format": INTEGER_FORMAT if scheme.static_inputs else FORMAT,
        }
        for index, (scheme, names) in enumerate(targets.items())
    }
    formats = {str(group["format"]) for group in groups.values()}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def read_configuration(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """Return the schemes of a `quantization_config`. The stored tensors tell which layer has which scheme.

    Raises:
        CheckpointError: another format, activations quantized while the model runs, a quantized cache, or weights other
            than int4 and int8.
    """
    groups, form = config.get("config_groups"), config.get("format")
    if form not in (FORMAT, INTEGER_FORMAT, _MIXED) or not isinstance(groups, dict) or not groups:
        raise CheckpointError(
            f"quantization_config: format {shown(form)} of {METHOD} is not supported, only {FORMAT} and "
            f"{INTEGER_FORMAT}; use an AWQ or unquantized checkpoint"
        )
    if config.get("kv_cache_scheme"):
        raise CheckpointError("quantization_config: kv_cache_scheme is not supported; use a weight-only checkpoint")
    return tuple(_scheme(name, group) for name, group in groups.items())


def read_targets(config: Mapping[str, Any]) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Which modules each scheme of `read_configuration` is for, and which keep floats, as in `configuration`."""
    groups = config["config_groups"].items()
    where = "quantization_config: config_groups"
    targets = tuple(module_names(group, "targets", f"{where}.{name}") for name, group in groups)
    return targets, module_names(config, "ignore")


def _scheme(name: str, group: Any) -> Scheme:
    if not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
        raise CheckpointError(f"quantization_config: config_groups.{name} has no weights, expected an object")
    inputs = group.get("input_activations")
    if group.get("output_activations") or (inputs and not _is_int8_inputs(inputs)):
        raise CheckpointError(
            f"quantization_config: config_groups.{name} quantizes activations otherwise than to symmetric int8 with "
            "one static scale per input; only that is supported, or weights alone"
        )
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    if not isinstance(symmetric := weights.get("symmetric", True), bool):
        raise CheckpointError(
            f"quantization_config: config_groups.{name}: symmetric is {shown(symmetric)}, expected true or false"
        )
    if bits not in BITS or kind != "int" or strategy not in ("group", "channel") or weights.get("actorder") == "group":
        raise CheckpointError(
            f"quantization_config: config_groups.{name} is {one_line(f'{kind}{bits} by {strategy}', 80)}, "
            "supported: int4 and int8, by group or channel, in the order of the inputs"
        )
    where = f"quantization_config: config_groups.{name}"
    group_size = inputs_per_group(weights.get("group_size"), where) if strategy == "group" else None
    scheme = Scheme(int(bits), group_size, symmetric, static_inputs=bool(inputs))
    if inputs and scheme != W8A8:
        raise CheckpointError(
            f"quantization_config: config_groups.{name} is {scheme}; int8 activations are supported with int8 weights "
            "of one scale per output"
        )
    return scheme


def _is_int8_inputs(described: Any) -> bool:
    """Return whether `input_activations` are symmetric int8 with one static scale.

    Absent fields have their defaults.
    """
    return isinstance(described, dict) and _INT8_INPUTS.items() <= (_INT8_DEFAULTS | described).items()
