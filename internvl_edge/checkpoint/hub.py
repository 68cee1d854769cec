"""Resolve a CHECKPOINT argument (a folder or a hub id) to a folder. A local folder never causes network access."""

from __future__ import annotations

import re
from pathlib import Path

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.extras import requires
from internvl_edge.base.folders import restore

from .kv_scales import KV_CACHE_SCALES

# Weights, configuration, tokenizer, and no pickles other than weight shards. The code files are a few kilobytes of text
# that vLLM and transformers need in the output of `quantize`. This project does not run them.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.py", "merges.txt", "tokenizer.model", KV_CACHE_SCALES]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_checkpoint(text: str) -> Path:
    """Return the folder of a checkpoint. A hub id such as `OpenGVLab/InternVL2_5-1B` is downloaded.

    The download shows its progress and is resumable.

    Raises:
        CheckpointError: neither a folder nor a hub id, the download failed, or the extra `hub` is not installed.
    """
    if folder := _local(text):
        return folder
    folder = _download(text, _WANTED)
    if not any(folder.glob("*.safetensors")):
        folder = _download(text, [*_WANTED, "pytorch_model*.bin"])
    return folder


def resolve_configuration(text: str) -> Path:
    """Return a folder with a model's configuration. It may lack the weights.

    Args:
        text: a checkpoint folder, its config.json, or a hub id. For a hub id, only config.json and the KV cache's
            scales are downloaded.

    Raises:
        CheckpointError: as `resolve_checkpoint`.
    """
    path = Path(text)
    if path.name == "config.json" and path.is_file():
        return path.parent
    return _local(text) or _download(text, ["config.json", KV_CACHE_SCALES])


def _local(text: str) -> Path | None:
    """Return the local folder, or None for a hub id."""
    folder = Path(text)
    restore(folder)
    if folder.exists():
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is a file, expected a checkpoint folder")
        return folder
    if not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise CheckpointError(
            f"{text} does not exist; give a checkpoint folder or a hub id like OpenGVLab/InternVL2_5-1B"
        )
    return None


def _download(repo: str, wanted: list[str]) -> Path:
    with requires("hub", f"downloading {repo}", CheckpointError, "or give a checkpoint folder"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{repo} is no folder here and could not be downloaded: {reason}") from None
