"""The table of devices that `plan` predicts for and `build` builds for.

The shipped table is `devices.toml`. Entries of ~/.config/internvl-edge/devices.toml, and then of a file that the user
gives, are added to it and replace entries of the same name. This module knows numbers and names. It does not access a
GPU.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from internvl_edge.base import toml
from internvl_edge.base.errors import EdgeError
from internvl_edge.base.json_files import FILE_BYTES, read_bytes
from internvl_edge.base.text import PLAIN_NAME, is_plain_name, shown
from internvl_edge.base.user_folders import config_folder

FLAVOURS = ("tensorrt", "tensorrt_rtx")
_CAPABILITY = re.compile(r"\d{1,2}\.\d")
# Estimated bytes of memory that others use: the system (0.6 to 0.9 GiB on a board without a desktop, by the sources in
# devices.toml), the CUDA context, and the libraries and the process itself.
_RESERVED_UNIFIED = 1.5 * 2**30
_RESERVED_DISCRETE = 0.6 * 2**30
# Fields of an entry that may be missing.
_OPTIONAL = ("reported_mib",)
# Above what any device has, in the units of the table.
_LARGEST_NUMBER = 1e9


class DeviceError(EdgeError):
    """A device is not known, or a table of devices cannot be used."""


@dataclass(frozen=True)
class Device:
    """One device. Its fields are those of the table (see the comments in `devices.toml`).

    `compute_capability` is text such as "8.7". `memory_gib` is in 2**30 bytes, and `bandwidth_gbs` in 1e9 bytes/s.
    `tflops` and `int8_tops` are dense tensor operations in 1e12/s. `reported_mib` is in 2**20 bytes, 0 where unknown.
    """

    name: str
    title: str
    compute_capability: str
    memory_gib: float
    unified: bool
    bandwidth_gbs: float
    tflops: float
    int8_tops: float
    flavour: str
    versions: str
    reported_mib: float = 0

    @property
    def sm(self) -> int:
        """The compute capability as one number: 87 for 8.7, 120 for 12.0."""
        return sm(self.compute_capability)

    @property
    def memory(self) -> int:
        """The nominal memory in bytes."""
        return int(self.memory_gib * 2**30)

    @property
    def usable_memory(self) -> int:
        """The estimated bytes that are available for a model."""
        seen = min(self.reported_mib * 2**20 or self.memory, self.memory)
        return int(seen - (_RESERVED_UNIFIED if self.unified else _RESERVED_DISCRETE))

    @property
    def formats(self) -> tuple[str, ...]:
        """The number formats that its tensor cores support."""
        return formats(self.sm)


@dataclass(frozen=True)
class Target:
    """The target of one engine file: a device, or a group of devices that can share the file.

    `usable_memory` is the estimated bytes for a model on its smallest known device, 0 where none is known.
    """

    name: str
    title: str
    flavour: str
    compute_capabilities: tuple[str, ...]
    usable_memory: int = 0

    @property
    def sms(self) -> tuple[int, ...]:
        """The compute capabilities as numbers, such as 87 for 8.7."""
        return tuple(sm(capability) for capability in self.compute_capabilities)

    @property
    def dtype(self) -> str:
        """The type that engines compute in: bfloat16 where all its devices support it, otherwise float16."""
        return "bfloat16" if min(self.sms) >= 80 else "float16"


def sm(compute_capability: str) -> int:
    """Return a compute capability as one number: 87 for "8.7", 120 for "12.0"."""
    major, _, minor = compute_capability.partition(".")
    return 10 * int(major) + int(minor)


def formats(sm: int) -> tuple[str, ...]:
    """Return the number formats of a compute capability (87 for 8.7), from the vendor's tables."""
    first = {"fp16": 0, "int8": 0, "int4": 0, "bf16": 80, "fp8": 89, "fp4": 100}
    return tuple(name for name, since in first.items() if sm >= since)


class Devices:
    """The known devices by name, those of the user included.

    Args:
        extra: a table that the user gives. It is added to the shipped and the configured table.

    Raises:
        DeviceError: a table is missing or damaged. The message names the file, the entry and the field.
    """

    def __init__(self, extra: Path | None = None) -> None:
        self._tables = [_parse(files(__package__).joinpath("devices.toml").read_text("utf-8"), "devices.toml")]
        settings = config_folder()
        configured = settings / "devices.toml" if settings else None
        for path in [*([configured] if configured and configured.is_file() else []), *([extra] if extra else [])]:
            self._tables.append(_parse(_read_text(path), str(path)))

    @cached_property
    def all(self) -> dict[str, Device]:
        """All devices by name, in the order of the tables."""
        return {name: device for devices, _, _ in self._tables for name, device in devices.items()}

    @cached_property
    def groups(self) -> dict[str, Target]:
        """All groups of devices that share one engine file, by name."""
        return {name: group for _, groups, _ in self._tables for name, group in groups.items()}

    @cached_property
    def families(self) -> dict[str, list[str]]:
        """The names of the devices of each family, such as all Jetson Orin, those of the user included."""
        patterns = {name: family for _, _, families in self._tables for name, family in families.items()}
        return {
            name: [device for device in self.all if any(fnmatchcase(device, pattern) for pattern in family)]
            for name, family in patterns.items()
        }

    def device(self, name: str) -> Device:
        """Return one device. Raise DeviceError, with similar names, where there is no such device."""
        if name not in self.all:
            raise DeviceError(self._unknown(name, list(self.all)))
        return self.all[name]

    def family(self, name: str) -> list[Device]:
        """Return the device of this name, or the devices of a family. Raise DeviceError as `device` does."""
        if name in self.all or name not in self.families:
            if name not in self.all:
                raise DeviceError(self._unknown(name, [*self.families, *self.all]))
            return [self.all[name]]
        return [self.all[member] for member in self.families[name]]

    def target(self, name: str) -> Target:
        """Return the target of this name, a group or a device. Raise DeviceError as `device` does."""
        if name in self.groups:
            return self._with_memory(self.groups[name])
        if name in self.families:
            members = ", ".join(self.families[name])
            raise DeviceError(f"{name} is a family, and its devices need engines of their own; choose one of {members}")
        if name not in self.all:
            raise DeviceError(self._unknown(name, [*self.groups, *self.all]))
        device = self.all[name]
        return Target(name, device.title, device.flavour, (device.compute_capability,), device.usable_memory)

    def _with_memory(self, group: Target) -> Target:
        members = [d for d in self.all.values() if d.flavour == group.flavour and d.sm in group.sms]
        return replace(group, usable_memory=min((device.usable_memory for device in members), default=0))

    @staticmethod
    def _unknown(name: str, names: list[str]) -> str:
        near = get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return f"device {shown(name)} is not known; {hint}see internvl-edge devices, or add it with --devices FILE"


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, DeviceError, "expected a table of devices", limit=FILE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DeviceError(f"{path} is not UTF-8 ({error}), expected a table of devices") from None


def _parse(text: str, where: str) -> tuple[dict[str, Device], dict[str, Target], dict[str, list[str]]]:
    values = toml.parse(text, where, DeviceError)
    if unknown := set(values) - {"devices", "groups", "families"}:
        raise DeviceError(f"{where}: table {shown(sorted(unknown)[0])} is not known, expected [devices.NAME]")
    for table in ("devices", "groups"):
        if not isinstance(names := values.get(table, {}), dict):
            raise DeviceError(f"{where}: {table} is {shown(names)}, expected tables [{table}.NAME]")
        for name in names:
            if not is_plain_name(name):
                raise DeviceError(f"{where}: {table}: the name {shown(name)} is not of {PLAIN_NAME}")
    devices = {name: _device(name, entry, where) for name, entry in values.get("devices", {}).items()}
    groups = {name: _group(name, entry, where) for name, entry in values.get("groups", {}).items()}
    families = values.get("families", {})
    if not isinstance(families, dict) or not all(map(_is_family, families.values())):
        raise DeviceError(f'{where}: families is no table of name = ["device", "pattern-*", ...]')
    return devices, groups, families


def _is_family(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(pattern, str) for pattern in value)


def _device(name: str, entry: Any, where: str) -> Device:
    expected = {field.name: field.type for field in fields(Device) if field.name not in ("name", *_OPTIONAL)}
    if not isinstance(entry, dict):
        raise DeviceError(f"{where}: {name} is no table, expected [devices.{name}] with {', '.join(expected)}")
    given = {field.name: field.type for field in fields(Device) if field.name in _OPTIONAL and field.name in entry}
    for field in sorted(expected.keys() ^ (entry.keys() - given.keys())):
        state = "missing" if field in expected else "not known"
        raise DeviceError(f"{where}: devices.{name}: {field} is {state}, expected {', '.join(expected)}")
    for field, kind in (expected | given).items():
        if not _is(kind, entry[field]):
            wanted = {"str": "text", "bool": "true or false", "float": "a positive number"}[str(kind)]
            raise DeviceError(f"{where}: devices.{name}: {field} is {shown(entry[field])}, expected {wanted}")
    if entry["flavour"] not in FLAVOURS:
        raise DeviceError(
            f"{where}: devices.{name}: flavour is {shown(entry['flavour'])}, expected {' or '.join(FLAVOURS)}"
        )
    if not _CAPABILITY.fullmatch(entry["compute_capability"]):
        raise DeviceError(
            f"{where}: devices.{name}: compute_capability is {shown(entry['compute_capability'])}, "
            "expected text like '8.7'"
        )
    return Device(name=name, **entry)


def _group(name: str, entry: Any, where: str) -> Target:
    expected: dict[str, type[Any]] = {"compute_capabilities": list, "title": str, "flavour": str}
    if not isinstance(entry, dict):
        raise DeviceError(f"{where}: {name} is no table, expected [groups.{name}] with {', '.join(expected)}")
    for field, kind in expected.items():
        if not isinstance(entry.get(field), kind):
            raise DeviceError(f"{where}: groups.{name} has no usable {field!r}")
    if unknown := sorted(entry.keys() - expected.keys()):
        raise DeviceError(f"{where}: groups.{name}: {shown(unknown[0])} is not known, expected {', '.join(expected)}")
    capabilities = tuple(map(str, entry["compute_capabilities"]))
    group = Target(name, entry["title"], entry["flavour"], capabilities)
    if group.flavour not in FLAVOURS or not capabilities or not all(map(_CAPABILITY.fullmatch, capabilities)):
        raise DeviceError(
            f"{where}: groups.{name}: expected a flavour of {', '.join(FLAVOURS)} and capabilities like '8.6'"
        )
    return group


def _is(kind: Any, value: Any) -> bool:
    if kind == "float":
        real = isinstance(value, int | float) and not isinstance(value, bool)
        return real and math.isfinite(value) and 0 < value <= _LARGEST_NUMBER
    return isinstance(value, {"str": str, "bool": bool}[kind])
