"""Decide whether the native operators compute the attention of a bundle, and hand out its graphs with them."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

from internvl_edge.bundle import names
from internvl_edge.bundle.manifest import Manifest

from .build import NativeError, cached_library, ensure_library, machine_kind, require_own
from .graph import with_native_attention
from .self_test import require_equal

# "0" turns the operators off; anything else but "1" is the path of a library that was built elsewhere.
SWITCH = "INTERNVL_EDGE_NATIVE"
# The kernels compute heads whose width is a multiple of this.
_WIDTH = 16


@dataclass(frozen=True)
class Attention:
    """What computes attention, and why.

    Attributes:
        file: the native library, or None for ONNX Runtime's own operators.
        reason: the level of CPU features that the library uses, or why it is not used.
        graphs: the graphs whose attention it may compute, by name, with the width of what attention returns there.
    """

    file: Path | None
    reason: str
    graphs: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{'native' if self.file else 'onnxruntime'} ({self.reason})"

    def graph(self, path: Path) -> bytes | None:
        """Return a graph of the bundle with the native operators, or None where it keeps its own."""
        if self.file is None or path.name not in self.graphs:
            return None
        try:
            return with_native_attention(path.read_bytes(), self.graphs[path.name])
        except ValueError:
            return None


def choose_attention(manifest: Manifest, exact: bool = False, *, builds: bool = True) -> Attention:
    """Choose what computes the attention of a bundle on the CPU.

    The library is compiled first where it is missing, which takes a few seconds, unless `builds` is False.

    The operators sum in another order than ONNX Runtime, and multiply prompts and tiles in bfloat16 where the CPU can.
    They compute only graphs with quantized linears, which round the inputs of their products to int8 in any case, and
    never with `exact`. So the answers of a bundle in floats do not depend on whether there is a compiler.
    """
    if os.environ.get(SWITCH) == "0":
        return Attention(None, f"{SWITCH} is 0")
    if exact:
        return Attention(None, "exact numbers")
    if manifest.activations != "float32":
        return Attention(None, f"the bundle computes in {manifest.activations}")
    graphs = _graphs(manifest)
    if not graphs:
        return Attention(None, "no linear of the bundle is quantized, so nothing may be rounded")
    try:
        library = find_library(builds=builds)
        return Attention(library, level(library), graphs)
    except NativeError as error:
        return Attention(None, str(error), graphs)


def find_library(*, builds: bool = True) -> Path:
    """Return a library that passes its self-test on this machine: the one that SWITCH names, or that of the cache.

    Raises:
        NativeError: there is none, and why.
    """
    given = os.environ.get(SWITCH, "1")
    if given == "0":
        raise NativeError(f"{SWITCH} is 0")
    if given == "1":
        if not builds and not cached_library().exists():
            raise NativeError("not compiled yet; the first start that uses it does, or internvl-edge native")
        library = ensure_library()
    else:
        library = Path(given)
        machine_kind()
        if not library.is_file():
            raise NativeError(f"{SWITCH} names {given}, which is no file")
        require_own(library)
    check(library)
    return library


def _graphs(manifest: Manifest) -> dict[str, int]:
    """Return the graphs whose attention the operators can compute, and may, with the width of its result."""
    vision, decoder = manifest.model.vision, manifest.model.decoder
    found = {}
    if manifest.schemes("decoder.layers.") and decoder.head_dim % _WIDTH == 0:
        width = decoder.num_attention_heads * decoder.head_dim
        found = dict.fromkeys((*names.DECODERS.values(), names.PROMPTS), width)
    if manifest.schemes("vision.") and vision.hidden_size // vision.num_attention_heads % _WIDTH == 0:
        found[names.VISION] = vision.hidden_size
    return found


@cache
def check(library: Path) -> None:
    """Raise NativeError where a library does not work; a good one is tested once in each process."""
    try:
        runtime = import_module("onnxruntime")
    except ImportError:
        raise NativeError("ONNX Runtime is not installed") from None
    require_equal(runtime, library)


def level(library: Path) -> str:
    """Return the level of CPU features whose kernels a library runs here.

    Raises:
        NativeError: it cannot be loaded, or has no kernels for this CPU.
    """
    try:
        function = ctypes.CDLL(str(library)).internvl_edge_level
    except (OSError, AttributeError) as error:
        raise NativeError(f"{library} cannot be loaded ({error})") from None
    function.restype = ctypes.c_char_p
    found: bytes | None = function()
    if found is None:
        raise NativeError("the library has no kernels for this CPU")
    return found.decode()
