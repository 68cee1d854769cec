"""Find a folder by its path or by its hub id. A local folder never causes network access.

What was downloaded lies in the cache of the hub's client and is named by its commit, which never changes, also where a
branch or a tag was asked for. `checkpoint.hub` and `bundle.hub` say which files they need.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import EdgeError
from .extras import requires
from .folders import restore
from .text import one_line, shown

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
_INCOMPLETE = {"RemoteProtocolError", "ReadError", "WriteError"}
_NOT_A_HUB = {
    *("FileMetadataError", "TooManyRedirects", "UnsupportedProtocol", "DecodingError"),
    *("ValueError", "LookupError", "TypeError", "AttributeError", "AssertionError"),
}


@dataclass(frozen=True)
class HubSource:
    """The commit of a repository on the hub that something was downloaded from.

    Attributes:
        repository: its hub id, "OpenGVLab/InternVL2_5-1B".
        commit: 40 hexadecimal digits.
    """

    repository: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repository}, commit {self.commit}"


@dataclass(frozen=True)
class Kind:
    """What is looked for under a hub id.

    Attributes:
        name: for messages: "checkpoint".
        mark: the file at the top that only this kind has; "" where any kind will do.
        example: a hub id of one.
        error: the class of all errors.
    """

    name: str
    mark: str
    example: str
    error: type[EdgeError]


def hub_source(folder: Path) -> HubSource | None:
    """Return where a folder was downloaded from, or None where it is not in the cache of the hub's client."""
    found = _SNAPSHOT.fullmatch("/".join(folder.resolve().parts[-3:]))
    return HubSource(f"{found['owner']}/{found['name']}", found["commit"]) if found else None


def is_hub_id(text: str) -> bool:
    """Return whether a text that is no local folder can be the name of a repository on the hub."""
    return _HUB_ID.fullmatch(text) is not None and not text.startswith(".")


def refuse_revision(text: str, revision: str | None, kind: Kind) -> None:
    """Raise the kind's error where a revision was given for something that is on this machine."""
    if revision is not None:
        raise kind.error(f"{text} is on this machine, and --revision chooses a version of a hub id; leave it out")


def local_folder(text: str, revision: str | None, kind: Kind) -> Path | None:
    """Return the local folder of this name, or None for a hub id.

    Raises:
        EdgeError: of the kind's class: neither, or a revision of a folder.
    """
    folder = Path(text)
    restore(folder)
    if folder.exists():
        if not folder.is_dir():
            raise kind.error(f"{folder} is a file, expected a {kind.name} folder")
        refuse_revision(text, revision, kind)
        return folder
    if not is_hub_id(text):
        raise kind.error(f"{text} does not exist; give a {kind.name} folder or a hub id like {kind.example}")
    require_revision(revision, text, kind.error)
    return None


def require_revision(revision: str | None, repo: str, error: type[EdgeError]) -> None:
    """Raise an error of this class for what git calls no branch, tag or commit."""
    if revision is not None and not _REVISION.fullmatch(revision):
        raise error(f"--revision {shown(revision)} is no branch, tag or commit; give one of {repo}")


def download(repo: str, revision: str | None, wanted: Iterable[str], kind: Kind, below: bool = False) -> Path:
    """Download some files of a repository into the cache of the hub's client; return the folder of the commit.

    The download shows its progress and is resumable. Without network, the cache answers.

    Args:
        repo: the hub id.
        revision: branch, tag or commit; the default is the main branch.
        wanted: patterns of paths, as the client takes them: `*` matches separators too.
        kind: what the repository should hold.
        below: whether files in folders of the repository may match.

    Raises:
        EdgeError: of the kind's class: the download failed, the repository holds something else, or the extra `hub` is
            not installed.
    """
    with requires("hub", f"downloading {repo}", kind.error, f"or give a {kind.name} folder"):
        from huggingface_hub import snapshot_download
    ignored = [] if below else ["*/*"]
    with hub_errors(f"{repo} is no folder here and could not be downloaded", repo, revision, kind):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*wanted], ignore_patterns=ignored))
    if not _COMMIT.fullmatch(folder.name):
        raise kind.error(f"{endpoint()} names the commit {shown(folder.name)} for {repo}: {_PORTAL}")
    if kind.mark and not (folder / kind.mark).is_file():
        raise kind.error(
            f"{repo} has no {kind.mark} at its top (commit {folder.name}), so it is no {kind.name}; check the hub id"
        )
    _refuse_pages(folder, kind.error)
    return folder


@contextmanager
def hub_errors(failed: str, repo: str, revision: str | None, kind: Kind, right: str = "read") -> Iterator[None]:
    """Turn whatever the hub's client raises inside the block into an error of one line, and keep its own lines away.

    Args:
        failed: what did not work, for the beginning of the message.
        repo: the hub id.
        revision: the revision that was asked for.
        kind: what was looked for, or what is uploaded.
        right: what a token must permit: "read" or "write".

    Raises:
        EdgeError: of the kind's class.
    """
    try:
        with _quiet_client():
            yield
    except EdgeError:
        raise
    except Exception as error:  # of the client, of its HTTP library, or of reading an answer that no hub gives
        raise kind.error(f"{failed}: {_reason(error, repo, revision, kind, right)}") from None


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


def _refuse_pages(folder: Path, error: type[EdgeError]) -> None:
    """Raise an error where a file in the cache is a web page: the hub's client checks sizes alone."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            start = file.read(_PAGE_BYTES)
        if _PAGE.match(start):
            raise error(
                f"{path.name} was answered with a web page, {_PORTAL}; then delete {folder.parents[1]} and repeat"
            )


def _reason(error: Exception, repo: str, revision: str | None, kind: Kind, right: str) -> str:
    """Say why it failed and what to do."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    # "It is not in the cache either" hides what happened on the network.
    hidden = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    cause = hidden or error
    first = one_line(next(iter(str(cause).strip().splitlines()), "") or type(cause).__name__, 150)
    return _refusal(cause, repo, revision, kind, right) or _failure(cause, kind, right) or first


def _refusal(error: BaseException, repo: str, revision: str | None, kind: Kind, right: str) -> str:
    """What a hub's answer means; "" where there was none."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, HFValidationError):
        return f"it is no hub id either; give one like {kind.example}"
    if isinstance(error, GatedRepoError):
        return f"it is gated; accept its terms at {endpoint()}/{repo}, then {_token_advice(right)}"
    if isinstance(error, RevisionNotFoundError) and revision is not None:
        return f"it has no revision {shown(revision)}; give a branch, tag or commit that {endpoint()}/{repo} lists"
    if isinstance(error, RevisionNotFoundError):  # of the commit that it named for the main branch
        return f"{endpoint()} did not answer as a hub does, {_PORTAL}"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        return f"{endpoint()} has none, or a private or gated one ({status}); check the id, or {_token_advice(right)}"
    return f"{endpoint()} answered {status}; try again later" if status == 429 or status >= 500 else ""


def _failure(error: BaseException, kind: Kind, right: str) -> str:
    """What went wrong on the way to the hub or back; "" for anything else."""
    load = "upload" if right == "write" else "download"
    kinds = {each.__name__ for each in type(error).__mro__}
    if "OfflineModeIsEnabled" in kinds:
        return f"HF_HUB_OFFLINE is set, and it is not whole in the cache; unset it, or give a {kind.name} folder"
    if kinds & _UNREACHABLE:
        found = one_line(str(error).strip() or type(error).__name__, 150)
        return f"{endpoint()} cannot be reached ({found}); check network and proxy, or give a {kind.name} folder"
    if kinds & _INCOMPLETE or "Consistency check failed" in str(error):
        return f"a file arrived incomplete; repeat the command, which continues the {load}"
    return f"{endpoint()} did not answer as a hub does, {_PORTAL}" if kinds & _NOT_A_HUB else ""


def endpoint() -> str:
    """Return the address of the hub, without a slash at its end."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _token_advice(right: str) -> str:
    """Tell how to be somebody who may read or write a repository, without naming the token."""
    from huggingface_hub import get_token

    if get_token():
        return f"use an HF_TOKEN that may {right} it: the present token may not"
    return f"set HF_TOKEN to a token that may {right} it, or run hf auth login"
