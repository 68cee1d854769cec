"""Import this before torchvision where torch is a CPU build.

PyPI's torchvision is the CUDA build, whose operators do not load beside a CPU torch. Its Python part, which resizes
images, imports once these two are declared.
"""

from __future__ import annotations

from torch import library

for _operator in ("nms", "qnms"):
    library.define(f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
