"""Turn images and prompts into what a model's layers receive, for a quantizer.

`calibrate` makes a calibration set. `internvl_edge.calibration.synthetic` draws the pictures of the built-in set.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compute import choose_compute
    from .dataset import CalibrationSet, DataOptions
    from .pipeline import calibrate

__all__ = ["CalibrationSet", "DataOptions", "calibrate", "choose_compute"]

# These names are loaded on first use, because the synthetic pictures do not need torch.
_HOMES = {
    "CalibrationSet": "dataset",
    "DataOptions": "dataset",
    "calibrate": "pipeline",
    "choose_compute": "compute",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
