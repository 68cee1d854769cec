"""Bounds for a JSON schema, so that a model that repeats itself does not fill the whole answer.

What a schema leaves open gets a bound: strings 1000 characters, keys 64, numbers 15 digits before and 9 after the point
and no exponent, arrays 256 values, objects of free keys 64 of them, values without a schema four objects and arrays
inside each other. Bounds that a schema has stay. An object with named properties has no others unless the schema
mentions `additionalProperties`. Every answer that the bounds allow is valid by the schema itself.

Parts of `allOf`, `anyOf` and `oneOf`, and references with keywords beside them, are combined by the grammar. There an
object stays open for the properties of the other parts, as the schema says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

_STRING, _KEY, _ITEMS, _PROPERTIES, _LEVELS = 1000, 64, 256, 64, 5
_NUMBER, _STEP = 10**15 - 1, 1e-9
_PREFIX = "bounded_value_"

# The grammar knows formats by their shape alone: a 30 February and a second 60 would pass.
_LEAP = "(?:0[48]|[2468][048]|[13579][26])"
_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|(?:[0-9]{{2}}{_LEAP}|{_LEAP}00)-02-29)"
)
_TIME = "[0-9]{2}:[0-9]{2}:[0-5][0-9]"
_CALENDAR = {"date": f"^{_DATE}$", "date-time": f"^{_DATE}[Tt]{_TIME}", "time": f"^{_TIME}"}

_TYPES = ("null", "boolean", "number", "string", "array", "object")
_APPLICATORS = ("allOf", "anyOf", "oneOf", "$ref")
_LITERALS = ("const", "enum")
# Keywords whose values are schemas, or lists of schemas, and those with a schema for each name.
_VALUES = ("items", "prefixItems", "additionalItems", "additionalProperties")
_MAPS = ("properties", "patternProperties")
_DEFINITIONS = ("$defs", "definitions")
# Keywords that say nothing about the value.
_SILENT = {
    *("$anchor", "$comment", "$id", "$schema", "contentEncoding", "contentMediaType", "default", "deprecated"),
    *("description", "examples", "id", "readOnly", "title", "writeOnly", *_DEFINITIONS),
}
_OBJECT = ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties")


def bounded(schema: dict[str, Any] | bool) -> dict[str, Any]:
    """Return a schema with bounds. What is no schema stays as it is, for the compiler to name."""
    root = schema if isinstance(schema, dict) else {} if schema else {"enum": []}
    walk = _Walk(root, _combined(root))
    found: dict[str, Any] = walk.bounded(root, alone=True)
    if walk.used_any:
        definitions = found.get("$defs")
        found["$defs"] = {**_any_values(), **(definitions if isinstance(definitions, dict) else {})}
    return found


def _any_values() -> dict[str, Any]:
    """Definitions of values without a schema, by the number of levels that they may have."""
    values: dict[str, Any] = {f"{_PREFIX}0": _any_value(None)}
    for level in range(1, _LEVELS):
        values[f"{_PREFIX}{level}"] = _any_value({"$ref": f"#/$defs/{_PREFIX}{level - 1}"})
    return values


def _any_value(inner: dict[str, Any] | None) -> dict[str, Any]:
    """A value without a schema, whose parts have the schema `inner`; None for a value without parts."""
    plain = {"type": ["null", "boolean", "number", "string"], **_number({}), "maxLength": _STRING}
    if inner is None:
        return plain
    return {"anyOf": [plain, {"type": "array", "items": inner, "maxItems": _ITEMS}, _free_object({}, inner)]}


def _number(schema: dict[str, Any]) -> dict[str, Any]:
    """The bounds that a number lacks."""
    lows = [schema[name] for name in ("minimum", "exclusiveMinimum") if _is_number(schema.get(name))]
    highs = [schema[name] for name in ("maximum", "exclusiveMaximum") if _is_number(schema.get(name))]
    found: dict[str, Any] = {}
    if not lows and all(high > -_NUMBER for high in highs):
        found["minimum"] = -_NUMBER
    if not highs and all(low < _NUMBER for low in lows):
        found["maximum"] = _NUMBER
    # A single number, or very close ones, need no bound, and rounding could leave none of them.
    if "multipleOf" not in schema and not (lows and highs and min(highs) - max(lows) < 1000 * _STEP):
        found["multipleOf"] = _STEP
    return found


def _free_object(schema: dict[str, Any], value: Any) -> dict[str, Any]:
    """An object whose keys nothing names, with its values and other keywords."""
    rest = {name: kept for name, kept in schema.items() if name not in ("additionalProperties", "properties")}
    most = {} if "maxProperties" in schema else {"maxProperties": max(_PROPERTIES, _size(schema, "minProperties"))}
    pattern = {"patternProperties": {f"^.{{0,{_KEY}}}$": value}, "additionalProperties": False}
    return {"type": "object", **rest, **pattern, **most}


class _Walk:
    """Bounds the schemas of one document. `combined` are the references that are combined with other schemas."""

    def __init__(self, root: dict[str, Any], combined: set[str]) -> None:
        self._combined = combined
        # A reference to a place that is no definition could be to anything.
        self._odd = any(not _is_definition(reference) for reference in combined)
        # In a part with an `$id` of its own, a reference does not lead to the definitions of the root.
        self._inline = _has_id(root, root=True)
        self.used_any = False

    def bounded(self, schema: Any, alone: bool, held: frozenset[str] = frozenset(), place: str = "#") -> Any:
        """Return a schema with bounds.

        Args:
            schema: anything that stands where a schema stands.
            alone: nothing else describes the same value, so that an object can be closed.
            held: what a schema around this one bounds for the same value: types and keywords.
            place: the JSON pointer of the root or of a definition, else "".
        """
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            return schema
        alone = alone and not self._odd and place not in self._combined
        found = dict(schema)
        for name in _DEFINITIONS:
            if isinstance(schema.get(name), dict):
                parts = schema[name].items()
                found[name] = {key: self.bounded(part, True, place=f"{place}/{name}/{key}") for key, part in parts}
        said = schema.keys() - _SILENT
        if not said:
            return found | self._any() if alone else found
        applied = [name for name in _APPLICATORS if name in schema]
        held = held | _own_bounds(schema)
        for name in applied:
            if isinstance(schema[name], list):
                sole = alone and _is_sole(schema, name)
                found[name] = [self.bounded(part, sole, held, "") for part in schema[name]]
        if said <= {*applied} or any(name in schema for name in _LITERALS):
            return found
        return self._bounded_types(schema, found, alone and not applied, held, bool(applied))

    def _bounded_types(
        self, schema: dict[str, Any], found: dict[str, Any], alone: bool, held: frozenset[str], applied: bool
    ) -> dict[str, Any]:
        types = schema.get("type", [] if applied else list(_TYPES))
        types = types if isinstance(types, list) else [types]
        if "string" in types and "string" not in held:
            found["maxLength"] = max(_STRING, 2 * _size(schema, "minLength"))
        if "string" in types and schema.get("format") in _CALENDAR:
            found.setdefault("pattern", _CALENDAR[schema["format"]])
        if "number" in types or "integer" in types:
            bounds = _number(schema).items()
            found.update({name: bound for name, bound in bounds if name not in held})
        if "number" not in types and "multipleOf" not in schema:
            found.pop("multipleOf", None)
        if "array" in types or any(name in schema for name in ("items", "prefixItems")):
            self._bound_array(schema, found, alone, held)
        if "object" in types or any(name in schema for name in _OBJECT):
            return self._bounded_object(schema, found, alone, only=types == ["object"])
        return found

    def _bound_array(self, schema: dict[str, Any], found: dict[str, Any], alone: bool, held: frozenset[str]) -> None:
        items, prefix = schema.get("items", True), schema.get("prefixItems")
        listed = items if isinstance(items, list) else prefix if isinstance(prefix, list) else []
        for name in ("prefixItems", "items"):
            if isinstance(schema.get(name), list):  # "items" in drafts before 2020-12
                found[name] = [self._part(part, alone) for part in schema[name]]
        rest = "additionalItems" if isinstance(items, list) else "items"
        found[rest] = self._part(schema.get(rest, True), alone)
        if "array" not in held:
            found["maxItems"] = max(_ITEMS, 2 * _size(schema, "minItems"), len(listed))

    def _bounded_object(self, schema: dict[str, Any], found: dict[str, Any], alone: bool, only: bool) -> dict[str, Any]:
        for name in ("properties", "patternProperties"):
            if isinstance(schema.get(name), dict):
                found[name] = {key: self._part(part, alone) for key, part in schema[name].items()}
        named = any(schema.get(name) for name in ("properties", "patternProperties", "required"))
        if "additionalProperties" in schema:
            found["additionalProperties"] = self._part(schema["additionalProperties"], alone)
        elif alone:
            found["additionalProperties"] = False if named and not _requires_unnamed(schema) else self._any()
        free = found.get("additionalProperties", False)
        return _free_object(found, free) if alone and only and not named and free is not False else found

    def _part(self, schema: Any, alone: bool) -> Any:
        """Bound the schema of a part of a value."""
        return self.bounded(schema, alone, place="")

    def _any(self) -> dict[str, Any]:
        if self._inline:
            return _any_value(_any_value(_any_value(None)))
        self.used_any = True
        return {"$ref": f"#/$defs/{_PREFIX}{_LEVELS - 1}"}


def _own_bounds(schema: dict[str, Any]) -> frozenset[str]:
    """What a schema itself bounds: types, and the keywords of numbers."""
    own = {"multipleOf"} & schema.keys()
    own |= {"string"} if "maxLength" in schema else set()
    own |= {"array"} if "maxItems" in schema else set()
    own |= {"minimum"} if {"minimum", "exclusiveMinimum"} & schema.keys() else set()
    own |= {"maximum"} if {"maximum", "exclusiveMaximum"} & schema.keys() else set()
    if any(name in schema for name in _LITERALS):
        own |= {"string", "array", "minimum", "maximum", "multipleOf"}
    return frozenset(own)


def _is_sole(schema: dict[str, Any], name: str) -> bool:
    """Whether the parts of an applicator are all that describes a value."""
    others = schema.keys() - _SILENT - {name, "type"}
    return not others and (name != "allOf" or len(schema[name]) == 1)


def _combined(root: dict[str, Any]) -> set[str]:
    """References whose schema is combined with another one, directly or through other references."""
    found: set[str] = set()
    while True:
        more = {reference for reference, alone in _references(root, True, found, "#") if not alone} | found
        if more == found:
            return found
        found = more


def _references(schema: Any, alone: bool, combined: set[str], place: str) -> Iterator[tuple[str, bool]]:
    """Each reference in a schema, and whether nothing else describes the same value."""
    if not isinstance(schema, dict):
        return
    alone = alone and place not in combined
    if isinstance(schema.get("$ref"), str):
        yield schema["$ref"], alone and _is_sole(schema, "$ref")
    for name, value in schema.items():
        if name in _DEFINITIONS and isinstance(value, dict):
            for key, part in value.items():
                yield from _references(part, True, combined, f"{place}/{name}/{key}")
        elif name in _APPLICATORS or name in _VALUES or name in _MAPS:
            sole = alone and (name not in _APPLICATORS or _is_sole(schema, name))
            parts = value.values() if name in _MAPS and isinstance(value, dict) else value
            for part in [parts] if isinstance(parts, dict) else parts if isinstance(parts, Iterable) else []:
                yield from _references(part, sole, combined, "")


def _has_id(values: Any, root: bool = False) -> bool:
    """Whether a part of a schema, or anything that looks like one, has an `$id`."""
    if isinstance(values, dict):
        return ("$id" in values and not root) or any(map(_has_id, values.values()))
    return isinstance(values, list) and any(map(_has_id, values))


def _is_definition(reference: str) -> bool:
    return reference == "#" or reference.startswith(tuple(f"#/{name}/" for name in _DEFINITIONS))


def _requires_unnamed(schema: dict[str, Any]) -> bool:
    """Whether a required property is none of those that the schema names; then it is an additional one."""
    required, named = schema.get("required"), schema.get("properties")
    return isinstance(required, list) and any(name not in (named or {}) for name in required)


def _size(schema: dict[str, Any], name: str) -> int:
    value = schema.get(name, 0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
