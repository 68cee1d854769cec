"""`internvl-edge devices`: list the devices that `plan` and `build` support."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from internvl_edge.planning.devices import Devices

from .output import print_columns, print_json


@click.command("devices")
@click.option("--devices", "table", type=click.Path(path_type=Path), help="A TOML file with more devices.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(table: Path | None, as_json: bool) -> None:
    """List the devices that plan and build support, with memory, bandwidth, TensorRT version and number formats."""
    devices = Devices(table)
    if as_json:
        every = {name: asdict(device) | {"formats": device.formats} for name, device in devices.all.items()}
        groups = {name: asdict(group) for name, group in devices.groups.items()}
        print_json({"devices": every, "groups": groups, "families": devices.families})
        return
    print_columns(
        ["name", "memory", "bandwidth", "compute", "TensorRT", "formats", "title"],
        [
            [
                device.name,
                f"{device.memory_gib:g} GiB",
                f"{device.bandwidth_gbs:g} GB/s",
                device.compute_capability,
                f"{device.flavour} {device.versions}",
                " ".join(device.formats),
                device.title,
            ]
            for device in devices.all.values()
        ],
    )
    for name, members in devices.families.items():
        click.echo(f"plan --device {name}: {len(members)} devices, {members[0]} to {members[-1]}")
    click.echo("deploy --device cpu: a CPU with the memory of this machine")
    for group in devices.groups.values():
        click.echo(f"build --device {group.name}: {group.title} ({', '.join(group.compute_capabilities)})")
