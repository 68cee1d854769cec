"""What is to be deployed, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_edge.base import machine
from internvl_edge.base.errors import EdgeError
from internvl_edge.planning.choice import Target
from internvl_edge.planning.devices import Device, Devices
from internvl_edge.recipe.recipe import Recipe

if TYPE_CHECKING:
    from internvl_edge.calibration import DataOptions

# Bytes that the system of a machine with a CPU takes, as on a board.
_SYSTEM = 1.5 * 2**30


@dataclass(frozen=True)
class Request:
    """What is deployed, and where.

    Attributes:
        checkpoint: a folder or a hub id.
        output: the folder of the deployment.
        device: a device or a group of devices, or "cpu" for a CPU with the memory of this machine.
        revision: branch, tag or commit of a hub id; None is its main branch. The commit stays that of the first start.
        table: a TOML file with more devices.
        recipe: how to quantize; None tries the presets for the device.
        recipe_name: what messages call the recipe.
        context: the most tokens of prompt and answer together; None is 4096, or less where only less fits.
        data: calibration data; None is the built-in set.
        evaluate: whether the bundle is compared with the float checkpoint.
        force: make again what an earlier deployment in the folder made with other choices.
        command: the command that makes the reports again, for people.
    """

    checkpoint: str
    output: Path
    device: str
    revision: str | None = None
    table: Path | None = None
    recipe: Recipe | None = None
    recipe_name: str = "as given"
    context: int | None = None
    data: DataOptions | None = None
    evaluate: bool = True
    force: bool = False
    command: str = ""


def find_target(name: str, devices: Devices) -> Target:
    """Return the target of a name: a device, a group of devices, or "cpu".

    Raises:
        DeviceError: no such device, or a family, whose devices differ.
    """
    if name == "cpu":
        total = machine.memory("MemTotal")
        usable = None if total is None else int(total - _SYSTEM)
        return Target(name, "a CPU with the memory of this machine", None, usable)
    target = devices.target(name)
    members = [devices.all[name]] if name in devices.all else _members(devices, target.sms, target.flavour)
    if not members:
        raise EdgeError(f"no device of the group {name} is in the table; add one with --devices FILE")
    device = min(members, key=lambda each: each.usable_memory)
    return Target(name, target.title, device, device.usable_memory)


def _members(devices: Devices, sms: tuple[int, ...], flavour: str) -> list[Device]:
    return [device for device in devices.all.values() if device.flavour == flavour and device.sm in sms]
