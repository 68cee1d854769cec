"""Resolve a CHECKPOINT argument (a folder or a hub id) to a folder. A local folder never causes network access.

What was downloaded is named by its commit, which never changes, also where a branch or a tag was asked for.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.extras import requires
from internvl_edge.base.folders import restore
from internvl_edge.base.text import one_line, shown

from .kv_scales import KV_CACHE_SCALES

# Weights, configuration, tokenizer, and no pickles other than weight shards. The code files are a few kilobytes of text
# that vLLM and transformers need in the output of `quantize`. This project does not run them.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.py", "merges.txt", "tokenizer.model", KV_CACHE_SCALES]
# What a plan reads: the configuration, the image processor's tile limits, and whether the KV cache is int8.
_DESCRIPTION = ["config.json", "preprocessor_config.json", "processor_config.json", KV_CACHE_SCALES]
# A checkpoint's files lie at the top of a repository; in the patterns of the hub's client, `*.json` also matches below.
_BELOW = ["*/*"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The names of git, without those that leave the folder in which the hub's client notes them.
_REVISION = re.compile(r"[\w][\w.+-]*(/[\w][\w.+-]*)*")
# Where the hub's client keeps a commit: models--OWNER--NAME/snapshots/COMMIT. No hub id contains "--".
_SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})")
_PAGE = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)
_PAGE_BYTES = 256
_PORTAL = "perhaps the page of a network that asks for a login; open a browser, or check HF_ENDPOINT"
# Errors of the hub's client and of its HTTP library, whose name differs between releases, by the names of their kinds.
_UNREACHABLE = {"ConnectError", "TimeoutException", "ProxyError"}
_INCOMPLETE = {"RemoteProtocolError", "ReadError"}
_NOT_A_HUB = {
    *("FileMetadataError", "TooManyRedirects", "UnsupportedProtocol", "DecodingError"),
    *("ValueError", "LookupError", "TypeError", "AttributeError", "AssertionError"),
}


@dataclass(frozen=True)
class HubSource:
    """The commit of a repository on the hub that a checkpoint was downloaded from.

    Attributes:
        repository: its hub id, "OpenGVLab/InternVL2_5-1B".
        commit: 40 hexadecimal digits.
    """

    repository: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repository}, commit {self.commit}"


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
    if folder := _local(text, revision):
        return folder
    folder = _download(text, revision, _WANTED)
    if not any(folder.glob("*.safetensors")):
        folder = _download(text, folder.name, [*_WANTED, "pytorch_model*.bin"])
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
        refuse_revision(text, revision)
        return path.parent
    return _local(text, revision) or _download(text, revision, _DESCRIPTION)


def hub_source(folder: Path) -> HubSource | None:
    """Return where a folder was downloaded from, or None where it is not in the cache of the hub's client."""
    found = _SNAPSHOT.fullmatch("/".join(folder.resolve().parts[-3:]))
    return HubSource(f"{found['owner']}/{found['name']}", found["commit"]) if found else None


def refuse_revision(text: str, revision: str | None) -> None:
    """Raise CheckpointError where a revision was given for something that is on this machine."""
    if revision is not None:
        raise CheckpointError(f"{text} is on this machine, and --revision chooses a version of a hub id; leave it out")


def _local(text: str, revision: str | None) -> Path | None:
    """Return the local folder, or None for a hub id."""
    folder = Path(text)
    restore(folder)
    if folder.exists():
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is a file, expected a checkpoint folder")
        refuse_revision(text, revision)
        return folder
    if not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise CheckpointError(
            f"{text} does not exist; give a checkpoint folder or a hub id like OpenGVLab/InternVL2_5-1B"
        )
    if revision is not None and not _REVISION.fullmatch(revision):
        raise CheckpointError(f"--revision {shown(revision)} is no branch, tag or commit; give one of {text}")
    return None


def _download(repo: str, revision: str | None, wanted: list[str]) -> Path:
    with requires("hub", f"downloading {repo}", CheckpointError, "or give a checkpoint folder"):
        from huggingface_hub import snapshot_download
    try:
        with _quiet_client():
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=_BELOW))
    except Exception as error:  # of the client, of its HTTP library, or of reading an answer that no hub gives
        raise CheckpointError(
            f"{repo} is no folder here and could not be downloaded: {_reason(error, repo, revision)}"
        ) from None
    if not _COMMIT.fullmatch(folder.name):
        raise CheckpointError(f"{_endpoint()} names the commit {shown(folder.name)} for {repo}: {_PORTAL}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{repo} has no config.json at its top (commit {folder.name}), so it is no checkpoint; check the hub id"
        )
    _refuse_pages(folder)
    return folder


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep the client's own lines away: warnings about retries, and bars where nobody watches them."""
    utils: Any = importlib.import_module("huggingface_hub.utils")
    logger = logging.getLogger("huggingface_hub")
    level, hidden = logger.level, utils.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not hidden:
            utils.enable_progress_bars()


def _refuse_pages(folder: Path) -> None:
    """Raise CheckpointError where a file in the cache is a web page: the hub's client checks sizes alone."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            start = file.read(_PAGE_BYTES)
        if _PAGE.match(start):
            raise CheckpointError(
                f"{path.name} was answered with a web page, {_PORTAL}; then delete {folder.parents[1]} and repeat"
            )


def _reason(error: Exception, repo: str, revision: str | None) -> str:
    """Say why a download failed and what to do."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    # "It is not in the cache either" hides what happened on the network.
    hidden = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    cause = hidden or error
    first = one_line(next(iter(str(cause).strip().splitlines()), "") or type(cause).__name__, 150)
    return _refusal(cause, repo, revision) or _failure(cause) or first


def _refusal(error: BaseException, repo: str, revision: str | None) -> str:
    """What a hub's answer means; "" where there was none."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, HFValidationError):
        return "it is no hub id either; give one like OpenGVLab/InternVL2_5-1B"
    if isinstance(error, GatedRepoError):
        return f"it is gated; accept its terms at {_endpoint()}/{repo}, then {_token_advice()}"
    if isinstance(error, RevisionNotFoundError) and revision is not None:
        return f"it has no revision {shown(revision)}; give a branch, tag or commit that {_endpoint()}/{repo} lists"
    if isinstance(error, RevisionNotFoundError):  # of the commit that it named for the main branch
        return f"{_endpoint()} did not answer as a hub does, {_PORTAL}"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        return f"{_endpoint()} has none, or a private or gated one ({status}); check the id, or {_token_advice()}"
    return f"{_endpoint()} answered {status}; try again later" if status == 429 or status >= 500 else ""


def _failure(error: BaseException) -> str:
    """What went wrong on the way to the hub or back; "" for anything else."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "OfflineModeIsEnabled" in kinds:
        return "HF_HUB_OFFLINE is set, and it is not whole in the cache; unset it, or give a checkpoint folder"
    if kinds & _UNREACHABLE:
        found = one_line(str(error).strip() or type(error).__name__, 150)
        return f"{_endpoint()} cannot be reached ({found}); check network and proxy, or give a checkpoint folder"
    if kinds & _INCOMPLETE or "Consistency check failed" in str(error):
        return "a file arrived incomplete; repeat the command, which continues the download"
    return f"{_endpoint()} did not answer as a hub does, {_PORTAL}" if kinds & _NOT_A_HUB else ""


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _token_advice() -> str:
    """Tell how to be somebody who may read a repository, without naming the token."""
    from huggingface_hub import get_token

    if get_token():
        return "use an HF_TOKEN that may read it: the present token may not"
    return "set HF_TOKEN to a token that may read it, or run hf auth login"
