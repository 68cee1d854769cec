"""Attention compiled for this machine: a library of two operators for ONNX Runtime on CPUs, with its C++ sources.

ONNX Runtime's own attention reads the keys once for each query head, and computes prompts and tiles in float32 alone.
The operators here take the same inputs and give the same outputs. They are put in the place of
the graph's own when a graph is loaded; bundles are not changed, and run everywhere without them.

`choice.py` decides whether they are used, `graph.py` replaces the nodes, `build.py` compiles the library into the
user's cache, and `self_test.py` compares it with ONNX Runtime's own operators. `kernels.cpp` is compiled once for each
level of CPU features; `operators.cpp` takes the best level of the CPU when the library is loaded.
"""
