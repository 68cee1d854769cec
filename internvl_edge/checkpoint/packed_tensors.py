"""Find, check and read the stored tensors of one quantized linear, in each format.

The stored tensors decide which layers are quantized, because `ignore` and `modules_to_not_convert` are absent in many
published configurations. This module does not know models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from internvl_edge.base.errors import CheckpointError
from internvl_edge.model.linear import GROUP_SIZES, W8A8, PackedLinear, Scheme

from .codecs import autoawq, compressed_tensors
from .quantization import Quantization
from .tensor_files import StoredTensor

FLOATS = ("F32", "F16", "BF16")
_FIRST = {autoawq.METHOD: "qweight", compressed_tensors.METHOD: "weight_packed"}


@dataclass(frozen=True)
class _Need:
    """One required tensor: the last part of its name, its shape, its possible dtypes."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def is_packed(stored: Mapping[str, StoredTensor], module: str) -> bool:
    """Return whether a module's weight is stored packed, in any of the formats."""
    return _is_integer(stored, module) or any(f"{module}.{first}" in stored for first in _FIRST.values())


def _is_integer(stored: Mapping[str, StoredTensor], module: str) -> bool:
    """Return whether a module's weight is stored as int8, one value per byte."""
    weight = stored.get(f"{module}.weight")
    return weight is not None and weight.dtype == "I8"


def check_packed(
    quantization: Quantization, stored: Mapping[str, StoredTensor], module: str, shape: tuple[int, int]
) -> tuple[Scheme, list[str]]:
    """Return the scheme of a module whose weight is [out, in] = `shape`, and its stored names.

    Raises:
        CheckpointError: a tensor is missing or has another shape or dtype than its scheme needs (named), or the group
            size does not divide the inputs.
    """
    scheme = _scheme_of(quantization, stored, module, shape)
    check_group_size(module, shape[1], scheme)
    names = []
    for need in _NEEDS[quantization.method](scheme, *shape):
        name = f"{module}.{need.name}"
        tensor = stored.get(name)
        if tensor is None:
            raise CheckpointError(f"tensor {name} is missing; {scheme} needs it, download it again")
        if tensor.shape != need.shape:
            raise CheckpointError(
                f"tensor {name} has the shape {list(tensor.shape)}, {scheme} of {list(shape)} needs {list(need.shape)}"
            )
        if tensor.dtype not in need.dtypes:
            raise CheckpointError(f"tensor {name} has dtype {tensor.dtype}, expected {', '.join(need.dtypes)}")
        names.append(name)
    return scheme, names


def check_group_size(module: str, inputs: int, scheme: Scheme) -> None:
    """Check that groups divide the inputs.

    Raises:
        CheckpointError: they do not; the message names the layer and the sizes that fit.
    """
    if scheme.group_size is not None and inputs % scheme.group_size:
        fitting = [str(size) for size in GROUP_SIZES if inputs % size == 0]
        raise CheckpointError(
            f"{module} has {inputs} inputs, which groups of {scheme.group_size} do not divide; "
            f"group sizes that fit: {', '.join(fitting) or 'none of ' + ', '.join(map(str, GROUP_SIZES))}"
        )


def read_packed(
    quantization: Quantization, stored: Mapping[str, StoredTensor], module: str, scheme: Scheme
) -> PackedLinear:
    """Read a module that `check_packed` has accepted.

    Raises:
        CheckpointError: a scale is NaN or infinite, or `weight_shape` contradicts the other tensors.
    """

    def read(name: str) -> np.ndarray[Any, Any]:
        return stored[f"{module}.{name}"].read()

    if quantization.method == autoawq.METHOD:
        linear = autoawq.unpack(read("qweight"), read("qzeros"), read("scales"))
    elif scheme.static_inputs:
        linear = compressed_tensors.unpack_integers(read("weight"), read("weight_scale"), read("input_scale"))
        _check_input_scale(module, linear)
    else:
        shape = read("weight_shape")
        words = -(-int(shape[1]) * scheme.bits // 32)
        if (int(shape[0]), words) != stored[f"{module}.weight_packed"].shape:
            raise CheckpointError(f"tensor {module}.weight_shape holds {shape.tolist()}, unlike its weight's shape")
        zeros = None if scheme.symmetric else read("weight_zero_point")
        linear = compressed_tensors.unpack(read("weight_packed"), read("weight_scale"), shape, scheme.bits, zeros)
    if not np.isfinite(linear.scale).all():
        raise CheckpointError(f"{module}: a scale is NaN or infinite; the file is damaged, download it again")
    return linear


def _check_input_scale(module: str, linear: PackedLinear) -> None:
    assert linear.input_scale is not None
    if not 0 < linear.input_scale < float("inf"):
        raise CheckpointError(
            f"tensor {module}.input_scale holds {linear.input_scale:g}, expected a positive number; download it again"
        )


def _scheme_of(
    quantization: Quantization, stored: Mapping[str, StoredTensor], module: str, shape: tuple[int, int]
) -> Scheme:
    """Return the first scheme that fits the packed weight's width, its scales, and the presence of zero points."""
    if W8A8 in quantization.schemes and _is_integer(stored, module):
        return W8A8
    first = stored.get(f"{module}.{_FIRST[quantization.method]}")
    if first is None:
        raise CheckpointError(
            f"tensor {module}.{_FIRST[quantization.method]} is missing; config.json says {quantization.method}"
        )
    schemes = [scheme for scheme in quantization.schemes if not scheme.static_inputs]
    if len(schemes) == 1:
        return schemes[0]
    scales = stored.get(f"{module}.weight_scale")
    symmetric = f"{module}.weight_zero_point" not in stored
    for scheme in schemes:
        groups = _groups(scheme, shape[1])
        width = -(-shape[1] * scheme.bits // 32)
        if (first.shape[-1], scales and scales.shape[-1], symmetric) == (width, groups, scheme.symmetric):
            return scheme
    listed = "; ".join(str(scheme) for scheme in quantization.schemes)
    raise CheckpointError(
        f"tensor {module}.weight_packed {list(first.shape)} and its scales fit none of config.json's schemes: {listed}"
    )


def _groups(scheme: Scheme, inputs: int) -> int:
    return inputs // (scheme.group_size or inputs)


def _awq_needs(scheme: Scheme, out: int, inputs: int) -> Iterator[_Need]:
    groups = _groups(scheme, inputs)
    yield _Need("qweight", (inputs, out // 8), ("I32",))
    yield _Need("qzeros", (groups, out // 8), ("I32",))
    yield _Need("scales", (groups, out), ("F16", "BF16"))


def _compressed_needs(scheme: Scheme, out: int, inputs: int) -> Iterator[_Need]:
    groups = _groups(scheme, inputs)
    if scheme.static_inputs:
        yield _Need("weight", (out, inputs), ("I8",))
        yield _Need("weight_scale", (out, 1), FLOATS)
        yield _Need("input_scale", (1,), FLOATS)
        return
    yield _Need("weight_packed", (out, -(-inputs * scheme.bits // 32)), ("I32",))
    yield _Need("weight_scale", (out, groups), FLOATS)
    yield _Need("weight_shape", (2,), ("I64", "I32"))
    if not scheme.symmetric:
        yield _Need("weight_zero_point", (-(-out * scheme.bits // 32), groups), ("I32",))


_NEEDS: dict[str, Callable[[Scheme, int, int], Iterator[_Need]]] = {
    autoawq.METHOD: _awq_needs,
    compressed_tensors.METHOD: _compressed_needs,
}
