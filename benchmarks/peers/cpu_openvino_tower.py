"""The tower as OpenVINO's own format holds it: cpu_openvino_tower.py FLOAT_VISION.onnx OUT.

Writes OUT/vision-fp16.xml and OUT/vision-int8.xml, the latter by NNCF's post-training quantization of a transformer on
random tiles: what it costs in speed does not depend on them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nncf
import numpy as np
import openvino as ov

TILES = 2


def main() -> None:
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    model = ov.Core().read_model(sys.argv[1])
    model.reshape([1, *(side.get_length() for side in list(model.input(0).partial_shape)[1:])])
    ov.save_model(model, out / "vision-fp16.xml")
    random = np.random.default_rng(0)
    shape = tuple(model.input(0).shape)
    tiles = nncf.Dataset([random.integers(0, 256, shape, np.uint8) for _ in range(TILES)])
    int8 = nncf.quantize(model, tiles, model_type=nncf.ModelType.TRANSFORMER, subset_size=TILES)
    ov.save_model(int8, out / "vision-int8.xml")


if __name__ == "__main__":
    main()
