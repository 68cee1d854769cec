"""Predict whether a model fits a device, how fast it can be there, and what to change, from numbers alone.

Speeds are roofline bounds: each phase takes at least the time of its operations at the nominal arithmetic rate, and at
least the time of its bytes at the nominal bandwidth. They are predictions and not measurements; real runs are slower.
`footprint` counts bytes and operations, and `devices` describes devices. This module does not read files.
"""

from __future__ import annotations

import bisect
from dataclasses import asdict, dataclass, replace
from typing import Any

from internvl_edge.base.units import size
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.preprocess import tile_grid

from .devices import Device
from .footprint import RECIPES, Footprint, Storage, builder_bytes
from .programs import Programs, fastest_programs, further_bytes, least_programs, slots_of
from .versions import keeps_int8_cache

# Image sizes of cameras, screens and scanners: label -> width, height in pixels.
IMAGE_SIZES = {
    "VGA camera": (640, 480),
    "HD camera": (1280, 720),
    "full HD camera or screen": (1920, 1080),
    "4K camera": (3840, 2160),
    "phone photo, 12 megapixels": (4032, 3024),
    "phone photo, upright": (3024, 4032),
    "square photo": (1024, 1024),
    "A4 page, 150 dpi": (1240, 1754),
    "A4 page, 300 dpi": (2480, 3508),
    "Letter page, 200 dpi": (1700, 2200),
    "till receipt": (600, 1800),
}
TILE_LIMITS = (1, 2, 4, 6, 9, 12)
# Tokens of the prompt without the image tokens: system text, question and marks.
TEXT_TOKENS = 80
ANSWER_TOKENS = 256
# Prompt tokens and tiles per call of an engine, the defaults of `build`.
PREFILL_CHUNK = 512
TILES_AT_ONCE = 4
WIDE_CACHE = "the int8 KV cache takes 16 bits: TensorRT does not list int8 tensors where the graph cuts and joins them"


@dataclass(frozen=True)
class Memory:
    """Bytes on the device. `programs`, `activations` and `workspace` are estimates; the others are counted from shapes.

    `programs` is what the programs for steps of one token hold in addition.
    """

    vision: int
    decoder: int
    head: int
    programs: int
    kv_cache: int
    activations: int
    workspace: int
    embeddings_on_disk: int

    @property
    def total(self) -> int:
        """The bytes in device memory. The token table is not part of them: its rows are read from the file."""
        weights = self.vision + self.decoder + self.head + self.programs
        return weights + self.kv_cache + self.activations + self.workspace


@dataclass(frozen=True)
class Speed:
    """A roofline prediction for one image of `tiles` tiles: bounds in seconds, and in tokens per second of all rows."""

    tiles: int
    prompt_tokens: int
    vision_s: float
    prefill_s: float
    decode_tokens_per_s: float

    @property
    def first_token_s(self) -> float:
        """The seconds to the first token."""
        return self.vision_s + self.prefill_s


@dataclass(frozen=True)
class Plan:
    """The plan of one model with one recipe on one device.

    `programs` are those that `build` gives the decoder, `rows` are the sequences that its KV cache holds side by side,
    each of `context` tokens, and `build_bytes` is the free memory that `build` needs.
    """

    device: Device
    recipe: str
    programs: Programs
    context: int
    max_tiles: int
    memory: Memory
    speed: Speed
    build_bytes: int
    advice: tuple[str, ...]
    rows: int = 1

    @property
    def fits(self) -> bool:
        """Whether the model fits the memory that the system leaves."""
        return self.memory.total <= self.device.usable_memory

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values. Times are under the key "prediction"."""
        return {
            "device": self.device.name,
            "recipe": self.recipe,
            "programs": int(self.programs),
            "build_bytes": self.build_bytes,
            "context": self.context,
            "rows": self.rows,
            "max_tiles": self.max_tiles,
            "fits": self.fits,
            "memory": asdict(self.memory) | {"total": self.memory.total, "usable": self.device.usable_memory},
            "prediction": asdict(self.speed) | {"first_token_s": self.speed.first_token_s, "method": "roofline bound"},
            "advice": list(self.advice),
        }


def make_plan(
    config: ModelConfig, device: Device, recipe: str, storage: Storage, *, context: int, max_tiles: int, rows: int = 1
) -> Plan:
    """Plan one model on one device.

    Args:
        config: the configuration of the model.
        device: the device to run on.
        recipe: the name of `storage` in the output.
        storage: how weights and KV cache are stored.
        context: the most tokens of prompt and answer together.
        max_tiles: the most tiles of an image. The prediction is for an image with this number of tiles.
        rows: the sequences that the KV cache holds side by side.
    """
    footprint = Footprint(config, stored_on(device.flavour, storage))
    programs = choose_programs(footprint, device.flavour, device.usable_memory, context, rows)
    memory = memory_of(footprint, context, device.flavour, programs, rows)
    speed = predict(footprint, device, tiles_of(config, max_tiles), rows, context)
    advice: tuple[str, ...] = _refused_formats(device, storage)
    if footprint.storage != storage:
        advice += (WIDE_CACHE,)
    if memory.total > device.usable_memory:
        advice += tuple(_advice(footprint, device, context, memory, rows))
    elif programs == Programs.ONE:
        advice += (slow_steps(footprint, device.flavour, context),)
    if (needed := speed.prompt_tokens + ANSWER_TOKENS) > context:
        advice += (f"--context {needed} or more, or fewer tiles: {speed.tiles} are {speed.prompt_tokens} tokens",)
    building = build_bytes(footprint, device.flavour, programs)
    if device.flavour == "tensorrt" and memory.total <= device.usable_memory < building:
        advice += (f"engines are built on the device, which takes about {building / 1e9:.1f} GB: add swap for that",)
    return Plan(device, recipe, programs, context, max_tiles, memory, speed, building, advice, rows)


def stored_on(flavour: str, storage: Storage) -> Storage:
    """Return how engines of a flavour of TensorRT store a recipe: without an int8 cache where it is not listed."""
    wide = storage.cache_bytes == 1 and not keeps_int8_cache(flavour)
    return replace(storage, cache_bytes=2) if wide else storage


def choose_programs(footprint: Footprint, flavour: str, usable: int, context: int, rows: int = 1) -> Programs:
    """Return the programs of a decoder's engine: the fastest ones, or the least where memory is short.

    Args:
        footprint: the model as the device stores it.
        flavour: the TensorRT that builds, "tensorrt" or "tensorrt_rtx".
        usable: the bytes for a model on the device.
        context: the capacity of the KV cache in tokens.
        rows: the sequences that it holds side by side.
    """
    fastest = _fastest(footprint, flavour, rows)
    needed = memory_of(footprint, context, flavour, fastest, rows).total
    if flavour == "tensorrt":  # which builds on the device itself
        needed = max(needed, build_bytes(footprint, flavour, fastest))
    return fastest if needed <= usable else least_programs(rows)


def build_bytes(footprint: Footprint, flavour: str, programs: Programs) -> int:
    """Estimate the bytes of free memory that the build of both engines needs."""
    weights = footprint.weights
    twice = 0 if programs == Programs.ONE else footprint.twice_bytes(flavour)
    return max(builder_bytes(weights.vision), builder_bytes(weights.decoder + weights.head, programs - 1, twice))


def _fastest(footprint: Footprint, flavour: str, rows: int = 1) -> Programs:
    return fastest_programs(flavour, footprint.storage.cache_bytes, footprint.storage.has_int8_body, rows)


def slow_steps(footprint: Footprint, flavour: str, context: int) -> str:
    """Return why one program serves all steps, and what faster ones would take."""
    fastest = _fastest(footprint, flavour)
    if fastest == Programs.ONE:
        return "one program serves prompts and steps: programs for one token dequantize int8 weights in memory"
    further = memory_of(footprint, context, flavour, fastest).programs
    return f"one program serves prompts and steps, so each step copies the cache; more programs take {size(further)}"


def memory_of(
    footprint: Footprint,
    context: int,
    flavour: str = "tensorrt_rtx",
    programs: Programs | None = None,
    rows: int = 1,
) -> Memory:
    """Return the bytes on the device for `rows` rows of `context` tokens and the programs of the decoder's engine.

    The default programs are those that need least.

    Attention counts as on the oldest version of a flavour: `tensorrt` of JetPack 6.2 keeps its scores in memory.
    """
    weights = footprint.weights
    fused = footprint.activation_bytes(TILES_AT_ONCE, PREFILL_CHUNK)
    each = slots_of(context, rows)
    slots = each if flavour == "tensorrt" else 0
    programs = programs or least_programs(rows)
    return Memory(
        vision=weights.vision,
        decoder=weights.decoder,
        head=weights.head,
        programs=further_bytes(
            programs, footprint.config.decoder.num_hidden_layers, footprint.twice_bytes(flavour, rows)
        ),
        kv_cache=rows * footprint.cache_bytes(each),
        activations=footprint.activation_bytes(TILES_AT_ONCE, PREFILL_CHUNK, slots, rows),
        workspace=fused // 2 + (64 << 20),  # scratch of single kernels, their code, CUDA graphs
        embeddings_on_disk=weights.embeddings,
    )


def predict(footprint: Footprint, device: Device, tiles: int, rows: int = 1, context: int = 0) -> Speed:
    """Predict the speed of one question about one image of `tiles` tiles, thumbnail included.

    With several rows, as many such answers are decoded together. Each step reads all slots of all rows then, that is
    `context` tokens of each.
    """
    config, storage, weights = footprint.config, footprint.storage, footprint.weights
    bandwidth, rate, int8_rate = device.bandwidth_gbs * 1e9, device.tflops * 1e12, device.int8_tops * 1e12
    prompt = tiles * config.tokens_per_tile + TEXT_TOKENS
    vision_rate = int8_rate if storage.vision else rate
    vision = max(footprint.vision_operations(tiles) / vision_rate, weights.vision / bandwidth)
    prefill_rate = int8_rate if storage.body and storage.body.static_inputs else rate
    prefill = max(footprint.prefill_operations(prompt) / prefill_rate, footprint.decode_bytes(prompt) / bandwidth)
    length = prompt + ANSWER_TOKENS // 2 if rows == 1 else slots_of(context, rows)
    operations = rows * footprint.prefill_operations(1)
    step = max(footprint.decode_bytes(length, rows) / bandwidth, operations / prefill_rate)
    return Speed(tiles, prompt, vision, prefill, rows / step)


def tiles_of(config: ModelConfig, limit: int) -> int:
    """Return the tiles of an image that uses the whole limit, with its thumbnail."""
    return limit + 1 if limit > 1 and config.use_thumbnail else limit


def tile_table(config: ModelConfig) -> list[dict[str, Any]]:
    """Return the number of tiles of common image sizes for each tile limit, thumbnail included.

    The number does not grow evenly with the limit: 640x480 is one tile at 4, 3x2 and a thumbnail at 6, and 4x3 and a
    thumbnail at 12.
    """
    rows = []
    size = config.vision.image_size
    for label, (width, height) in IMAGE_SIZES.items():
        tiles = {}
        for limit in TILE_LIMITS:
            least = min(config.min_tiles, limit)
            columns, lines = tile_grid(width, height, image_size=size, max_tiles=limit, min_tiles=least)
            tiles[limit] = columns * lines + (1 if config.use_thumbnail and columns * lines > 1 else 0)
        rows.append({"image": label, "width": width, "height": height, "tiles": tiles})
    return rows


def _refused_formats(device: Device, storage: Storage) -> tuple[str, ...]:
    needed = {f"int{scheme.bits}" for scheme in (storage.body, storage.head, storage.vision) if scheme}
    lacking = sorted(needed - set(device.formats))
    return tuple(f"{device.title} has no {name}: choose another recipe" for name in lacking)


def _advice(footprint: Footprint, device: Device, context: int, memory: Memory, rows: int) -> list[str]:
    """Return the changes that make the model fit, the one with the least loss first."""
    advice = []
    if fewer := _most_rows(device, footprint, context, rows):
        advice.append(f"--rows {fewer}" if fewer > 1 else "one row")
    if shorter := _longest_context(device, footprint, rows):
        advice.append(shorter)
    for name, storage in RECIPES.items():
        smaller = footprint.with_storage(stored_on(device.flavour, storage))
        needed = memory_of(smaller, context, device.flavour, rows=rows)
        if needed.total < memory.total and needed.total <= device.usable_memory:
            return [*advice, f"recipe {name} ({needed.total / 1e9:.2f} GB)"]
        if not advice and name == list(RECIPES)[-1] and (shorter := _longest_context(device, smaller, rows)):
            return [f"recipe {name} with {shorter}"]
    return advice or ["a smaller variant of the model, or a device with more memory"]


def _most_rows(device: Device, footprint: Footprint, context: int, rows: int) -> int | None:
    """Return the largest number of rows below `rows` that fits, None if one row does not."""
    usable = device.usable_memory
    fitting = (
        n for n in range(rows - 1, 0, -1) if memory_of(footprint, context, device.flavour, rows=n).total <= usable
    )
    return next(fitting, None)


def _longest_context(device: Device, footprint: Footprint, rows: int) -> str | None:
    """Return advice with the largest context that fits, or None if it has no room for one tile and an answer."""
    # The bytes grow with the context, so the first one that does not fit can be searched by halving.
    usable, step = device.usable_memory, 256
    limit = max(1, usable // (step * rows * footprint.cache_bytes(1)) + 1)
    fitting = bisect.bisect_right(
        range(1, limit + 1),
        usable,
        key=lambda steps: memory_of(footprint, step * steps, device.flavour, rows=rows).total,
    )
    context = fitting * step
    tiles = (context - TEXT_TOKENS - ANSWER_TOKENS) // footprint.config.tokens_per_tile
    return f"--context {context} (room for about {tiles} tiles)" if tiles >= 1 else None
