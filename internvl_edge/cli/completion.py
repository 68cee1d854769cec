"""What a shell can complete beyond file names: recipes, devices, schemes and metrics.

click writes the scripts for the shells (README, "Shell completion"). A function here gets the beginning of a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from internvl_edge.planning.devices import Devices

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def of(names: Iterable[str], files: bool = False) -> Complete:
    """Complete fixed names, and file names where `files` says so."""
    return lambda context, parameter, start: _items(names, start, files)


def recipes(context: click.Context, parameter: click.Parameter, start: str) -> list[CompletionItem]:
    """Complete presets and recipe files."""
    from internvl_edge.recipe.files import presets

    return _items(presets(), start, files=True)


def planned_recipes(context: click.Context, parameter: click.Parameter, start: str) -> list[CompletionItem]:
    """Complete what `plan --recipe` takes: also the storage types of its table."""
    from internvl_edge.planning.footprint import RECIPES
    from internvl_edge.recipe.files import presets

    return _items(["all", *presets(), *RECIPES], start, files=True)


def devices(context: click.Context, parameter: click.Parameter, start: str) -> list[CompletionItem]:
    """Complete devices and their families, those of the user included."""
    return _items([*_devices(context).families, *_devices(context).all], start)


def targets(context: click.Context, parameter: click.Parameter, start: str) -> list[CompletionItem]:
    """Complete what `build` builds for: groups of devices, and devices."""
    return _items([*_devices(context).groups, *_devices(context).all], start)


def deployment_targets(context: click.Context, parameter: click.Parameter, start: str) -> list[CompletionItem]:
    """Complete what `deploy` deploys on: a CPU, groups of devices, and devices."""
    return _items(["cpu", *_devices(context).groups, *_devices(context).all], start)


def _devices(context: click.Context) -> Devices:
    from internvl_edge.planning.devices import DeviceError, Devices

    extra = context.params.get("table")
    try:
        return Devices(Path(extra) if extra else None)
    except DeviceError:  # the command itself will say what is wrong with the file
        return Devices()


def _items(names: Iterable[str], start: str, files: bool = False) -> list[CompletionItem]:
    found = [CompletionItem(name) for name in dict.fromkeys(names) if name.startswith(start)]
    return found or ([CompletionItem(start, type="file")] if files else [])
