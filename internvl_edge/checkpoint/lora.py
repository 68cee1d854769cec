"""LoRA adapters in the forms that they are saved in: none of them is a model before it is merged."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from internvl_edge.base.errors import CheckpointError

# What peft writes into a folder of its own, or beside the weights it belongs to.
_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Parts of names by which peft keeps the adapter, and the weights below it, apart.
_NAMES = re.compile(
    r"(^|\.)(lora_(A|B|E|embedding_A|embedding_B|magnitude_vector)|base_layer|modules_to_save|original_module)(\.|$)"
    r"|(^|\.)base_model\.model\."
)
_ADVICE = (
    "merge it first: merge_and_unload() of peft and save_pretrained(), or tools/merge_lora.py of InternVL; then give "
    "the merged folder"
)


def refuse_adapter_files(folder: Path) -> None:
    """Raise CheckpointError where a folder holds an adapter of peft, alone or beside a model."""
    for name in _FILES:
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder} holds a LoRA adapter ({name}), which is not part of the weights; {_ADVICE}"
            )


def refuse_adapter_tensors(folder: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError where stored tensors are those of an adapter, or of a model around one."""
    for name in names:
        if _NAMES.search(name):
            raise CheckpointError(f"{folder}: tensor {name} is of a LoRA adapter that is not merged; {_ADVICE}")
