"""The header of a safetensors file, read by the rules of the reference library: a file is whole, or it is refused.

Format: 8 bytes little-endian length of the header, the header in JSON, the data; offsets count from the end of the
header. Tensors lie one behind the other, without gap or overlap, from the first byte of the data to the last. Where
the library reads more than the format's description allows, the description holds: a header begins with `{`, and no
name stands in it twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.json_files import parse
from internvl_edge.base.text import shown

# Every type of the format and its bits; which of them can be weights is for others to say.
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_LENGTH_BYTES = 8
# The format allows 100 MB. A header has about 150 bytes for each tensor, those of the largest models 300 kB in all.
MAX_HEADER_BYTES = 8 << 20
_LARGEST = 2**64 - 1
_METADATA = "__metadata__"
_AGAIN = "download it again"


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor: a name of `BITS`, its shape, and its bytes from `begin` to `end` counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """The tensors of a file by name, in the order of the header.

    Raises:
        CheckpointError: the file cannot be read, is cut off, or its header breaks a rule of the format; the file and
            the tensor are named.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise CheckpointError(f"{path} is truncated or not a safetensors file ({size} bytes); {_AGAIN}")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} has a safetensors header of {length} bytes, at most {MAX_HEADER_BYTES} are read; {_AGAIN}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); {_AGAIN}") from None
    try:
        entries = _entries(text)
        end = _check_order(entries)
    except ValueError as error:
        raise CheckpointError(f"{path} has a damaged safetensors header: {error}; {_AGAIN}") from None
    start = _LENGTH_BYTES + length
    if start + end > size:
        raise CheckpointError(f"{path} is truncated: {size} bytes, its header needs {start + end}; {_AGAIN}")
    if start + end < size:
        raise CheckpointError(f"{path} has {size - start - end} bytes behind its last tensor; {_AGAIN}")
    return {
        name: HeaderEntry(entry.dtype, entry.shape, start + entry.begin, start + entry.end)
        for name, entry in entries.items()
    }


def _entries(text: bytes) -> dict[str, HeaderEntry]:
    if not text.startswith(b"{"):
        raise ValueError("it does not begin with {")
    header = parse(text)
    metadata = header.pop(_METADATA, None)
    if not isinstance(metadata, dict | None) or not all(isinstance(value, str) for value in (metadata or {}).values()):
        raise ValueError(f"{_METADATA} is {shown(metadata)}, expected names and texts")
    return {name: _entry(name, values) for name, values in header.items()}


def _entry(name: str, values: Any) -> HeaderEntry:
    if not isinstance(values, dict):
        raise ValueError(f"tensor {shown(name)} is {shown(values)}, expected an object")
    dtype, shape, offsets = values.get("dtype"), values.get("shape"), values.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {shown(name)} has the dtype {shown(dtype)}, which the format does not know")
    if not _are_sizes(shape):
        raise ValueError(f"tensor {shown(name)} has the shape {shown(shape)}, expected whole numbers from 0 on")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {shown(name)} has the data_offsets {shown(offsets)}, expected a begin and an end")
    entry = HeaderEntry(dtype, tuple(shape), offsets[0], offsets[1])
    bits = _product(name, (*entry.shape, BITS[dtype]))
    if bits != 8 * (entry.end - entry.begin):
        raise ValueError(
            f"tensor {shown(name)} has {entry.end - entry.begin} bytes, not those of {dtype} {shown(list(shape))}"
        )
    return entry


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _LARGEST for value in values)


def _product(name: str, sizes: tuple[int, ...]) -> int:
    """From the left, as a computer with 64 bits multiplies: a zero behind an overflow does not undo it."""
    product = 1
    for size in sizes:
        product *= size
        if product > _LARGEST:
            raise ValueError(f"tensor {shown(name)} has a shape of more elements than there can be bytes")
    return product


def _check_order(entries: dict[str, HeaderEntry]) -> int:
    """Every byte of the data belongs to one tensor. Returns where the last one ends."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            wrong = "overlaps the one before it" if entry.begin < position else "leaves a gap before it"
            raise ValueError(f"tensor {shown(name)} begins at {entry.begin}, expected {position}: it {wrong}")
        position = entry.end
    return position
