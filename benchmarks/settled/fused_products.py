"""Would one product for q, k and v and one for gate and up decode faster than five? All int4 products of a 1B's layers.

    python benchmarks/settled/fused_products.py

Both graphs hold the linears of 24 layers, so that weights come from memory as they do in decoding, and nothing of
attention. They take turns; medians. Writes results/fused-products.json.
"""

from __future__ import annotations

import statistics
import time

import _path  # noqa: F401
import numpy as np
import onnxruntime
from onnx import NodeProto, TensorProto, helper, numpy_helper
from record import write_results

HIDDEN, INTERMEDIATE, KEYS, LAYERS = 896, 4864, 128, 24
BLOCK, THREADS, ROUNDS = 128, 2, 40
RANDOM = np.random.default_rng(0)


class Graph:
    """A chain of layers' linears."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self.outputs: list[str] = []

    def product(self, x: str, inputs: int, outputs: int) -> str:
        """x times int4 weights."""
        name = f"y{len(self.nodes)}"
        count = inputs // BLOCK
        values = RANDOM.integers(0, 256, (outputs, count, BLOCK // 2), dtype=np.uint8)
        scale = np.full(outputs * count, 0.002, np.float32)
        self.weights += [numpy_helper.from_array(values, f"{name}.values"), numpy_helper.from_array(scale, f"{name}.s")]
        attributes = {"K": inputs, "N": outputs, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        operands = [x, f"{name}.values", f"{name}.s"]
        self.nodes.append(helper.make_node("MatMulNBits", operands, [name], domain="com.microsoft", **attributes))
        return name

    def op(self, kind: str, inputs: list[str], outputs: int = 1, **attributes: int) -> list[str]:
        """One more node."""
        names = [f"y{len(self.nodes)}.{n}" for n in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names

    def several(self, x: str, widths: list[int], fused: bool) -> list[str]:
        """Products of one input, as one or each by itself."""
        if not fused:
            return [self.product(x, HIDDEN, width) for width in widths]
        sizes = f"sizes{len(self.nodes)}"
        self.weights.append(numpy_helper.from_array(np.array(widths), sizes))
        return self.op("Split", [self.product(x, HIDDEN, sum(widths)), sizes], len(widths), axis=-1)

    def layer(self, x: str, fused: bool) -> str:
        """All linears of one layer."""
        query, *rest = self.several(x, [HIDDEN, KEYS, KEYS], fused)
        self.outputs += rest
        x = self.op("Add", [x, self.product(query, HIDDEN, HIDDEN)])[0]
        gate, up = self.several(x, [INTERMEDIATE, INTERMEDIATE], fused)
        gated = self.op("Mul", [self.op("Mul", [gate, self.op("Sigmoid", [gate])[0]])[0], up])[0]
        return self.op("Add", [x, self.product(gated, INTERMEDIATE, HIDDEN)])[0]


def session(fused: bool) -> onnxruntime.InferenceSession:
    """24 layers of products."""
    graph, x = Graph(), "x"
    for _ in range(LAYERS):
        x = graph.layer(x, fused)
    value = helper.make_tensor_value_info
    outputs = [value(name, TensorProto.FLOAT, None) for name in [x, *graph.outputs]]
    made = helper.make_graph(graph.nodes, "g", [value("x", TensorProto.FLOAT, [None, HIDDEN])], outputs, graph.weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.force_spinning_stop", "1")  # two sessions take turns
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Time one token and a chunk of 256."""
    sessions = {"apart": session(False), "fused": session(True)}
    figures: dict[str, object] = {"threads": THREADS, "rounds": ROUNDS}
    for tokens in (1, 256):
        x = RANDOM.standard_normal((tokens, HIDDEN)).astype(np.float32)
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(ROUNDS if tokens == 1 else ROUNDS // 4):
            for name, one in sessions.items():
                started = time.perf_counter()
                for _ in range(5 if tokens == 1 else 1):
                    one.run(None, {"x": x})
                times[name].append((time.perf_counter() - started) / (5 if tokens == 1 else 1))
        medians = {name: round(1e3 * statistics.median(each), 3) for name, each in times.items()}
        ratio = statistics.median(f / a for f, a in zip(times["fused"], times["apart"], strict=True))
        figures[f"{tokens}_tokens_ms"] = medians | {"fused_to_apart": round(ratio, 3)}
    print(write_results("fused-products", figures).read_text())


if __name__ == "__main__":
    main()
