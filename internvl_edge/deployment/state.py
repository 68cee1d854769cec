"""Which stages of a deployment are done: `deployment.json` in its folder.

A stage is named by what determines its result. It counts as done where this is the same as before, and where what it
made is still there. A process that was killed after a stage's folder appeared, and before that was noted, has done the
stage: the entry that the stage left when it began says what was there before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.files import replace_text, unshared_name
from internvl_edge.base.json_files import read_object
from internvl_edge.base.jsonable import decode, dumps, encode
from internvl_edge.base.text import shown

STATE = "deployment.json"
_FORMAT_VERSION = 1
_AGAIN = "give another --output"


@dataclass(frozen=True)
class StageEntry:
    """One stage.

    Attributes:
        inputs: all that determines the result, as JSON values.
        before: identity of what was in the place of the result when the stage began; "" for nothing.
        made: identity of the result; "" while the stage has not ended.
        seconds: how long the stage took.
        values: what later stages need of the result, as JSON values.
    """

    inputs: dict[str, Any]
    before: str = ""
    made: str = ""
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """The content of the file.

    Attributes:
        checkpoint: the hub id, or the name of the folder.
        revision, device: as the user gave them.
        commit: the commit of a hub id, which stays the same in later starts; "" for a folder.
        stages: by name.
    """

    checkpoint: str
    revision: str
    device: str
    commit: str = ""
    stages: dict[str, StageEntry] = field(default_factory=dict)


class StateFile:
    """The state in a folder. Every change is on the disk before the next step."""

    def __init__(self, folder: Path, checkpoint: str, revision: str | None, device: str, force: bool) -> None:
        """Open the state of a folder, or begin one.

        Raises:
            EdgeError: the folder holds something else, damaged state, or, without `force`, another deployment.
        """
        self._path, self._force = folder / STATE, force
        source = Path(checkpoint)
        wanted = State(source.resolve().name if source.exists() else checkpoint, revision or "", device)
        found = _read(self._path)
        if found is None:
            if folder.exists() and not (folder.is_dir() and set(os.listdir(folder)) <= {unshared_name(self._path)}):
                raise EdgeError(f"{folder} exists and is no deployment: no {STATE} in it; {_AGAIN}")
            folder.mkdir(parents=True, exist_ok=True)
        elif (found.checkpoint, found.revision, found.device) == (wanted.checkpoint, wanted.revision, device):
            wanted = found
        elif force:
            wanted = replace(wanted, stages=found.stages)
        else:
            raise EdgeError(
                f"{folder} is the deployment of {found.checkpoint}{_at(found.revision)} for {found.device}; {_AGAIN}, "
                "or pass --force to replace it"
            )
        self.state = wanted
        self._write()

    def note_commit(self, commit: str) -> None:
        """Keep the commit of a hub id, so that a later start takes the same one."""
        self.state = replace(self.state, commit=commit)
        self._write()

    def done(self, name: str, inputs: Mapping[str, Any], present: Callable[[], str]) -> StageEntry | None:
        """Return the entry of a stage that need not be done again, None where it has to be done.

        Its `made` is "" where the process was killed after the result appeared whole, and before it was noted.

        Args:
            name: of the stage.
            inputs: all that determines its result, as JSON values.
            present: returns the identity of what is in the place of the result now, "" for nothing.
        """
        entry = self.state.stages.get(name)
        if entry is None or entry.inputs != encode(inputs):
            return None
        identity = present()
        if entry.made:
            return entry if identity == entry.made else None
        return entry if identity and identity != entry.before else None

    def begin(self, name: str, inputs: Mapping[str, Any], before: str) -> bool:
        """Note that a stage begins, and what is in the place of its result; later stages have to be done again.

        Returns:
            Whether an earlier start began it with the same inputs, so that its unfinished work can be continued.

        Raises:
            EdgeError: an earlier start did or began it with other inputs, and the deployment may not be replaced.
        """
        entry, wanted = self.state.stages.get(name), encode(inputs)
        if entry and entry.inputs != wanted and not self._force:
            other = sorted(key for key in {**entry.inputs, **wanted} if entry.inputs.get(key) != wanted.get(key))
            raise EdgeError(
                f"{self._path.parent} was made with another {', '.join(other)}; repeat its options, {_AGAIN}, or pass "
                "--force to make it again"
            )
        names = list(self.state.stages)
        kept = names[: names.index(name)] if name in names else names
        self.state = replace(self.state, stages={each: self.state.stages[each] for each in kept})
        self._set(name, StageEntry(wanted, before))
        return entry is not None and entry.inputs == wanted

    def end(self, name: str, made: str, seconds: float, values: Mapping[str, Any] | None = None) -> StageEntry:
        """Note what a stage made."""
        entry = replace(self.state.stages[name], made=made, seconds=round(seconds, 2), values=dict(values or {}))
        self._set(name, entry)
        return entry

    def _set(self, name: str, entry: StageEntry) -> None:
        self.state = replace(self.state, stages={**self.state.stages, name: entry})
        self._write()

    def _write(self) -> None:
        replace_text(self._path, dumps({"format_version": _FORMAT_VERSION, **encode(self.state)}), shared=False)


def _read(path: Path) -> State | None:
    if not path.is_file():
        return None
    values = read_object(path, EdgeError, _AGAIN)
    version = values.pop("format_version", None)
    try:
        if version != _FORMAT_VERSION:
            raise ValueError(f"format_version is {shown(version)}, expected {_FORMAT_VERSION}")
        return decode(State, values, strict=True)
    except ValueError as error:
        raise EdgeError(f"{path} is damaged ({error}); {_AGAIN}") from None


def _at(revision: str) -> str:
    return f" at {revision}" if revision else ""
