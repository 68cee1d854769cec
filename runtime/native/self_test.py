"""Compare a native library with ONNX Runtime's own operators: `python -m internvl_edge.runtime.native.self_test FILE`.

Small graphs of one node run with and without the library: one token for rows of unequal length, a part of a prompt, and
tokens that all see each other. This calls every entry of ONNX Runtime's interface that the library uses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .build import NativeError
from .graph import FLOAT, INT32, value_info, with_native_attention, write_field

_HEADS, _KV_HEADS, _WIDTH, _CAPACITY = 6, 2, 32, 384
# The largest difference, as a share of the largest value: sums in another order, and operands in bfloat16.
_FLOAT32, _BFLOAT16 = 1e-5, 2e-2
_INT = 2  # AttributeProto.AttributeType

Arrays = dict[str, NDArray[Any]]


def require_equal(runtime: Any, library: Path) -> None:
    """Raise NativeError where a library cannot be loaded, or differs from what ONNX Runtime (the module) computes."""
    for model, inputs, tolerance in _cases():
        native = with_native_attention(model)
        assert native is not None
        try:
            expected = _outputs(runtime, model, inputs, None)
            found = _outputs(runtime, native, inputs, library)
        except Exception as error:  # onnxruntime raises its own kinds, all derived from Exception
            raise NativeError(f"it does not run ({str(error).splitlines()[0][:150]})") from None
        for name, values in expected.items():
            difference = np.abs(found[name] - values).max() / np.abs(values).max()
            if not difference <= tolerance:
                raise NativeError(f"{name} differs from ONNX Runtime's by {difference:.1e}, expected {tolerance:.0e}")


def _cases() -> Iterator[tuple[bytes, Arrays, float]]:
    """Yield a graph, its inputs, and the tolerance."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape, dtype=np.float32)

    for rows, tokens, past, tolerance in ((2, 1, (299, 17), _FLOAT32), (1, 70, (280,), _BFLOAT16)):
        inputs: Arrays = {
            "query": draw(rows, tokens, _HEADS * _WIDTH),
            "key": draw(rows, tokens, _KV_HEADS * _WIDTH),
            "value": draw(rows, tokens, _KV_HEADS * _WIDTH),
            "past_key": draw(rows, _KV_HEADS, _CAPACITY, _WIDTH),
            "past_value": draw(rows, _KV_HEADS, _CAPACITY, _WIDTH),
            "last": np.array(past, np.int32) + (tokens - 1),
            "total": np.array(max(past) + tokens, np.int32),
        }
        outputs = ("attended", "present_key", "present_value")
        attributes = {"num_heads": _HEADS, "kv_num_heads": _KV_HEADS}
        yield _model("GroupQueryAttention", "com.microsoft", inputs, outputs, attributes), inputs, tolerance
    inputs = {name: draw(2, 45, _HEADS * _WIDTH) for name in ("query", "key", "value")}
    attributes = {"q_num_heads": _HEADS, "kv_num_heads": _HEADS}
    yield _model("Attention", "", inputs, ("attended",), attributes), inputs, _BFLOAT16


def _outputs(runtime: Any, model: bytes, inputs: Arrays, library: Path | None) -> Arrays:
    """Run a model. The cache is bound as past and as present, as the engine binds it; only used entries count."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        if (past := output.name.replace("present", "past")) in values:
            binding.bind_ortvalue_output(output.name, values[past])
        else:
            binding.bind_output(output.name)
    session.run_with_iobinding(binding)
    return dict(zip((each.name for each in session.get_outputs()), binding.copy_outputs_to_cpu(), strict=True))


def _model(kind: str, domain: str, inputs: Arrays, outputs: tuple[str, ...], attributes: dict[str, int]) -> bytes:
    """Return a ModelProto of one node. The numbers are those of the fields in onnx.proto3."""
    node = [write_field(1, name.encode()) for name in inputs]
    node += [write_field(2, name.encode()) for name in outputs]
    node += [write_field(4, kind.encode()), write_field(7, domain.encode())]
    for name, value in attributes.items():
        node.append(write_field(5, write_field(1, name.encode()) + write_field(3, value) + write_field(20, _INT)))
    graph = [write_field(1, b"".join(node)), write_field(2, b"self_test")]
    for name, array in inputs.items():
        element = INT32 if array.dtype == np.int32 else FLOAT
        graph.append(write_field(11, value_info(name, element, [None] * array.ndim)))
    graph += [write_field(12, value_info(name, FLOAT, None)) for name in outputs]
    opsets = [write_field(8, write_field(1, domain.encode()) + write_field(2, 1))] if domain else []
    opsets.append(write_field(8, write_field(1, b"") + write_field(2, 23)))
    return b"".join([write_field(1, 10), write_field(7, b"".join(graph)), *opsets])


if __name__ == "__main__":
    import onnxruntime

    try:
        require_equal(onnxruntime, Path(sys.argv[1]))
    except NativeError as error:
        sys.exit(f"error: {error}")
