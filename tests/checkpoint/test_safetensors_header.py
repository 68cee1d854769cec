"""Headers of safetensors files: the rules of the reference library, compared with it over mutated headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from helpers.cpu_time import cpu_time_below
from helpers.parsers import Header, outcomes
from internvl_edge.base.errors import CheckpointError
from internvl_edge.checkpoint.safetensors_header import BITS, MAX_HEADER_BYTES, read_header
from internvl_edge.checkpoint.tensor_files import STORED_DTYPES, OutTensor, open_tensor_files, write_file

MUTANTS = 20_000
# Where the library reads more than the format's description allows.
STRICTER = ("does not begin with {", "stands twice", "expected an object", "has the dtype {")


def framed(header: bytes, data: bytes = bytes(24)) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def refusal(path: Path, content: bytes) -> str | None:
    """Our reason for refusing a file; None where it is read."""
    path.write_bytes(content)
    try:
        read_header(path)
    except CheckpointError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) <= 400
        assert str(path) in message
        return message
    return None


def library_accepts(content: bytes) -> bool:
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


def test_mutated_headers_are_read_as_the_reference_library_reads_them() -> None:
    accepted = 0
    for files, _, reason in outcomes(Header, MUTANTS):
        (content,) = files.values()
        assert content is not None
        accepts = library_accepts(content)
        accepted += accepts
        if reason is None:
            assert accepts, content
        elif accepts:
            assert any(rule in reason for rule in STRICTER), (reason, content)
    assert accepted > MUTANTS / 25


TENSOR = '{"dtype":"I64","shape":[3],"data_offsets":[0,24]}'
RULES = {
    "overlap": ('{"a":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},"b":{"dtype":"I64","shape":[2],'
                '"data_offsets":[8,24]}}', "overlaps the one before it"),
    "gap": ('{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},"b":{"dtype":"I64","shape":[1],'
            '"data_offsets":[16,24]}}', "leaves a gap"),
    "not from the first byte": ('{"a":{"dtype":"I64","shape":[2],"data_offsets":[8,24]}}', "begins at 8, expected 0"),
    "bytes behind": ('{"a":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}}', "8 bytes behind its last tensor"),
    "too few bytes": ('{"a":{"dtype":"I64","shape":[4],"data_offsets":[0,32]}}', "truncated"),
    "another size": ('{"a":{"dtype":"I64","shape":[2],"data_offsets":[0,24]}}', "has 24 bytes, not those of I64 [2]"),
    "end before begin": ('{"a":{"dtype":"I64","shape":[3],"data_offsets":[24,0]}}', "expected a begin and an end"),
    "negative": ('{"a":{"dtype":"I64","shape":[-3],"data_offsets":[0,24]}}', "has the shape [-3]"),
    "fraction": ('{"a":{"dtype":"I64","shape":[3.0],"data_offsets":[0,24]}}', "has the shape [3.0]"),
    "text": ('{"a":{"dtype":"I64","shape":["3"],"data_offsets":[0,24]}}', "has the shape ['3']"),
    "infinity": ('{"a":{"dtype":"I64","shape":[3],"data_offsets":[0,Infinity]}}', "data_offsets is Infinity"),
    "overflow": ('{"a":{"dtype":"I64","shape":[9223372036854775808,2,0],"data_offsets":[0,0]}}', "more elements"),
    "a name twice": (f'{{"a":{TENSOR},"a":{TENSOR}}}', "'a' stands twice"),
    "a leading space": (f' {{"a":{TENSOR}}}', "does not begin with {"),
    "a list": ("[]", "does not begin with {"),
    "metadata of numbers": (f'{{"__metadata__":{{"a":1}},"a":{TENSOR}}}', "__metadata__"),
    "an unknown type": (TENSOR.replace("I64", "I65").join(('{"a":', "}")), "has the dtype 'I65'"),
    "three offsets": ('{"a":{"dtype":"I64","shape":[3],"data_offsets":[0,24,24]}}', "data_offsets"),
    "no shape": ('{"a":{"dtype":"I64","data_offsets":[0,24]}}', "has the shape None"),
}  # fmt: skip


@pytest.mark.parametrize(("header", "reason"), RULES.values(), ids=RULES)
def test_each_rule_is_named(tmp_path: Path, header: str, reason: str) -> None:
    found = refusal(tmp_path / "model.safetensors", framed(header.encode()))
    assert found is not None
    assert reason in found
    with pytest.raises(CheckpointError):
        open_tensor_files(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 25, 2**31, 2**63, 2**64 - 1])
def test_lengths_of_a_header_that_cannot_be(tmp_path: Path, length: int) -> None:
    content = length.to_bytes(8, "little") + b"{}" + bytes(14)
    assert not library_accepts(content)
    assert refusal(tmp_path / "x.safetensors", content) is not None


@pytest.mark.parametrize("content", [b"{" * 92_000_000, b'{"a":' + b" " * 92_000_000, b"[" * (MAX_HEADER_BYTES + 1)])
def test_a_header_bomb_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(framed(content))
    with cpu_time_below(0.1), pytest.raises(CheckpointError, match=f"at most {MAX_HEADER_BYTES} are read"):
        open_tensor_files(tmp_path)


def largest_header() -> bytes:
    tensors = {f"t{index}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for index in range(135_000)}
    text = json.dumps(tensors, separators=(",", ":")).encode()
    assert MAX_HEADER_BYTES * 0.8 < len(text) < MAX_HEADER_BYTES
    return text


@pytest.mark.parametrize("make", [largest_header, lambda: b'{"a":' + b"[" * (MAX_HEADER_BYTES - 9)])
def test_the_largest_header_takes_bounded_time(tmp_path: Path, make: Callable[[], bytes]) -> None:
    content = framed(make(), b"")
    with cpu_time_below(10):
        refusal(tmp_path / "x.safetensors", content)


@pytest.mark.parametrize("dtype", BITS)
def test_every_type_of_the_format_is_read_and_those_of_no_weights_are_named(tmp_path: Path, dtype: str) -> None:
    path, count = tmp_path / "model.safetensors", 24 * 8 // BITS[dtype]
    header = json.dumps({"a": {"dtype": dtype, "shape": [count], "data_offsets": [0, 24]}}).encode()
    assert library_accepts(framed(header))
    assert refusal(path, framed(header)) is None
    tensor = open_tensor_files(tmp_path)["a"]
    if dtype in STORED_DTYPES:
        assert tensor.read().shape == (count,)
    else:
        with pytest.raises(CheckpointError, match=f"tensor a has the unsupported dtype {dtype}"):
            tensor.read()


def test_files_of_both_writers_are_read(tmp_path: Path) -> None:
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.zeros(0, np.int8), "z": np.array(3, np.int64)}
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    write_file(tmp_path / "ours.safetensors", [OutTensor.of(name, array) for name, array in arrays.items()])
    assert library_accepts((tmp_path / "ours.safetensors").read_bytes())
    stored = open_tensor_files(tmp_path)
    assert stored.keys() == read_header(tmp_path / "ours.safetensors").keys() == arrays.keys()
    for name, array in arrays.items():
        assert stored[name].shape == array.shape
        assert np.array_equal(stored[name].read(), array)


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "nowhere.safetensors")
