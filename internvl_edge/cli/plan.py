"""`internvl-edge plan PATH --device NAME`: predict whether a model fits a device, its speed, and what to change."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.units import size
from internvl_edge.bundle.manifest import Manifest, is_bundle
from internvl_edge.bundle.names import EMBEDDINGS
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.hub import resolve_configuration
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.context import checked_context
from internvl_edge.planning.devices import Device, Devices
from internvl_edge.planning.footprint import RECIPES, Footprint, Storage
from internvl_edge.planning.planner import TILE_LIMITS, Plan, make_plan, predict, tile_table, tiles_of
from internvl_edge.planning.storage import bundle_storage, checkpoint_storage, recipe_storage
from internvl_edge.recipe.files import make_recipe, presets, read_recipe

from .output import print_columns, print_json

DEFAULT_CONTEXT = 4096


@click.command("plan")
@click.argument("path")
@click.option(
    "--device", "name", help="Target device: a name from `internvl-edge devices`.  [default: all, in one table]"
)
@click.option("--devices", "table", type=click.Path(path_type=Path), help="A TOML file with more devices.")
@click.option(
    "--recipe",
    default="all",
    show_default=True,
    help=f"Recipe to predict for: a preset ({', '.join(presets())}), a recipe file, or one of [{'; '.join(RECIPES)}]. "
    "all compares the recipes in brackets.",
)
@click.option(
    "--max-tiles", type=click.IntRange(min=1, max=128), help="Most tiles of an image.  [default: the model's limit]"
)
@click.option(
    "--context",
    type=click.IntRange(min=2),
    default=DEFAULT_CONTEXT,
    show_default=True,
    help="Capacity of the KV cache: most tokens of prompt and answer together.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    path: str, name: str | None, table: Path | None, recipe: str, max_tiles: int | None, context: int, as_json: bool
) -> None:
    """Predict the memory and speed of PATH on a device: a bundle, a checkpoint, its config.json or a hub id.

    The prediction uses the configuration alone, so weights are not needed. Speeds are upper bounds from the device's
    bandwidth and arithmetic rate. Advice follows for a model that does not fit.
    """
    devices = Devices(table)
    chosen = [devices.device(name)] if name else list(devices.all.values())
    config, fixed, stored = _source(path)
    recipes = {"as it is": fixed} if fixed else RECIPES
    if recipe != "all":
        if fixed:
            raise EdgeError(f"{path} is quantized already; leave out --recipe, or plan the original checkpoint")
        recipes = {recipe: RECIPES.get(recipe) or recipe_storage(make_recipe(read_recipe(recipe)))}
    limit = max_tiles or config.max_tiles
    checked_context(config.decoder, context)
    plans = [
        make_plan(config, device, label, storage, context=context, max_tiles=limit)
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
    _print_plans(plans)
    if name:
        _print_details(plans[-1])
        _print_tiles(config, chosen[0], list(recipes.values())[-1])
    click.echo("Speeds are predictions: bounds from nominal bandwidth and arithmetic (roofline), not measurements.")


def _source(path: str) -> tuple[ModelConfig, Storage | None, dict[str, tuple[int, int]] | None]:
    """Return the model at a path, its storage, and the bytes by part of a bundle.

    The storage is None where any recipe can be planned, that is for a model in floats. The bytes by part are (stored,
    counted), and None where the path is not a bundle.
    """
    folder = Path(path)
    if is_bundle(folder):
        manifest = Manifest.read(folder)
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
    folder = resolve_configuration(path)
    config = read_config(folder)
    return config, checkpoint_storage(folder, config), None


def _print_plans(plans: list[Plan]) -> None:
    print_columns(
        ["device", "recipe", "weights", "KV cache", "in all", "usable", "", "first token", "tokens/s"],
        [
            [
                plan.device.name,
                plan.recipe,
                size(plan.memory.vision + plan.memory.decoder + plan.memory.head),
                size(plan.memory.kv_cache),
                size(plan.memory.total),
                size(plan.device.usable_memory),
                "fits" if plan.fits else "too large",
                f"{plan.speed.first_token_s:.2f} s",
                f"{plan.speed.decode_tokens_per_s:.0f}",
            ]
            for plan in plans
        ],
    )
    for plan in plans:
        for advice in plan.advice:
            click.echo(f"{plan.device.name}, {plan.recipe}: {advice}")


def _print_details(plan: Plan) -> None:
    click.echo(f"\n{plan.device.title}, {plan.recipe}, context {plan.context}:")
    for part, count in asdict(plan.memory).items():
        click.echo(f"  {part.replace('_', ' '):<20} {size(count):>10}")


def _print_tiles(config: ModelConfig, device: Device, storage: Storage) -> None:
    click.echo(f"\nTiles by limit (each {config.tokens_per_tile} tokens), thumbnail included:")
    print_columns(
        ["image", "pixels", *(f"max {limit}" for limit in TILE_LIMITS)],
        [[row["image"], f"{row['width']}x{row['height']}", *row["tiles"].values()] for row in tile_table(config)],
    )
    footprint = Footprint(config, storage)
    speeds = [predict(footprint, device, tiles_of(config, limit)) for limit in TILE_LIMITS]
    click.echo(f"\nAt most so fast on {device.title}, for images that use the whole limit:")
    rows: list[tuple[str, list[Any]]] = [
        ("tiles", [speed.tiles for speed in speeds]),
        ("prompt tokens", [speed.prompt_tokens for speed in speeds]),
        ("vision", [f"{speed.vision_s:.2f} s" for speed in speeds]),
        ("first token", [f"{speed.first_token_s:.2f} s" for speed in speeds]),
        ("tokens/s", [f"{speed.decode_tokens_per_s:.0f}" for speed in speeds]),
    ]
    print_columns(["limit", *(str(limit) for limit in TILE_LIMITS)], [[label, *cells] for label, cells in rows])
