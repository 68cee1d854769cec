"""Choose recipe, context and dialect for a target: the first recipe that fits it, with the context that was asked for.

The presets of `recipe` are ordered for each device from the one that was made for it to smaller ones. On a CPU, the
memory of ONNX Runtime is estimated. This module knows numbers. It reads no files and measures nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.units import size
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.context import checked_context

from .devices import Device
from .footprint import Footprint, Storage
from .planner import ANSWER_TOKENS, TEXT_TOKENS, make_plan, memory_of, stored_on

# Tokens of prompt and answer that a deployment has room for where nobody says otherwise, as `plan` and `build`.
PLANNED_CONTEXT = 4096
# From the preset that was made for a kind of device to the one that needs the least memory.
_PRESETS = {"cpu": ("cpu",), "thor": ("thor", "rtx", "orin"), "rtx": ("rtx", "orin"), "orin": ("orin",)}
# Estimated bytes of a process with ONNX Runtime and a tokenizer, without weights and KV cache, and what loading holds
# beside the weights. With both, what was measured of four 1B bundles is 0 to 20 % less (tests/planning/test_choice.py).
_CPU_PROCESS = 0.4e9
_CPU_LOADING = 1.08
_CPU_TILES, _CPU_CHUNK = 1, 512
_STEP = 256


@dataclass(frozen=True)
class Target:
    """What a model is deployed on.

    Attributes:
        name: as the user gave it: a device, a group of devices, or "cpu".
        title: for people.
        device: the device to plan for, of a group the one with the least memory; None for a CPU.
        usable_memory: bytes for a model there; None where nobody knows.
    """

    name: str
    title: str
    device: Device | None
    usable_memory: int | None

    @property
    def presets(self) -> tuple[str, ...]:
        """The presets for it, in the order in which they are tried."""
        if self.device is None:
            return _PRESETS["cpu"]
        if self.device.flavour == "tensorrt_rtx":
            return _PRESETS["rtx"]
        return _PRESETS["thor" if self.device.sm >= 100 else "orin"]

    @property
    def dialects(self) -> tuple[str, ...]:
        """The decoder graphs that it needs: TensorRT reads the standard one."""
        return ("onnxruntime",) if self.device is None else ("standard",)


@dataclass(frozen=True)
class Choice:
    """What is made for a target.

    Attributes:
        recipe: the name of the recipe; of a quantized checkpoint, the name that was given for what it has.
        context: the most tokens of prompt and answer together.
        needed: bytes on the target, an estimate.
    """

    recipe: str
    context: int
    needed: int


def choose(
    config: ModelConfig,
    target: Target,
    storages: Mapping[str, Storage],
    context: int | None = None,
    others: Mapping[str, Target] | None = None,
) -> Choice:
    """Choose the first recipe that fits a target.

    Where none fits and no context was asked for, the last recipe gets the longest context that fits.

    Args:
        config: of the model.
        target: where it will run.
        storages: how the recipes store it, by name, in the order of preference.
        context: the most tokens of prompt and answer together; the default is `PLANNED_CONTEXT`, or the most that the
            model can have.
        others: further targets to name in the message where nothing fits.

    Raises:
        EdgeError: nothing fits; the message says what would.
        EngineError: the model cannot use a context of so many tokens.
    """
    capacity = checked_context(config.decoder, context, PLANNED_CONTEXT)
    for name, storage in storages.items():
        needed = needed_memory(config, target, storage, capacity)
        if target.usable_memory is None or needed <= target.usable_memory:
            return Choice(name, capacity, needed)
    longest = _longest_context(config, target, storage)
    if context is None and longest:
        return Choice(name, longest, needed_memory(config, target, storage, longest))
    fitting = [f"--context {longest} with recipe {name}"] if longest else []
    fitting += [f"--device {other}" for other in _larger(config, storage, capacity, others or {})]
    raise EdgeError(
        f"{target.title} has {size(target.usable_memory or 0)} for a model, and this one needs {size(needed)} with "
        f"recipe {name} and {capacity} tokens; what fits: {', or '.join(fitting) or 'a smaller variant of the model'}"
    )


def needed_memory(config: ModelConfig, target: Target, storage: Storage, context: int) -> int:
    """Return the bytes that a model needs on a target, an estimate."""
    if target.device:
        plan = make_plan(config, target.device, "", storage, context=context, max_tiles=config.max_tiles)
        return plan.memory.total
    return cpu_memory(config, storage, context)


def cpu_memory(config: ModelConfig, storage: Storage, context: int) -> int:
    """Estimate the resident bytes of a process that answers on a CPU with ONNX Runtime and a whole KV cache.

    ONNX Runtime widens 16-bit floats to float32 when it loads a bundle that computes in float32.
    """
    cache = 1 if storage.cache_bytes == 1 else 4
    stored = Storage(
        dtype_bytes=4,
        vector_bytes=4,
        body=storage.body,
        head=storage.head,
        vision=storage.vision,
        cache_bytes=cache,
        floats=storage.floats,
        dialect="onnxruntime",
    )
    footprint = Footprint(config, stored)
    weights = footprint.weights
    activations = 2 * footprint.activation_bytes(_CPU_TILES, _CPU_CHUNK)  # counted in 16 bits
    held = _CPU_LOADING * (weights.vision + weights.decoder + weights.head)
    return int(held + footprint.cache_bytes(context) + activations + _CPU_PROCESS)


def _longest_context(config: ModelConfig, target: Target, storage: Storage) -> int:
    """Return the longest context that fits, 0 where one has no room for a tile and an answer."""
    usable = target.usable_memory
    if usable is None:
        return 0
    most = checked_context(config.decoder, None, PLANNED_CONTEXT) // _STEP
    # The bytes grow with the context, so the first one that does not fit can be searched by halving.
    context = _STEP * bisect.bisect_right(
        range(1, most + 1), usable, key=lambda steps: _least_memory(config, target, storage, steps * _STEP)
    )
    return context if context >= config.tokens_per_tile + TEXT_TOKENS + ANSWER_TOKENS else 0


def _least_memory(config: ModelConfig, target: Target, storage: Storage, context: int) -> int:
    """Return the bytes with one program for all steps, which is what short memory gets."""
    if target.device is None:
        return cpu_memory(config, storage, context)
    flavour = target.device.flavour
    return memory_of(Footprint(config, stored_on(flavour, storage)), context, flavour).total


def _larger(config: ModelConfig, storage: Storage, context: int, others: Mapping[str, Target]) -> list[str]:
    """Return the names of at most two targets that fit, the one with the least memory first."""
    fitting = [
        (other.usable_memory, name)
        for name, other in others.items()
        if other.usable_memory is not None and needed_memory(config, other, storage, context) <= other.usable_memory
    ]
    return [name for _, name in sorted(fitting)[:2]]
