"""Read the compiled programs in an engine of TensorRT for RTX: kernels in order, what each fuses, reads and writes.

Such a file holds one program per optimization profile as text: a header, the shapes of tensors, and the kernels of one
run in their order. So kernels can be counted, and copies found, without a GPU and without a driver. The format is not
documented: it is that of TensorRT for RTX 1.7. Engines of other TensorRT versions hold no such text.
"""

from __future__ import annotations

import math
import mmap
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from internvl_edge.base.errors import EngineError

_HEADER, _TENSORS, _KERNELS, _SHAPES = b"header {\n", b"descriptors {\n", b"main {\n", b"\nshape_main {"
# The program of one fused kernel is in the file too. Unlike the program of a profile, it is for any device.
_ANY_DEVICE = b"accelerators={*}"
# Names of fused kernels are made of these prefixes of operations, such as __myl_TranSlic.
_FUSED = "__myl_"
_MOVES = frozenset({"Move", "Resh", "Tran", "Slic", "Conc", "Repl", "Spli", "Copy"})
# Entries of a program that start no kernel: shapes on the host, and streams that wait for each other.
_NO_KERNEL = frozenset({"shape_call", "signal", "wait"})
_CACHE = ("present.", "past_key_values.")
_CONSTANT, _INTEGERS = "_dconst", ("int4", "int8")
# Elements. No scale, bias or zero point is so large, and no matrix smaller.
_MATRIX = 1 << 13
_ENTRY = re.compile(r'^  (\w+)=\{ name="?([^" ]+)"?(.*?)(?=^  \w+=\{|\Z)', re.MULTILINE | re.DOTALL)
_TENSOR = re.compile(r'tensor=\{[^\n]*? dims=\{ ([^}]*)\}[^\n]* name="([^"]+)"[^\n]* type=(\w+) \}')
_SCRATCH = re.compile(r"region = \{ name=devmem\w* size=(\d+) [^\n]*place=accelerator")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a program.

    Attributes:
        kind: how Myelin makes it, such as "function", "fully_connected" or "runtime_fusion".
        name: its name; products that were joined have the names of all of them, with "+" between.
        steps: the operations of a fused kernel in order, in four letters each: ("Tran", "Slic"). Long lists end with
            "Etc". () for other kernels.
        nodes: the ONNX nodes that it computes, at least in part.
        inputs, outputs: names of tensors, without the marks that Myelin adds.
    """

    kind: str
    name: str
    steps: tuple[str, ...]
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def moves(self) -> bool:
        """Whether it computes nothing: it copies, cuts, joins or transposes tensors."""
        return self.kind == "copy" or (bool(self.steps) and _MOVES.issuperset(self.steps))

    @property
    def attends(self) -> bool:
        """Whether it is a fused attention."""
        return "_mha_" in self.name

    @property
    def multiplies(self) -> bool:
        """Whether it computes a matrix product."""
        return any("MatMul" in node for node in self.nodes) and not self.attends


@dataclass(frozen=True)
class CompiledProgram:
    """The kernels of one run with one optimization profile, in order.

    Attributes:
        kernels: all kernels.
        waits: how many times one stream waits for another.
        shapes: tensor -> sizes and type; a size that varies is a name.
        scratch: bytes of device memory for intermediate results.
    """

    kernels: tuple[Kernel, ...]
    waits: int
    shapes: dict[str, tuple[tuple[int | str, ...], str]]
    scratch: int

    @cached_property
    def cache_rewrites(self) -> tuple[Kernel, ...]:
        """The kernels that read KV cache and write it elsewhere: all readers but attention and the update in place."""
        found, cache = [], {name for name in self.shapes if name.startswith(_CACHE)}
        sizes = {self.shapes[name][0] for name in cache}
        for kernel in self.kernels:
            read = cache.intersection(kernel.inputs)
            if read and not kernel.attends and not read.intersection(kernel.outputs):
                found.append(kernel)
                cache.update(name for name in kernel.outputs if self._is_window(name, sizes))
        return tuple(found)

    def _is_window(self, name: str, caches: set[tuple[int | str, ...]]) -> bool:
        """Return whether a tensor has the shape of a cache, with any number of slots but a fixed smaller one."""
        shape = self.shapes.get(name, ((), ""))[0]
        return any(
            len(shape) == len(cache) == 4
            and (shape[0], shape[1], shape[3]) == (cache[0], cache[1], cache[3])
            and (isinstance(shape[2], str) or shape[2] == cache[2])
            for cache in caches
        )

    @property
    def unpacked(self) -> tuple[Kernel, ...]:
        """The kernels that dequantize a matrix of weights in memory, and not inside their product."""
        return tuple(kernel for kernel in self.kernels if self._unpacks(kernel))

    def _unpacks(self, kernel: Kernel) -> bool:
        packed = [
            self._size(name)
            for name in kernel.inputs
            if name.endswith(_CONSTANT) and self.shapes.get(name, ((), ""))[1] in _INTEGERS
        ]
        return max(packed, default=0) >= _MATRIX and max(map(self._size, kernel.outputs), default=0) >= max(packed)

    def _size(self, name: str) -> int:
        """Return the elements of a tensor, with 1 for sizes that vary."""
        return math.prod(size for size in self.shapes.get(name, ((0,), ""))[0] if isinstance(size, int))

    def summary(self) -> dict[str, int]:
        """Return the counts to compare programs by."""
        return {
            "kernels": len(self.kernels),
            "products": sum(kernel.multiplies for kernel in self.kernels),
            "attention": sum(kernel.attends for kernel in self.kernels),
            "moves": sum(kernel.moves for kernel in self.kernels),
            "cache_rewrites": len(self.cache_rewrites),
            "cache_transposes": sum("Tran" in kernel.steps for kernel in self.cache_rewrites),
            "unpacked_weights": len(self.unpacked),
            "waits": self.waits,
            "scratch_bytes": self.scratch,
        }

    def names(self) -> Counter[str]:
        """Return the number of kernels of each name. Products of different nodes count as one name."""
        return Counter(re.sub(r"\d+", "N", kernel.name) for kernel in self.kernels)


def compiled_programs(path: Path) -> tuple[CompiledProgram, ...]:
    """Return the programs in an engine file, in the order of its profiles.

    Raises:
        EngineError: the file holds no program as TensorRT for RTX 1.7 writes it.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        programs = [_program(*parts) for parts in _texts(data)]
    if not programs:
        raise EngineError(f"{path} holds no compiled program in text; expected an engine of TensorRT for RTX 1.7")
    return tuple(programs)


def _texts(data: mmap.mmap) -> list[tuple[str, str, str]]:
    """Return header, tensors and kernels of each program, of which a file has one for each profile."""
    found, at = [], 0
    while (end := data.find(_SHAPES, at)) >= 0:
        at = end + len(_SHAPES)
        kernels = data.rfind(_KERNELS, 0, end)
        tensors = data.rfind(_TENSORS, 0, max(kernels, 0))
        header = data.rfind(_HEADER, 0, max(tensors, 0))
        if header < 0 or _ANY_DEVICE in data[header:tensors]:
            continue
        parts = data[header:tensors], data[tensors:kernels], data[kernels:end]
        found.append((parts[0].decode("latin-1"), parts[1].decode("latin-1"), parts[2].decode("latin-1")))
    return found


def _program(header: str, tensors: str, kernels: str) -> CompiledProgram:
    entries = [match.groups() for match in _ENTRY.finditer(kernels)]
    shapes = {
        _plain(name): (tuple(int(size) if size.isdigit() else size for size in re.findall(r"[^\s\"]+", dims)), kind)
        for dims, name, kind in _TENSOR.findall(tensors)
    }
    return CompiledProgram(
        kernels=tuple(_kernel(*entry) for entry in entries if entry[0] not in _NO_KERNEL),
        waits=sum(kind == "wait" for kind, _, _ in entries),
        shapes=shapes,
        scratch=sum(map(int, _SCRATCH.findall(header))),
    )


def _kernel(kind: str, name: str, rest: str) -> Kernel:
    layers = re.search(r'layers="([^"]*)"', rest)
    return Kernel(
        kind=kind,
        name=name,
        steps=tuple(re.findall(r"[A-Z][a-z]+", name)) if name.startswith(_FUSED) else (),
        nodes=tuple(re.findall(r"ONNX Layer: ([^\]]+)\]", layers[1])) if layers else (),
        inputs=_tensors("input", rest),
        outputs=_tensors("output", rest),
    )


def _tensors(which: str, rest: str) -> tuple[str, ...]:
    listed = re.search(rf" {which}(?:_args)?=\{{([^}}]*)\}}", rest)
    return tuple(_plain(name) for name in re.findall(r'"([^"]+)"', listed[1])) if listed else ()


def _plain(name: str) -> str:
    """Return the name of a tensor without profile, dereference and version: "present.0.key [profile 1].1"."""
    return re.sub(r"( \[profile \d+\])?(\.\d+)?(\^deref)?$", "", name)
