"""Recipes in TOML: the shipped presets (`recipes.toml`) and files of the user, read by the same code.

Values stay plain until all sources are combined, so that a single option can replace one field of a preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from internvl_edge.base import toml
from internvl_edge.base.errors import EdgeError
from internvl_edge.base.json_files import FILE_BYTES, read_bytes
from internvl_edge.base.text import shown

from .recipe import Automatic, DecoderInt8, LearnedRounding, Recipe, VisionInt8

_TABLES: dict[str, type[Any]] = {
    "vision_int8": VisionInt8,
    "decoder_int8": DecoderInt8,
    "automatic": Automatic,
    "learning": LearnedRounding,
}
_KINDS: dict[str, tuple[type[Any], ...]] = {
    "text": (str,),
    "true or false": (bool,),
    "a number": (int, float),
    "a number without a fraction": (int,),
    "a list of text": (list,),
}
_FIELD_KINDS = {
    "bool": "true or false",
    "int": "a number without a fraction",
    "float": "a number",
    "float | None": "a number",
    "tuple[str, ...]": "a list of text",
}

# What people call a preset, or look for under another name.
_MEANT = {
    "jetson": "orin (for Jetson Orin) or thor (for Jetson Thor)",
    "gpu": "rtx",
    "cuda": "rtx",
    "nvidia": "rtx, orin or thor",
    "laptop": "cpu or rtx",
    "x86": "cpu",
    "arm": "cpu",
}


def presets() -> dict[str, dict[str, Any]]:
    """Return the shipped recipes by name, as plain fields."""
    where = "recipes.toml"
    text = files(__package__).joinpath("recipes.toml").read_text("utf-8")
    return {name: _checked(values, f"{where}: {name}") for name, values in toml.parse(text, where).items()}


def read_recipe(name: str) -> dict[str, Any]:
    """Return the fields of a preset or of a recipe file, with names and kinds checked and `base` resolved.

    Args:
        name: a preset, or a path (anything with a suffix or a separator).

    Raises:
        EdgeError: no such preset or file, invalid TOML, or a field that is unknown or of another kind; file and field
            are named.
    """
    shipped = presets()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if not name or not (path.suffix or path.exists() or len(path.parts) > 1):  # "" is no name of this folder
        near = _MEANT.get(name.lower()) or " or ".join(get_close_matches(name, shipped, n=2, cutoff=0.4))
        hint = f"did you mean {near}? " if near else ""
        raise EdgeError(f"recipe {shown(name)} is not known; {hint}presets: {', '.join(shipped)}, or give a file.toml")
    if path.is_dir() or path.suffix == ".json":
        raise EdgeError(f"{path} is no recipe in TOML; README.md of a quantized checkpoint holds the one that made it")
    try:
        text = read_bytes(path, EdgeError, "expected a recipe in TOML", limit=FILE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise EdgeError(f"{path} is not UTF-8 ({error}), expected a recipe in TOML") from None
    values = toml.parse(text, str(path))
    base = values.pop("base", None)
    if base is not None and (not isinstance(base, str) or base not in shipped):
        raise EdgeError(f"{path}: base is {shown(base)}, expected one of {', '.join(shipped)}")
    return combine(shipped[base] if base else {}, _checked(values, str(path)))


def combine(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Replace fields of `base` with those of `more`. Tables are combined field by field.

    In the table of layer exceptions, fields of `more` follow those of `base`.
    """
    combined = dict(base)
    for name, value in more.items():
        table = combined.get(name)
        if isinstance(table, dict) and isinstance(value, dict):
            # A key that is given again moves to the end, because the last exception that matches a layer applies.
            value = {key: old for key, old in table.items() if key not in value} | value
        combined[name] = value
    return combined


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe that plain fields describe. `Recipe` makes its own checks.

    Raises:
        EdgeError: from `Recipe` and its parts.
    """
    made: dict[str, Any] = dict(values)
    for name, kind in _TABLES.items():
        if made.get(name) is not None:
            table = {key: tuple(value) if isinstance(value, list) else value for key, value in made[name].items()}
            made[name] = kind(**table)
    made["layers"] = tuple(made.get("layers", {}).items())
    return Recipe(**made)


def _checked(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise EdgeError(f"{where} is {shown(values)}, expected the fields of a recipe")
    for name, value in values.items():
        if name == "layers":
            _check_layers(value, where)
        elif name in _TABLES:
            _check_fields(value, _TABLES[name], f"{where}: {name}")
    plain = {name: value for name, value in values.items() if name not in (*_TABLES, "layers")}
    _check_fields(plain, Recipe, where)
    return values


def _check_layers(value: Any, where: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(precision, str) for precision in value.values()):
        raise EdgeError(f'{where}: layers is no table of pattern = precision, such as "layers.0.*" = "w8a16"')


def _check_fields(values: Any, kind: type[Any], where: str) -> None:
    if not isinstance(values, dict):
        raise EdgeError(f"{where} is {shown(values)}, expected a table")
    known = {field.name: _FIELD_KINDS.get(str(field.type), "text") for field in fields(kind)}
    for name, value in values.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise EdgeError(f"{where}: {name} is not known; {hint}")
        wanted = known[name]
        fits = isinstance(value, _KINDS[wanted]) and (wanted == "true or false") == isinstance(value, bool)
        if not fits or (isinstance(value, list) and not all(isinstance(each, str) for each in value)):
            raise EdgeError(f"{where}: {name} is {shown(value)}, expected {wanted}")
