"""transformers' own reading of checkpoints in its layout: run_transformers_load.py OUT PROMPTS TOP FOLDER...

PROMPTS holds of prompt N `ids_N` [n] and `pixels_N` [tiles, 3, S, S]. OUT gets versions and, by folder name, what was
loaded or the error. Beside OUT, NAME.weights.npz gets the quantized linears' weights as transformers multiplied them
out, by module name, and NAME.predictions.npz `ids_N`, and of the TOP likeliest tokens after each of the first n - 1
`tokens_N` and `logprobs_N` [n - 1, top]. Nothing here knows quantization.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import torchvision_operators  # noqa: F401
from transformers import AutoModelForImageTextToText


@torch.no_grad()
def load(folder: Path, prompts: dict[str, np.ndarray], top: int, out: Path) -> dict[str, Any]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    # Scales keep the checkpoint's type otherwise, and weights are multiplied out in it. The model's own float()
    # refuses quantized models.
    torch.nn.Module.float(model)
    arrays: dict[str, np.ndarray] = {}
    for number in range(len(prompts) // 2):
        ids, pixels = (torch.from_numpy(prompts[f"{kind}_{number}"]) for kind in ("ids", "pixels"))
        logits = model(input_ids=ids.long()[None], pixel_values=pixels).logits[0, :-1]
        found = logits.float().log_softmax(-1).topk(top)
        arrays[f"ids_{number}"] = ids.numpy()
        arrays[f"tokens_{number}"] = found.indices.numpy().astype(np.int32)
        arrays[f"logprobs_{number}"] = found.values.numpy()
    # What compressed-tensors has attached to a module tells that it was quantized.
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    np.savez(out.with_name(f"{folder.name}.weights.npz"), **{n: m.weight.float().numpy() for n, m in linears.items()})
    np.savez(out.with_name(f"{folder.name}.predictions.npz"), **arrays)
    return {"quantized_linears": len(linears)}


def main() -> None:
    out, top, found = Path(sys.argv[1]), int(sys.argv[3]), dict[str, Any]()
    with np.load(sys.argv[2]) as file:
        prompts = {name: file[name] for name in file.files}
    for folder in map(Path, sys.argv[4:]):
        try:
            found[folder.name] = {"loaded": True, **load(folder, prompts, top, out)}
        except Exception as error:  # whatever transformers says is the result
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
            found[folder.name] = {"loaded": False, "error": message}
    versions = {name: version(name) for name in ("torch", "transformers", "compressed-tensors")}
    out.write_text(json.dumps({"versions": versions, "rows": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
