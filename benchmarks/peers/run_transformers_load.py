"""transformers' own reading of checkpoints in its layout: run_transformers_load.py OUT FOLDER...

OUT holds versions and, by folder name, what was loaded or the error; FOLDER.transformers.npz the quantized
linears' weights as transformers multiplied them out, by module name. Nothing here knows quantization.
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

PROMPT = range(5, 40)


@torch.no_grad()
def load(folder: Path) -> dict[str, Any]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    torch.nn.Module.float(model)  # their own refuses it for quantized models
    logits = model(input_ids=torch.tensor([list(PROMPT)])).logits[0]
    # What compressed-tensors has attached to a module tells that it was quantized.
    found = {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    weights = {name: module.weight.numpy() for name, module in found.items()}
    np.savez(folder.with_name(f"{folder.name}.transformers.npz"), **weights)
    return {"quantized_linears": len(weights), "finite": bool(logits.isfinite().all())}


def main() -> None:
    found: dict[str, Any] = {}
    for folder in map(Path, sys.argv[2:]):
        try:
            found[folder.name] = {"loaded": True, **load(folder)}
        except Exception as error:  # whatever transformers says is the result
            found[folder.name] = {
                "loaded": False,
                "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400],
            }
    versions = {name: version(name) for name in ("torch", "transformers", "compressed-tensors")}
    Path(sys.argv[1]).write_text(json.dumps({"versions": versions, "rows": found}), encoding="utf-8")


if __name__ == "__main__":
    main()
