"""InternLM2's fused wqkv as one product with its outputs cut apart, against three products: which is faster on the CPU?

    python benchmarks/settled/fused_wqkv.py

The shapes are those of the 2B decoder. Both graphs are run alternately and compared by the median of their ratios.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import _path  # noqa: F401
import numpy as np
import onnx_ir as ir
import onnxruntime
from record import write_results

HIDDEN, KV_HEADS, GROUPS, HEAD_DIM = 2048, 8, 2, 128
ROUNDS = 60


def main() -> None:
    """Time one token and a chunk of 256 and write `results/fused-wqkv.json`."""
    random = np.random.default_rng(0)
    heads = KV_HEADS * (GROUPS + 2)
    weight = random.standard_normal((HIDDEN, KV_HEADS, GROUPS + 2, HEAD_DIM)).astype(np.float32) * 0.02
    fused = _session(_fused(weight.reshape(HIDDEN, heads * HEAD_DIM)))
    split = _session(_split([weight[:, :, :GROUPS], weight[:, :, GROUPS : GROUPS + 1], weight[:, :, GROUPS + 1 :]]))
    figures: dict[str, Any] = {"shape": "2B decoder, float32, 2 threads", "rounds": ROUNDS}
    for tokens in (1, 256):
        x = random.standard_normal((1, tokens, HIDDEN)).astype(np.float32)
        for one, other in zip(fused.run(None, {"x": x}), split.run(None, {"x": x}), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
        times = [(_timed(fused, x), _timed(split, x)) for _ in range(ROUNDS)]
        figures[f"{tokens}_tokens"] = {
            "fused_ms": round(1e3 * statistics.median(pair[0] for pair in times), 3),
            "split_ms": round(1e3 * statistics.median(pair[1] for pair in times), 3),
            "median_ratio_fused_to_split": round(statistics.median(f / s for f, s in times), 3),
        }
    print(write_results("fused-wqkv", figures).read_text())


def _timed(session: Any, x: np.ndarray) -> float:
    started = time.perf_counter()
    session.run(None, {"x": x})
    return time.perf_counter() - started


def _fused(weight: np.ndarray) -> ir.Model:
    tape, x, product = _begin(weight)
    grouped = tape.op("Reshape", [product, _constant(tape, [0, 0, KV_HEADS, GROUPS + 2, HEAD_DIM])])
    cuts = ((0, GROUPS), (GROUPS, GROUPS + 1), (GROUPS + 1, GROUPS + 2))
    parts = [tape.op("Slice", [grouped, *(_constant(tape, [v]) for v in (start, end, 3))]) for start, end in cuts]
    return _end(tape, x, [tape.op("Reshape", [part, _constant(tape, [0, 0, -1])]) for part in parts])


def _split(weights: list[np.ndarray]) -> ir.Model:
    tape, x, first = _begin(weights[0].reshape(HIDDEN, -1))
    others = [
        tape.op("MatMul", [x, tape.initializer(ir.tensor(np.ascontiguousarray(w.reshape(HIDDEN, -1)), name=f"w{n}"))])
        for n, w in enumerate(weights[1:])
    ]
    return _end(tape, x, [first, *others])


def _begin(weight: np.ndarray) -> tuple[Any, ir.Value, ir.Value]:
    tape = ir.tape.Tape()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "tokens", HIDDEN]))
    return tape, x, tape.op("MatMul", [x, tape.initializer(ir.tensor(np.ascontiguousarray(weight), name="w"))])


def _constant(tape: Any, values: list[int]) -> ir.Value:
    name = f"constant_{len(tape.initializers)}"
    value: ir.Value = tape.initializer(ir.tensor(np.array(values, np.int64), name=name))
    return value


def _end(tape: Any, x: ir.Value, outputs: list[ir.Value]) -> ir.Model:
    for number, value in enumerate(outputs):
        value.name, value.type = f"y{number}", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], outputs, nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 23})
    return ir.Model(graph, ir_version=11)


def _session(model: ir.Model) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
