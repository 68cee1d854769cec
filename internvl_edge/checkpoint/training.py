"""What training programs leave behind: folders that hold no model yet, and tensors that are no part of the model.

Sources of the names: the Trainer of transformers, DeepSpeed, torch's distributed checkpoints, trl, ms-swift and
LLaMA-Factory. Adapters are in `lora`.
"""

from __future__ import annotations

import re
from pathlib import Path

# Heads that trainers of rewards, values and classes put beside the language model's own.
_HEADS = re.compile(r"(^|\.)(v_head|value_head|reward_head|score|classifier|regression_head)(\.|$)")
_STEP = re.compile(r"(checkpoint|global_step)-?(\d+)(-merged)?")


def missing_model_advice(folder: Path) -> str | None:
    """What to give instead of a folder of training that has no `config.json`; None where it is not such a folder."""
    steps = _steps(folder, "checkpoint")
    if not steps:
        return None
    return f"it is the folder of a training run; give one of its checkpoints, such as {folder / steps[-1]}"


def missing_weights_advice(folder: Path) -> str | None:
    """How to get weights where training has left them in parts; None where there is no sign of it."""
    if _steps(folder, "global_step") or any(folder.glob("zero_pp_rank_*")):
        return "DeepSpeed has left its parts there: run zero_to_fp32.py of that folder with --safe_serialization"
    if any(folder.glob("*/*.distcp")) or any(folder.glob("*.distcp")):
        return (
            "torch has left a distributed checkpoint there: merge it with `accelerate merge-weights`, which writes "
            "model.safetensors"
        )
    return None


def extra_head(name: str) -> bool:
    """Whether a stored tensor is of a head for rewards, values or classes."""
    return _HEADS.search(name) is not None


def _steps(folder: Path, kind: str) -> list[str]:
    """The subfolders of one kind, in the order of their steps."""
    if not folder.is_dir():
        return []
    found = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    steps = [(int(match[2]), path.name) for match, path in found if match and match[1] == kind]
    return [name for _, name in sorted(steps)]
