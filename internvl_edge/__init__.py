"""InternVL on the edge: export, calibrate, quantize, run.

from internvl_edge import InternVL
reply = InternVL.load("bundle/").chat("What is the total?", images=["receipt.jpg"])
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base.errors import EdgeError, QualityWarning
    from .evaluation import evaluate
    from .export import export_bundle
    from .quantize import quantize_checkpoint
    from .runtime.answer_format import AnswerFormat
    from .runtime.conversation import Conversation
    from .runtime.model import InternVL
    from .runtime.reply import Reply

__version__ = "0.2.0"

__all__ = [
    "AnswerFormat",
    "Conversation",
    "EdgeError",
    "InternVL",
    "QualityWarning",
    "Reply",
    "evaluate",
    "export_bundle",
    "quantize_checkpoint",
]

# Nothing about a user's models leaves the machine unasked. Since 1.29, ONNX Runtime for Linux sends names and hashes of
# models to its maker as soon as it is imported, and the hub's client sends versions. A value that the user set stays.
for _name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")

# Loaded on first use: a device that only runs bundles has no export packages, and `--help` should be quick.
_HOMES = {
    "AnswerFormat": "runtime.answer_format",
    "InternVL": "runtime.model",
    "Reply": "runtime.reply",
    "Conversation": "runtime.conversation",
    "EdgeError": "base.errors",
    "QualityWarning": "base.errors",
    "evaluate": "evaluation",
    "export_bundle": "export",
    "quantize_checkpoint": "quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
