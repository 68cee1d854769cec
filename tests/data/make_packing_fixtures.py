"""Write packing.npz: the same integers as autoawq 0.2.9 and compressed-tensors 0.20.0 pack them.

    pip install torch transformers accelerate pydantic loguru && pip install --no-deps compressed-tensors==0.20.0
    pip download --no-deps --no-binary :all: autoawq==0.2.9 && tar xf autoawq-0.2.9.tar.gz
    python make_packing_fixtures.py autoawq-0.2.9

Both packages work from float weights; these are made so that rounding gives the drawn integers back exactly.
Imports nothing from internvl_edge. Runs in an environment of its own: both packages pin what others must not have.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

# (name, bits, out, in, group size or None for one scale per row, symmetric); 20 rows do not fill int32 words.
COMPRESSED = [
    ("int4 groups", 4, 16, 128, 32, True),
    ("int4 groups, zero points", 4, 20, 128, 64, False),
    ("int8 rows", 8, 20, 64, None, True),
    ("int8 groups, zero points", 8, 16, 64, 32, False),
]
AWQ = [("group 32", 32, 128, 32), ("group 128", 64, 256, 128)]  # autoawq wants multiples of 32 outputs


def draw(name: str, bits: int, out: int, inputs: int, group: int, symmetric: bool) -> dict[str, torch.Tensor]:
    """Integers counted from the lowest value, zero points likewise, scales exact in float16, and their weights."""
    random = np.random.default_rng(list(name.encode()))
    values = torch.from_numpy(random.integers(0, 2**bits, (out, inputs)))
    shape = (out, inputs // group)
    zeros = (
        torch.from_numpy(random.integers(0, 2**bits, shape)) if not symmetric else torch.full(shape, 2 ** (bits - 1))
    )
    scales = torch.from_numpy((random.integers(1, 2048, shape) / 2**14).astype(np.float32))
    weight = (values - zeros.repeat_interleave(group, 1)).float() * scales.repeat_interleave(group, 1)
    return {"values": values.byte(), "zeros": zeros.byte(), "scales": scales, "weight": weight}


def pack_with_autoawq(folder: Path) -> dict[str, torch.Tensor]:
    """Through `WQLinear_GEMM.from_linear`; the packages' `__init__` files would import every model it knows."""
    for name in ("awq", "awq.modules", "awq.modules.linear"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    from awq.modules.linear.gemm import WQLinear_GEMM

    fixtures = {}
    for name, out, inputs, group in AWQ:
        drawn = draw(name, 4, out, inputs, group, symmetric=False)
        linear = torch.nn.Linear(inputs, out, bias=False)
        linear.weight.data = drawn.pop("weight")
        packed = WQLinear_GEMM.from_linear(
            linear, 4, group, scales=drawn["scales"].T.contiguous(), zeros=drawn["zeros"].T.contiguous().float()
        )
        fixtures |= {f"autoawq/{name}/{key}": value for key, value in drawn.items()}
        fixtures |= {f"autoawq/{name}/{key}": value for key, value in packed.state_dict().items()}
    return fixtures


def pack_with_compressed_tensors() -> dict[str, torch.Tensor]:
    """Through its compressor; also a configuration of all cases as its own classes write it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    fixtures, groups = {}, {}
    for index, (name, bits, out, inputs, group, symmetric) in enumerate(COMPRESSED):
        strategy = "channel" if group is None else "group"
        args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group)
        scheme = QuantizationScheme(targets=[f"re:.*case{index}$"], weights=args, format="pack-quantized")
        drawn = draw(name, bits, out, inputs, group or inputs, symmetric)
        zero_point = (drawn["zeros"].int() - 2 ** (bits - 1)).to(torch.int8)
        state = {"weight": drawn.pop("weight"), "weight_scale": drawn["scales"], "weight_zero_point": zero_point}
        fixtures |= {f"compressed/{name}/{key}": value for key, value in drawn.items()}
        fixtures |= {f"compressed/{name}/{key}": value for key, value in compressor.compress(state, scheme).items()}
        groups[f"group_{index}"] = scheme
    config = QuantizationConfig(config_groups=groups, format="pack-quantized", ignore=["re:.*vision_model.*"])
    text = json.dumps(config.to_dict(), default=str)
    return fixtures | {"compressed/config": torch.tensor(list(text.encode()), dtype=torch.uint8)}


def main() -> None:
    fixtures = pack_with_autoawq(Path(sys.argv[1])) | pack_with_compressed_tensors()
    path = Path(__file__).with_name("packing.npz")
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in fixtures.items()})
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
