"""Upload a bundle or a quantized checkpoint to the hub, with its card.

Two commits: the files, all in one, and then the card, which pins the first. A repeated upload continues: the hub says
which large files it has already, and files that did not change make no commit. Tokens and addresses are those of the
hub's client (`HF_TOKEN`, `HF_ENDPOINT`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import BundleError, CheckpointError, EdgeError
from internvl_edge.base.extras import requires
from internvl_edge.base.hub import Kind, hub_errors, is_hub_id, require_revision
from internvl_edge.base.progress import SILENT, Progress
from internvl_edge.base.text import shown
from internvl_edge.bundle.bundle import Bundle, read_quantization
from internvl_edge.bundle.contents import engine_files
from internvl_edge.bundle.hub import BUNDLE
from internvl_edge.bundle.manifest import Manifest, is_bundle
from internvl_edge.bundle.names import ENGINE_RECORD, ENGINES, MANIFEST, RUNTIME_CACHES
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.hub import CHECKPOINT
from internvl_edge.checkpoint.license import CARD, read_license
from internvl_edge.checkpoint.record import REPORTS, quantized_files, read_record

from .card import Place, bundle_card, checkpoint_card

PUSH_PHASES = 3
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PINNED = re.compile(r"--revision ([0-9a-f]{40})")
_WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True)
class Pushed:
    """What `push` did.

    Attributes:
        repository: the hub id.
        commit: the commit with these files, which the card pins.
        kind: "bundle" or "checkpoint".
        files: number of files that belong to it, the card included.
        bytes: their size, without the card.
        changed: whether anything was uploaded.
        removed: weight files of an earlier checkpoint that the commit removed.
    """

    repository: str
    commit: str
    kind: str
    files: int
    bytes: int
    changed: bool
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Contents:
    """What is to be uploaded: its kind, its files by their path in the repository, and its card for a commit."""

    kind: Kind
    files: dict[str, Path]
    manifest: Manifest | None = None
    engines: tuple[str, ...] = ()

    def card(self, folder: Path, place: Place) -> str:
        if self.manifest:
            return bundle_card(self.manifest, read_quantization(folder, self.manifest), place, self.engines)
        record = read_record(folder)
        assert record is not None
        return checkpoint_card(record, read_config(folder).layout, read_license(folder), place)


def push(
    folder: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str = "",
    engines: bool = False,
    progress: Progress = SILENT,
) -> Pushed:
    """Upload a bundle, or a checkpoint that `quantize` made, and its card.

    Args:
        folder: what to upload; every file of a bundle is verified first. Nothing but its own files is uploaded, and of
            these no locks, no caches and no reports.
        repo: the hub id, "OWNER/NAME"; it is made where there is none.
        revision: branch, which is made from the main branch where there is none; the default is the main branch.
        private: make a new repository private, and refuse an existing one that is public.
        message: of the commit.
        engines: upload a bundle's TensorRT engines too.
        progress: shows the phases.

    Raises:
        EdgeError: the folder is neither, a file is damaged, the repository holds the other kind, or the hub refuses.
    """
    source = Path(folder)
    with requires("hub", "push"):
        from huggingface_hub import HfApi
    progress.expect(PUSH_PHASES)
    with progress.phase("verifying the files"):
        contents = _contents(source, engines)
    if not is_hub_id(repo):
        raise contents.kind.error(f"{shown(repo)} is no hub id; give one like OWNER/NAME")
    require_revision(revision, repo, contents.kind.error)
    if revision is not None and _COMMIT.fullmatch(revision):
        raise contents.kind.error(f"--revision {revision} is a commit, which never changes; give the name of a branch")
    kind, api = contents.kind, HfApi()
    with hub_errors(f"{source} could not be uploaded to {repo}", repo, revision, kind, "write"):
        with progress.phase(f"uploading to {repo}"):
            before, present = _prepared(api, repo, revision, private, kind)
            removed = tuple(sorted(_stale(contents, present)))
            made = _commit(api, repo, revision, message or f"Upload a {kind.name}", contents.files, removed)
        with progress.phase("writing the card"):
            pinned = made if made != before else _pinned(api, repo, made, present)
            card = contents.card(source, Place(repo, pinned))
            last = _commit(api, repo, revision, f"{message or 'Upload a card'} (card)", {CARD: card.encode("utf-8")})
    total = sum(path.stat().st_size for path in contents.files.values())
    return Pushed(repo, pinned, kind.name, len(contents.files) + 1, total, last != before, removed)


def _contents(folder: Path, engines: bool) -> _Contents:
    """List what belongs to a bundle or a quantized checkpoint, everything verified.

    Raises:
        EdgeError: the folder is neither, or a file is damaged.
    """
    if is_bundle(folder):
        manifest = Bundle.open(folder).manifest
        files = {name: folder / name for name in (MANIFEST, *manifest.files)}
        built = sorted(path.parent for path in folder.glob(f"{ENGINES}/*/{ENGINE_RECORD}")) if engines else []
        if engines and not built:
            raise BundleError(f"{folder} has no engines; make them with internvl-edge build, or leave out --engines")
        for each in built:
            for name in sorted(engine_files(each) - {*RUNTIME_CACHES.values()}):
                files[f"{ENGINES}/{each.name}/{name}"] = each / name
        return _Contents(BUNDLE, files, manifest, tuple(each.name for each in built))
    if engines:
        raise EdgeError(f"{folder} is no bundle, so it has no engines; leave out --engines")
    if not folder.is_dir() or read_record(folder) is None:
        raise CheckpointError(
            f"{folder} is neither a bundle nor a checkpoint that quantize made; give one, or use hf upload"
        )
    names = sorted(quantized_files(folder) - {*REPORTS, CARD})
    return _Contents(CHECKPOINT, {name: folder / name for name in names if (folder / name).is_file()})


def _prepared(api: Any, repo: str, revision: str | None, private: bool, kind: Kind) -> tuple[str, set[str]]:
    """Make repository and branch where they are missing; return the last commit and its files.

    Raises:
        EdgeError: the repository is public although it should be private, or holds the other kind.
    """
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo).private:
        raise kind.error(f"{repo} is public, and --private was given; nothing was uploaded; make it private first")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    info = api.repo_info(repo, revision=revision)
    present = {sibling.rfilename for sibling in info.siblings or ()}
    other = MANIFEST in present if kind is CHECKPOINT else "config.json" in present
    if other:
        found = "a bundle" if kind is CHECKPOINT else "a checkpoint"
        raise kind.error(f"{repo} holds {found}, and this is a {kind.name}; give another repository or --revision")
    return str(info.sha), present


def _stale(contents: _Contents, present: set[str]) -> list[str]:
    """List weight files of an earlier checkpoint, which a reader would take for a part of this one."""
    if contents.kind is not CHECKPOINT:
        return []
    top = (name for name in present if "/" not in name and name.endswith(_WEIGHTS))
    return [name for name in top if name not in contents.files]


def _commit(
    api: Any,
    repo: str,
    revision: str | None,
    message: str,
    files: Mapping[str, Path | bytes],
    removed: tuple[str, ...] = (),
) -> str:
    """Upload files in one commit; return it, or the last one where nothing changed."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in removed]
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=source) for name, source in files.items()]
    return str(api.create_commit(repo, operations, commit_message=message, revision=revision).oid)


def _pinned(api: Any, repo: str, commit: str, present: set[str]) -> str:
    """Return the commit that the present card pins, which holds the same files; the last one without such a card."""
    if CARD not in present:
        return commit
    text = Path(api.hf_hub_download(repo, CARD, revision=commit)).read_text(encoding="utf-8", errors="replace")
    found = _PINNED.search(text)
    return found[1] if found else commit
