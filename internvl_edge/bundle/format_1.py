"""Convert manifests of format 1 to values of format 2.

Format 1 describes the storage of linears as text and counts. Where the decoder's layers have one scheme, as in nearly
all bundles of format 1, the scheme of each linear follows from this. Where they have several schemes, the counts are
correct, but the scheme of a single linear is not known: the schemes are assigned in the order of the layers. No code
depends on which linear has which scheme.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import chain, repeat
from typing import Any

from internvl_edge.base.jsonable import decode, encode
from internvl_edge.checkpoint.layouts import linear_names
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.limits import require_possible
from internvl_edge.model.linear import W8A8, Scheme

_SCHEME = re.compile(
    r"int(?P<bits>\d) (per output|in groups of (?P<group>\d+)), (?P<zeros>symmetric|with zero points)"
    r"(?P<inputs>, int8 inputs)?"
)
_HEAD = "decoder.lm_head"


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of format 2 that are equal to values of format 1.

    Raises:
        ValueError: the values are not of format 1.
    """
    quantization, tower = values.get("quantization"), values.pop("vision_quantization", None)
    config = decode(ModelConfig, values.get("model"), strict=True)
    require_possible(config)
    linears = _decoder_linears(quantization, config) | _tower_linears(tower, config)
    values |= {
        "tokens": {**_object(values, "tokens"), "stop": [_object(values, "tokens").get("stop")]},
        "linears": encode(linears),
        "token_table": values.get("token_table") or values.get("dtype"),
        "components": [_component(part, str(values.get("dtype"))) for part in values.get("components") or ()],
        "quality": _quality(values.get("quality")),
    }
    if quantization is not None:
        values["quantization"] = {name: quantization[name] for name in ("method", "bits_per_weight", "weight_error")}
    return values


def _decoder_linears(quantization: Any, config: ModelConfig) -> dict[str, Scheme]:
    if quantization is None:
        return {}
    counts = Counter({_scheme(text): int(count) for text, count in _object(quantization, "linears").items()})
    found = {}
    if _SCHEME.fullmatch(str(quantization.get("lm_head"))):
        found[_HEAD] = _scheme(quantization["lm_head"])
        counts[found[_HEAD]] -= 1
    schemes = chain.from_iterable(repeat(scheme, count) for scheme, count in counts.items())
    return dict(zip(linear_names(config, "decoder.layers."), schemes, strict=False)) | found


def _tower_linears(tower: Any, config: ModelConfig) -> dict[str, Scheme]:
    if tower is None:
        return {}
    floats = set(tower["floats"])
    return {name: W8A8 for name in linear_names(config, "vision.", "projector.") if name not in floats}


def _scheme(text: str) -> Scheme:
    found = _SCHEME.fullmatch(text)
    if found is None:
        raise ValueError(f"quantization: {text!r} is no scheme")
    group = int(found["group"]) if found["group"] else None
    return Scheme(int(found["bits"]), group, found["zeros"] == "symmetric", bool(found["inputs"]))


def _component(part: Any, dtype: str) -> dict[str, Any]:
    stored = [
        {"linears": count, "dtype": dtype, "scheme": encode(_scheme(text)) if _SCHEME.fullmatch(text) else None}
        for text, count in _object(part, "stored").items()
    ]
    return {**part, "stored": stored}


def _quality(values: Any) -> Any:
    """Rename the fields of `measured`, whose names differed between a suite and a comparison in format 1."""
    if not isinstance(values, dict) or not isinstance(values.get("measured"), dict):
        return values
    renamed = {"cases": "questions", "suite": "data"}
    measured = {
        kind: {renamed.get(name, name): value for name, value in how.items()}
        for kind, how in values["measured"].items()
        if isinstance(how, dict)
    }
    return {**values, "measured": measured}


def _object(values: Any, name: str) -> Mapping[str, Any]:
    found = values.get(name) if isinstance(values, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{name} is {found!r}, expected an object")
    return found
