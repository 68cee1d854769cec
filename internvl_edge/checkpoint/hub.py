"""Resolve a CHECKPOINT argument (a folder or a hub id) to a folder. A local folder never causes network access."""

from __future__ import annotations

from pathlib import Path

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.hub import Kind, download, local_folder, refuse_revision

from .kv_scales import KV_CACHE_SCALES

CHECKPOINT = Kind("checkpoint", "config.json", "OpenGVLab/InternVL2_5-1B", CheckpointError)
# Weights, configuration, tokenizer, and no pickles other than weight shards. The code files are a few kilobytes of text
# that vLLM and transformers need in the output of `quantize`. This project does not run them. The card and the license
# say what a copy may be used for.
_WANTED = [
    *("*.json", "*.safetensors", "*.jinja", "*.py", "merges.txt", "tokenizer.model", KV_CACHE_SCALES),
    *("README.md", "LICENSE*"),
]
# What a plan reads: the configuration, the image processor's tile limits, and whether the KV cache is int8.
_DESCRIPTION = ["config.json", "preprocessor_config.json", "processor_config.json", KV_CACHE_SCALES]


def resolve_checkpoint(text: str, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint. A hub id such as `OpenGVLab/InternVL2_5-1B` is downloaded.

    The download shows its progress and is resumable.

    Args:
        text: a folder or a hub id.
        revision: branch, tag or commit of a hub id; the default is its main branch.

    Raises:
        CheckpointError: neither a folder nor a hub id, a revision of a folder, the download failed, or the extra `hub`
            is not installed.
    """
    if folder := local_folder(text, revision, CHECKPOINT):
        return folder
    folder = download(text, revision, _WANTED, CHECKPOINT)
    if not any(folder.glob("*.safetensors")):
        folder = download(text, folder.name, [*_WANTED, "pytorch_model*.bin"], CHECKPOINT)
    return folder


def resolve_configuration(text: str, revision: str | None = None) -> Path:
    """Return a folder with a model's configuration. It may lack the weights.

    Args:
        text: a checkpoint folder, its config.json, or a hub id. For a hub id, only the files are downloaded that
            describe the model.
        revision: as `resolve_checkpoint`.

    Raises:
        CheckpointError: as `resolve_checkpoint`.
    """
    path = Path(text)
    if path.name == "config.json" and path.is_file():
        refuse_revision(text, revision, CHECKPOINT)
        return path.parent
    return local_folder(text, revision, CHECKPOINT) or download(text, revision, _DESCRIPTION, CHECKPOINT)
