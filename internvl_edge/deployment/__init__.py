"""From a checkpoint to a device in one resumable run: plan, quantize, export, evaluate, build.

`request.py` is what is wanted, `stages.py` composes what the single commands call, and `state.py` knows which stages of
an earlier start still count.
"""

from __future__ import annotations

from .request import Request, find_target
from .stages import DEPLOY_PHASES, Deployed, Stage, deploy

__all__ = ["DEPLOY_PHASES", "Deployed", "Request", "Stage", "deploy", "find_target"]
