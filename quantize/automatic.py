"""Choose a precision for each linear of the decoder from its measured sensitivity, and give the reason in words."""

from __future__ import annotations

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.progress import Progress
from internvl_edge.calibration.compute import Compute
from internvl_edge.calibration.dataset import CalibrationSet
from internvl_edge.calibration.work import WorkFolder
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.recipe.recipe import Automatic, Precision, Recipe

from .choose import Option, choose_for_cost, choose_for_divergence
from .layer import BlockQuantizer
from .output import OutputLayout
from .plan import Choice, Plan, fixed_bits, free_units, stored_bits, weight_count
from .sensitivity import DecoderSensitivity, Divergences

# Phases of the progress that `measure_divergences` shows.
DIVERGENCE_PHASES = 2


def measure_divergences(
    work: WorkFolder,
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    compute: Compute,
    recipe: Recipe,
    plan: Plan,
    progress: Progress,
) -> Divergences:
    """Measure the divergence that each candidate precision of a recipe causes in each unit. A killed run continues.

    Raises:
        EdgeError: activations are not finite.
    """
    dtype = OutputLayout(checkpoint, recipe).scale_dtype
    quantizers = {
        precision: BlockQuantizer(checkpoint, recipe, compute, dtype, dict.fromkeys(plan, Choice(precision)))
        for precision in recipe.candidates
        if precision.scheme is not None
    }
    return DecoderSensitivity(work, checkpoint, calibration, compute, quantizers).run(progress)


def plan_by_divergence(checkpoint: Checkpoint, recipe: Recipe, plan: Plan, divergences: Divergences) -> Plan:
    """Return the plan that follows from the recipe's own and the measured divergences.

    A unit stays as the recipe says if a pattern of the recipe decides any of its linears. Its bits still count.

    Raises:
        EdgeError: the limit of the divergence cannot be met with the candidate precisions.
    """
    assert recipe.choice is not None
    free = {unit[0]: unit for unit in free_units(checkpoint, plan)}
    cost = stored_bits if recipe.choice.target_bits is not None else _bits_with_inputs
    options = {
        first: [
            Option(str(precision), cost(checkpoint, unit, precision), divergences[first].get(str(precision), 0.0))
            for precision in recipe.candidates
        ]
        for first, unit in free.items()
    }
    weights = sum(weight_count(checkpoint, name) for name in plan)
    picked = _pick(options, recipe.choice, fixed_bits(checkpoint, plan), weights)
    base = str(recipe.base)
    found = {
        name: Choice(
            recipe.precision(option.precision),
            _reason(options[first], option, base, recipe.choice),
            option.divergence * _share(checkpoint, name, free[first]),
        )
        for first, option in picked.items()
        for name in free[first]
    }
    return plan | found


def average_bits(checkpoint: Checkpoint, plan: Plan) -> float:
    """Return the bits per weight of the decoder's layers, including zero points and 16-bit scales."""
    bits = sum(stored_bits(checkpoint, [name], choice.precision) for name, choice in plan.items())
    return bits / sum(weight_count(checkpoint, name) for name in plan)


def predicted_divergence(plan: Plan) -> float | None:
    """Return the sum of the divergences that were predicted for the linears, or None where none was predicted."""
    parts = [choice.part for choice in plan.values() if choice.part is not None]
    return sum(parts) if parts else None


def _pick(options: dict[str, list[Option]], how: Automatic, fixed: float, weights: int) -> dict[str, Option]:
    if how.target_bits is not None:
        return choose_for_cost(options, how.target_bits * weights - fixed)
    assert how.max_kl is not None
    best = sum(min(option.divergence for option in each) for each in options.values())
    if best > how.max_kl:
        raise EdgeError(
            f"a divergence of {best:.1e} is predicted for the best of the precisions to choose from, --max-kl asks for "
            f"{how.max_kl:g}; let it choose fp as well"
        )
    return choose_for_divergence(options, how.max_kl)


def _reason(options: list[Option], chosen: Option, base: str, how: Automatic) -> str:
    """Return one line: what the chosen option adds, and what the recipe's own scheme or the next better one would."""
    adds = f"adds {chosen.divergence:.1e} nats"
    if chosen.precision != base:
        plain = next((option for option in options if option.precision == base), None)
        return f"{adds}; {base} would add {plain.divergence:.1e}" if plain else adds
    better = [option for option in options if option.divergence < chosen.divergence]
    if not better:
        return adds
    step = min(better, key=lambda option: option.cost)
    why = "the same bits take away more elsewhere" if how.target_bits is not None else "the limit is kept without"
    return f"{adds}; {step.precision} would take away {chosen.divergence - step.divergence:.1e}, {why}"


def _bits_with_inputs(checkpoint: Checkpoint, names: list[str], precision: Precision) -> float:
    """Return `stored_bits` plus the bits of the inputs that each weight is multiplied by.

    The inputs' bits are what distinguishes w8a8 from w8a16.
    """
    inputs = 8 if precision.scheme is not None and precision.scheme.static_inputs else 16
    weights = sum(weight_count(checkpoint, name) for name in names)
    return stored_bits(checkpoint, names, precision) + inputs * weights


def _share(checkpoint: Checkpoint, name: str, unit: list[str]) -> float:
    """Return the share of a linear in the weights of its unit."""
    return weight_count(checkpoint, name) / sum(weight_count(checkpoint, each) for each in unit)
