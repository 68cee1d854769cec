"""NVIDIA ModelOpt's INT4_AWQ_CFG on a Llama folder: run_modelopt.py MODEL TOKENS.npy OUT --group-size 64.

Needs the `modelopt` environment. OUT becomes a folder with the float32 weights that the quantized model multiplies
with: rounded ones times the scale of their inputs. The configuration is the tool's own (symmetric, alpha search without
clipping), apart from the group size; `--clip` takes its full algorithm, which also searches clipping.

With `--smoothquant TEST.npz` it is INT8_SMOOTHQUANT_CFG as the tool has it: weights of linears per output, their inputs
per tensor, ranges from all calibration tokens. Inputs are rounded in the model, so the model itself answers: OUT gets
`logits.npy`, float32 [positions, vocab], the predictions of ids[start + 1] and all that follow of each test sequence.
TEST holds `ids` of all sequences one behind the other, their `lengths` and their `starts`.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--smoothquant")
    parser.add_argument("--clip", action="store_true")
    options = parser.parse_args()
    tokens = torch.from_numpy(np.load(options.tokens)).long()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    config = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG if options.smoothquant else mtq.INT4_AWQ_CFG)
    if options.clip:
        config["algorithm"] = {"method": "awq_full", "alpha_step": 0.1}
    if not options.smoothquant:
        _set_group_size(config, options.group_size)

    def calibrate(model: torch.nn.Module) -> None:
        for start in range(0, len(tokens), BATCH):
            model(tokens[start : start + BATCH], logits_to_keep=1)

    with torch.no_grad():
        mtq.quantize(model, config, calibrate)
        if options.smoothquant:
            _answer(model, Path(options.smoothquant), Path(options.out))
        else:
            _save(_multiplied(model), options.out)


def _answer(model: torch.nn.Module, test: Path, out: Path) -> None:
    """Write the model's own predictions."""
    enabled = [name for name, module in model.named_modules() if name.endswith("_quantizer") and module.is_enabled]
    print(f"{len(enabled)} quantizers: {enabled[:3]} ...")
    sequences = np.load(test)
    ends = np.cumsum(sequences["lengths"])
    parts = []
    for start, length, end in zip(sequences["starts"], sequences["lengths"], ends, strict=True):
        ids = torch.from_numpy(sequences["ids"][end - length : end]).long()
        parts.append(model(ids[None]).logits[0, start:-1].float().numpy())
    out.mkdir(parents=True)
    np.save(out / "logits.npy", np.concatenate(parts))


def _set_group_size(config: object, size: int) -> None:
    """Replace every block size of the last axis in the configuration, however deep it lies."""
    if isinstance(config, dict):
        if isinstance(blocks := config.get("block_sizes"), dict) and -1 in blocks:
            blocks[-1] = size
        for value in config.values():
            _set_group_size(value, size)
    elif isinstance(config, list):
        for value in config:
            _set_group_size(value, size)


def _multiplied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors, quantized linears as what they multiply with."""
    state = {name: value for name, value in model.state_dict().items() if "_quantizer" not in name}
    rounded = 0
    for name, module in model.named_modules():
        if (quantizer := getattr(module, "weight_quantizer", None)) is None or not quantizer.is_enabled:
            continue
        weight = quantizer(module.weight)
        scale = getattr(module.input_quantizer, "pre_quant_scale", None)
        state[f"{name}.weight"] = weight if scale is None else weight * scale.float()
        rounded += 1
    print(f"{rounded} linears rounded")
    state.pop("lm_head.weight", None)  # the token table again
    return {name: value.detach().float().contiguous().clone() for name, value in state.items()}


def _save(state: dict[str, torch.Tensor], out: str) -> None:
    Path(out).mkdir(parents=True)
    save_file(state, Path(out) / "model.safetensors")


if __name__ == "__main__":
    main()
