"""Turn a recipe and a checkpoint into the precision of every linear of the decoder's layers, each with its reason.

All checks that need only names and shapes are made here. This module does not know weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod

from internvl_edge.base.errors import EdgeError
from internvl_edge.checkpoint import layouts
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.components import bits_per_weight
from internvl_edge.model.linear import GROUP_SIZES
from internvl_edge.recipe.recipe import NOTHING_LEARNS, NOTHING_ROUNDED, Precision, Recipe

from .folding import SCALE_GROUPS

_LAYERS = "decoder.layers."
_TOWER = ("vision.layers.", "projector.")


@dataclass(frozen=True)
class Choice:
    """The precision of one linear.

    Attributes:
        precision: how the linear is stored.
        reason: why the precision was chosen; "" for the recipe's own scheme.
        part: the linear's share of the divergence that is predicted for the whole decoder; None where nothing was
            measured.
        fixed: True where a pattern of the recipe decided.
    """

    precision: Precision
    reason: str = ""
    part: float | None = None
    fixed: bool = False


# Canonical linear name (without `.weight`) -> its choice, for all linears of all layers.
Plan = dict[str, Choice]


def plan_decoder(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Return the plan for all linears of the decoder's layers: patterns first, then the recipe's scheme.

    It is made once, when a run begins. An automatic choice replaces what no pattern has decided.

    Raises:
        EdgeError: the checkpoint is quantized already, a pattern matches nothing (the message gives similar names) or
            quantizes a linear of the vision tower, parts of one stored tensor have different precisions, a group size
            does not divide a layer's inputs (the message names the layer and the sizes that fit), AutoAWQ cannot pack
            the outputs, lm_head is also the token table, patterns leave no linear that is quantized or none whose
            rounding is learned, or no choice has as few bits as the recipe's limit.
    """
    checkpoint.require_unquantized()
    plan: Plan = {name: Choice(recipe.base) for name in layouts.linear_names(checkpoint.config, _LAYERS)}
    for pattern, text in recipe.layers:
        precision = recipe.precision(text)
        for name in _matching(checkpoint, pattern, precision):
            if name in plan:
                plan[name] = Choice(precision, f"matches {pattern}", fixed=True)
    _require_whole_tensors(checkpoint, plan)
    possible = {name: [choice.precision, *([] if choice.fixed else recipe.candidates)] for name, choice in plan.items()}
    _require_fitting_groups(checkpoint, recipe, possible)
    if recipe.rounding == "learned" and not any(p.method.learns for each in possible.values() for p in each):
        raise EdgeError(NOTHING_LEARNS)
    floats = (recipe.lm_head, recipe.vision, recipe.kv_cache) == ("fp", "fp", "fp")
    if floats and all(p.scheme is None for each in possible.values() for p in each):
        raise EdgeError(NOTHING_ROUNDED)
    if recipe.vision == "int8":
        _require_vision(checkpoint, recipe.vision_int8.keep)
    _require_possible_bits(checkpoint, recipe, plan)
    return plan


def kept_vision(checkpoint: Checkpoint, recipe: Recipe) -> tuple[str, ...]:
    """Return those patterns of the recipe that keep linears of the vision tower or projector float."""
    tower = _tower_linears(checkpoint)
    return tuple(pattern for pattern, _ in recipe.layers if any(fnmatchcase(name, pattern) for name in tower))


def units(checkpoint: Checkpoint) -> list[list[str]]:
    """Return the linears that get one precision together: those that share an input.

    Programs fuse these linears (q, k and v; gate and up).
    """
    groups = SCALE_GROUPS[checkpoint.config.decoder.architecture]
    layers = range(checkpoint.config.decoder.num_hidden_layers)
    return [[f"{_LAYERS}{n}.{name}" for name in group.consumers] for n in layers for group in groups]


def free_units(checkpoint: Checkpoint, plan: Plan) -> list[list[str]]:
    """Return the units whose precision an automatic choice decides: those of which no pattern decides a linear."""
    return [unit for unit in units(checkpoint) if not any(plan[name].fixed for name in unit)]


def fixed_bits(checkpoint: Checkpoint, plan: Plan) -> float:
    """Return the bits of the linears that an automatic choice leaves alone."""
    free = {name for unit in free_units(checkpoint, plan) for name in unit}
    return sum(stored_bits(checkpoint, [name], plan[name].precision) for name in plan if name not in free)


def stored_bits(checkpoint: Checkpoint, names: list[str], precision: Precision) -> float:
    """Return the bits of the weights of some linears as devices hold them, with floats and scales in 16 bits."""
    total = 0.0
    for name in names:
        out, inputs = checkpoint.shapes[f"{name}.weight"]
        total += (bits_per_weight(precision.scheme, inputs, 16) if precision.scheme else 16) * out * inputs
    return total


def weight_count(checkpoint: Checkpoint, name: str) -> int:
    """Return the number of weights of a linear."""
    return prod(checkpoint.shapes[f"{name}.weight"])


def _require_possible_bits(checkpoint: Checkpoint, recipe: Recipe, plan: Plan) -> None:
    """Check that the cheapest choice is within the limit of bits: found now, not after hours of measuring."""
    if recipe.choice is None or (limit := recipe.choice.target_bits) is None:
        return
    costs = (
        min(stored_bits(checkpoint, unit, precision) for precision in recipe.candidates)
        for unit in free_units(checkpoint, plan)
    )
    lowest = (fixed_bits(checkpoint, plan) + sum(costs)) / sum(weight_count(checkpoint, name) for name in plan)
    if lowest > limit:
        raise EdgeError(
            f"the decoder's layers have at least {lowest:.3f} bits per weight with the precisions to choose from, "
            f"--target-bits asks for {limit:g}; give more, or a larger group size"
        )


def _require_vision(checkpoint: Checkpoint, patterns: tuple[str, ...]) -> None:
    """Check that each pattern of linears that stay float in an int8 tower matches one."""
    names = _tower_linears(checkpoint)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            written = ["projector.*", "vision.layers.0.*", *names]
            near = get_close_matches(pattern, written, n=3, cutoff=0.5)
            hint = f"near: {', '.join(near)}" if near else f"names are like {names[0]} and {names[-1]}"
            raise EdgeError(f"{pattern!r} matches no linear of tower and projector, to be kept as fp; {hint}")


def _require_fitting_groups(checkpoint: Checkpoint, recipe: Recipe, possible: Mapping[str, list[Precision]]) -> None:
    wanted = dict(possible)
    if recipe.lm_head != "fp":
        if checkpoint.config.decoder.tie_word_embeddings:
            raise EdgeError("lm_head is also the token table of this model and cannot be quantized; use --lm-head fp")
        wanted["decoder.lm_head"] = [recipe.head]
    grouped = {name: sizes for name, precisions in wanted.items() if (sizes := _group_sizes(precisions))}
    inputs = {name: checkpoint.shapes[f"{name}.weight"][1] for name in grouped}
    for name, sizes in grouped.items():
        for size in sizes:
            if inputs[name] % size:
                fitting = [fit for fit in GROUP_SIZES if all(width % fit == 0 for width in inputs.values())]
                choice = f"sizes that fit all layers: {', '.join(map(str, fitting))}" if fitting else "no size fits all"
                raise EdgeError(f"{name} has {inputs[name]} inputs, which groups of {size} do not divide; {choice}")
        if recipe.is_autoawq and (outputs := checkpoint.shapes[f"{name}.weight"][0]) % 8:
            raise EdgeError(f"{name} has {outputs} outputs, AutoAWQ packs multiples of 8; use --symmetric")


def _group_sizes(precisions: list[Precision]) -> list[int]:
    schemes = [precision.scheme for precision in precisions if precision.scheme is not None]
    return [scheme.group_size for scheme in schemes if scheme.group_size is not None]


def _tower_linears(checkpoint: Checkpoint) -> list[str]:
    shapes = checkpoint.shapes.items()
    return [n.removesuffix(".weight") for n, shape in shapes if n.startswith(_TOWER) and len(shape) == 2]


def _matching(checkpoint: Checkpoint, pattern: str, precision: Precision) -> list[str]:
    """Return the canonical names that a pattern matches."""
    short = {name.removeprefix("decoder."): name for name in layouts.linear_names(checkpoint.config, _LAYERS)}
    found = [name for brief, name in short.items() if fnmatchcase(brief, pattern) or fnmatchcase(name, pattern)]
    tower = [name for name in _tower_linears(checkpoint) if fnmatchcase(name, pattern)]
    if tower and precision.scheme is not None:
        raise EdgeError(
            f"{pattern!r} = {str(precision)!r} matches {tower[0]}; linears of tower and projector can only be kept as "
            "fp here, vision = int8 is for the rest"
        )
    if not found and not tower:
        raise EdgeError(_nothing(pattern, list(short)))
    return [*found, *tower]


def _nothing(pattern: str, names: list[str]) -> str:
    """Return the error message for a pattern without a match.

    The similar names in it are written as loosely as the pattern is.
    """
    if "lm_head" in pattern:
        return f"{pattern!r} matches no linear of the layers; the head has a field of its own, lm_head"
    kinds = {name.rpartition(".")[2] for name in names}
    written = [*(f"*.{kind}" for kind in sorted(kinds)), f"{names[0].rpartition('.')[0].rpartition('.')[0]}.*", *names]
    near = get_close_matches(pattern, written, n=3, cutoff=0.5)
    hint = f"near: {', '.join(near)}" if near else f"names are like {names[0]}"
    return f"{pattern!r} matches no linear of this model; {hint}"


def _require_whole_tensors(checkpoint: Checkpoint, plan: Plan) -> None:
    """Check that query, key and value have one precision where they are stored as one tensor."""
    seen: dict[str, tuple[str, Precision]] = {}
    for name, choice in plan.items():
        source = layouts.tensor_source(checkpoint.config, f"{name}.weight")
        if source.part is None:
            continue
        first, precision = seen.setdefault(source.names[0], (name, choice.precision))
        if precision != choice.precision:
            raise EdgeError(
                f"{first} would be {precision} and {name} {choice.precision}, but this checkpoint stores them as one "
                "tensor; give q_proj, k_proj and v_proj the same precision"
            )
