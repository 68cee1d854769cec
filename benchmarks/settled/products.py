"""How fast ONNX Runtime multiplies by the weights of one layer, in each form: products.py -> results/products.json.

A 1B's gate projection, 896 inputs and 4864 outputs, for one token and for chunks of a prompt; two threads, best of
several runs of all forms in turn, in 10^9 operations a second.
"""

from __future__ import annotations

import time
from typing import Any

import _path  # noqa: F401
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from record import write_results

INPUTS, OUTPUTS = 896, 4864
ROWS = (1, 8, 64, 256, 512)
THREADS, REPEAT = 2, 12
RANDOM = np.random.default_rng(0)


def session(node: Any, constants: dict[str, np.ndarray]) -> onnxruntime.InferenceSession:
    """A graph of one node, x -> y."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, INPUTS])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "product", [x], [y], initializers), opset_imports=opsets)
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.force_spinning_stop", "1")  # several sessions take turns
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def blocks(bits: int, block: int, level: int) -> onnxruntime.InferenceSession:
    count = -(-INPUTS // block)
    values = RANDOM.integers(0, 256, (OUTPUTS, count, block * bits // 8), dtype=np.uint8)
    scale = RANDOM.random(OUTPUTS * count).astype(np.float32)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "values", "scale"],
        ["y"],
        domain="com.microsoft",
        K=INPUTS,
        N=OUTPUTS,
        bits=bits,
        block_size=block,
        accuracy_level=level,
    )
    return session(node, {"values": values, "scale": scale})


def forms() -> dict[str, onnxruntime.InferenceSession]:
    found = {f"int{bits}, blocks of {block}": blocks(bits, block, 4) for bits in (4, 8) for block in (32, 128)}
    found["int4, blocks of 128, float32 inputs"] = blocks(4, 128, 1)
    weights = RANDOM.standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
    found["float32"] = session(helper.make_node("MatMul", ["x", "w"], ["y"]), {"w": weights})
    constants = {
        "w": RANDOM.integers(-127, 128, (INPUTS, OUTPUTS)).astype(np.int8),
        "scale": RANDOM.random(OUTPUTS).astype(np.float32),
    }
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "scale"], ["y"], domain="com.microsoft")
    found["int8, one scale per output and input"] = session(node, constants)
    return found


def main() -> None:
    sessions, rows = forms(), []
    for count in ROWS:
        x = RANDOM.standard_normal((count, INPUTS)).astype(np.float32)
        best = dict.fromkeys(sessions, float("inf"))
        for _ in range(REPEAT if count > 8 else 10 * REPEAT):
            for name, one in sessions.items():
                started = time.perf_counter()
                one.run(None, {"x": x})
                best[name] = min(best[name], time.perf_counter() - started)
        rates = {name: round(2 * count * INPUTS * OUTPUTS / seconds / 1e9, 1) for name, seconds in best.items()}
        rows.append({"rows": count, "giga_operations_per_s": rates})
    print(write_results("products", {"threads": THREADS, "shape": [INPUTS, OUTPUTS], "rates": rows}).read_text())


if __name__ == "__main__":
    main()
