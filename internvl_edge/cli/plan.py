"""`internvl-edge plan PATH --device NAME`: predict whether a model fits a device, its speed, and what to change."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.units import rounded, short_time, size
from internvl_edge.bundle.hub import bundle_description
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.names import EMBEDDINGS
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.hub import resolve_configuration
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.context import checked_context
from internvl_edge.planning.devices import FLAVOURS, Device, Devices
from internvl_edge.planning.footprint import RECIPES, Footprint, Storage
from internvl_edge.planning.planner import TILE_LIMITS, Plan, make_plan, predict, tile_table, tiles_of
from internvl_edge.planning.programs import MOST_ROWS
from internvl_edge.planning.storage import bundle_storage, checkpoint_storage, recipe_storage
from internvl_edge.recipe.files import make_recipe, presets, read_recipe

from . import completion
from .checkpoint_options import revision_option
from .output import print_columns, print_json

DEFAULT_CONTEXT = 4096
_GROUPS = {
    "tensorrt": "Jetson, with the TensorRT of JetPack:",
    "tensorrt_rtx": "RTX cards and workstations, with TensorRT for RTX:",
}


@click.command("plan")
@click.argument("path", type=click.Path())
@revision_option
@click.option(
    "--device",
    "name",
    shell_complete=completion.devices,
    help="Device to predict for: a name from `internvl-edge devices`, or a family (jetson, orin, rtx).  [default: all "
    "devices, in one table]",
)
@click.option("--devices", "table", type=click.Path(path_type=Path), help="A TOML file with more devices.")
@click.option(
    "--recipe",
    default="all",
    show_default=True,
    shell_complete=completion.planned_recipes,
    help=f"Recipe to predict for: a preset ({', '.join(presets())}), a recipe file, or one of [{'; '.join(RECIPES)}]. "
    "all compares the recipes in brackets.",
)
@click.option(
    "--max-tiles",
    type=click.IntRange(min=1, max=128),
    help="Maximum number of tiles per image.  [default: the model's limit]",
)
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Capacity of the KV cache: maximum number of tokens of prompt and answer together.  "
    f"[default: {DEFAULT_CONTEXT}, or the most that the model can have]",
)
@click.option(
    "--rows",
    type=click.IntRange(1, MOST_ROWS),
    default=1,
    help="Answers that are decoded together, each with a KV cache of its own.  [default: 1]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    path: str,
    revision: str | None,
    name: str | None,
    table: Path | None,
    recipe: str,
    max_tiles: int | None,
    context: int | None,
    rows: int,
    as_json: bool,
) -> None:
    """Predict the memory and speed of PATH on a device: a bundle, a checkpoint, its config.json or a hub id.

    The prediction uses the configuration alone, so weights are not needed. Speeds are upper bounds from the device's
    bandwidth and arithmetic rate. Advice follows for a model that does not fit.
    """
    devices = Devices(table)
    chosen = devices.family(name) if name else list(devices.all.values())
    config, fixed, stored = _source(path, revision)
    recipes = {"as it is": fixed} if fixed else RECIPES
    if recipe != "all":
        if fixed:
            raise EdgeError(f"{path} is quantized already; leave out --recipe, or plan the original checkpoint")
        recipes = {recipe: RECIPES.get(recipe) or recipe_storage(make_recipe(read_recipe(recipe)))}
    limit = max_tiles or config.max_tiles
    capacity = checked_context(config.decoder, context, DEFAULT_CONTEXT)
    plans = [
        make_plan(config, device, label, storage, context=capacity, max_tiles=limit, rows=rows)
        for device in chosen
        for label, storage in recipes.items()
    ]
    if as_json:
        print_json(
            {"model": asdict(config), "bundle": stored, "plans": [plan.to_dict() for plan in plans]}
            | {"tiles": tile_table(config)}
        )
        return
    if stored:
        print_columns(["bundle", "stored", "counted"], [[part, size(a), size(b)] for part, (a, b) in stored.items()])
        click.echo()
    if len(chosen) > 1:
        _print_overview(plans)
    else:
        _print_plans(plans)
        _print_details(plans[-1])
        _print_tiles(config, chosen[0], list(recipes.values())[-1], rows, capacity)
    click.echo(
        "Speeds are predictions and not measurements: upper bounds from nominal\n"
        "bandwidth and arithmetic rates (roofline)."
    )


def _source(path: str, revision: str | None) -> tuple[ModelConfig, Storage | None, dict[str, tuple[int, int]] | None]:
    """Return the model at a path, its storage, and the bytes by part of a bundle.

    The storage is None where any recipe can be planned, that is for a model in floats. The bytes by part are (stored,
    counted), and None where the path is not a bundle.
    """
    if bundle := bundle_description(path, revision):
        manifest = Manifest.read(bundle)
        storage = bundle_storage(manifest)
        counted = Footprint(manifest.model, storage).weights
        files = {name: entry.bytes for name, entry in manifest.files.items()}
        pairs = {
            "vision": ("vision.data", counted.vision),
            "decoder": ("decoder.data", counted.decoder + counted.head),
            "token table": (EMBEDDINGS, counted.embeddings),
        }
        stored = {part: (files[name], count) for part, (name, count) in pairs.items() if name in files}
        quantized = storage.body or storage.head or storage.vision or manifest.kv_cache
        # TensorRT engines hold floats in 16 bits, whatever type the bundle stores.
        return manifest.model, replace(storage, dtype_bytes=2, vector_bytes=2) if quantized else None, stored
    folder = resolve_configuration(path, revision)
    config = read_config(folder)
    return config, checkpoint_storage(folder, config), None


def _print_overview(plans: list[Plan]) -> None:
    """Print one line for each device: the recipe with the least loss that fits it."""
    best: dict[str, Plan] = {}
    for plan in plans:
        if plan.device.name not in best or (plan.fits and not best[plan.device.name].fits):
            best[plan.device.name] = plan
    shown = sorted(best.values(), key=lambda plan: FLAVOURS.index(plan.device.flavour))
    groups: dict[int, str] = {}
    for number, plan in enumerate(shown):
        if _GROUPS[plan.device.flavour] not in groups.values():
            groups[number] = _GROUPS[plan.device.flavour]
    print_columns(
        ["device", "fits with", "needs", "of", "first", _rate_heading(plans[0].rows)],
        [
            [
                plan.device.name,
                plan.recipe if plan.fits else "too large",
                _gigabytes(plan.memory.total),
                _gigabytes(plan.device.usable_memory),
                short_time(plan.speed.first_token_s),
                _rate(plan.speed.decode_tokens_per_s),
            ]
            for plan in shown
        ],
        groups,
    )
    first = shown[0]
    click.echo(
        f"GB of memory for {_contexts(first)}; time to the first token of an\n"
        f"answer about an image of {first.speed.tiles} tiles. --device NAME shows all recipes of one."
    )


def _print_plans(plans: list[Plan]) -> None:
    """Print one line for each recipe on one device, and advice."""
    device = plans[0].device
    click.echo(f"{device.title}: {size(device.usable_memory)} of {size(device.memory)} are usable")
    print_columns(
        ["recipe", "weights", "KV cache", "in all", "", "first", _rate_heading(plans[0].rows)],
        [
            [
                plan.recipe,
                size(plan.memory.vision + plan.memory.decoder + plan.memory.head),
                size(plan.memory.kv_cache),
                size(plan.memory.total),
                "fits" if plan.fits else "too large",
                short_time(plan.speed.first_token_s),
                _rate(plan.speed.decode_tokens_per_s),
            ]
            for plan in plans
        ],
    )
    advised: dict[str, list[str]] = {}
    for plan in plans:
        for advice in plan.advice:
            advised.setdefault(advice, []).append(plan.recipe)
    for advice, recipes in advised.items():
        click.echo(f"{'; '.join(recipes)}: {advice}")


def _gigabytes(count: int) -> str:
    return rounded(count / 1e9, 3)


def _rate(tokens_per_s: float) -> str:
    return "over 9999" if tokens_per_s > 9999 else rounded(tokens_per_s, 3)


def _rate_heading(rows: int) -> str:
    return "tokens/s" if rows == 1 else f"tokens/s of {rows} rows"


def _contexts(plan: Plan) -> str:
    return f"{f'{plan.rows} contexts' if plan.rows > 1 else 'a context'} of {plan.context} tokens"


def _print_details(plan: Plan) -> None:
    click.echo(f"\nMemory with {plan.recipe}, {_contexts(plan)}:")
    for part, count in asdict(plan.memory).items():
        click.echo(f"  {part.replace('_', ' '):<20} {size(count):>10}")


def _print_tiles(config: ModelConfig, device: Device, storage: Storage, answers: int, context: int) -> None:
    click.echo(f"\nTiles by limit (each {config.tokens_per_tile} tokens), thumbnail included:")
    print_columns(
        ["image", "pixels", *(f"max {limit}" for limit in TILE_LIMITS)],
        [[row["image"], f"{row['width']}x{row['height']}", *row["tiles"].values()] for row in tile_table(config)],
    )
    footprint = Footprint(config, storage)
    speeds = [predict(footprint, device, tiles_of(config, limit), answers, context) for limit in TILE_LIMITS]
    click.echo(f"\nTheoretical upper bound on {device.title} when an image uses the full tile limit:")
    rows: list[tuple[str, list[Any]]] = [
        ("tiles", [speed.tiles for speed in speeds]),
        ("prompt tokens", [speed.prompt_tokens for speed in speeds]),
        ("vision", [short_time(speed.vision_s) for speed in speeds]),
        ("first token", [short_time(speed.first_token_s) for speed in speeds]),
        (_rate_heading(answers), [_rate(speed.decode_tokens_per_s) for speed in speeds]),
    ]
    print_columns(["limit", *(str(limit) for limit in TILE_LIMITS)], [[label, *cells] for label, cells in rows])
