"""Write a random-weight InternVL 2.5 or 3.5 checkpoint in a variant's real shapes, names and files.

    python benchmarks/random_checkpoint.py 1B OUT

Speed and memory do not depend on the values of weights, so every such measurement can be made without a download.
bfloat16 safetensors, sharded and streamed: one block of normal numbers is made once and written again and again from
random places, so a file is written as fast as the disk takes it and memory stays below a few hundred megabytes.
The scales keep activations finite in float16. Needs numpy only; the answers of such a model are noise.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NoReturn

import click
import numpy as np
from checkpoint_variants import VARIANTS, Tensor, Variant, json_files, tensors

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.progress import Progress

SHARD_BYTES = 4_000_000_000
# Odd, so that rows of a table never line up with the block they are cut from.
BLOCK_ELEMENTS = (1 << 23) + 9
BFLOAT16_BYTES = 2
BFLOAT16_MANTISSA_BITS = 7


class NormalBlock:
    """bfloat16 normal numbers as bit patterns, served from one block at random places, scaled by powers of two."""

    def __init__(self, seed: int, elements: int = BLOCK_ELEMENTS) -> None:
        self.random = np.random.default_rng(seed)
        values = self.random.standard_normal(elements, dtype=np.float32)
        # Far enough from zero that subtracting from the exponent field cannot wrap around.
        values = np.copysign(np.maximum(np.abs(values), np.float32(1e-6)), values)
        self.scaled = {0: _to_bfloat16(values)}

    def write(self, file: BinaryIO, tensor: Tensor) -> None:
        """Append a tensor's bytes to `file`, little-endian as safetensors wants them."""
        if tensor.constant is not None:
            file.write(_to_bfloat16(np.full(tensor.shape, tensor.constant, dtype=np.float32)).tobytes())
            return
        exponent = round(math.log2(tensor.std))
        if exponent not in self.scaled:
            self.scaled[exponent] = self.scaled[0] + np.uint16((exponent << BFLOAT16_MANTISSA_BITS) & 0xFFFF)
        block, left = self.scaled[exponent], tensor.elements
        while left:
            start = int(self.random.integers(len(block)))
            piece = block[start : start + left]
            file.write(piece.data)
            left -= len(piece)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bit patterns (uint16), rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write(
    variant: Variant,
    out: Path,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], object] = lambda size: None,
) -> None:
    """Write the whole checkpoint; `out` appears only when it is complete.

    `advance` is called with the bytes of each tensor written. Raises EdgeError as `check` does.
    """
    check(variant, out)
    partial = _partial(out)
    try:
        partial.mkdir(parents=True)
        _write_shards(partial, list(tensors(variant)), NormalBlock(seed), shard_bytes, advance)
        for name, content in json_files(variant).items():
            (partial / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        if variant.text != "internlm2":
            (partial / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check(variant: Variant, out: Path) -> None:
    """Raise EdgeError where `out` holds something already or the disk has too little room for the weights."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EdgeError(f"{out} exists already; name a new folder or remove it")
    if _partial(out).exists():
        raise EdgeError(f"{_partial(out)} belongs to an unfinished run; remove it if none is running")
    disk = next(folder for folder in out.absolute().parents if folder.exists())
    size, free = total_bytes(variant), shutil.disk_usage(disk).free
    if size > free:
        raise EdgeError(f"{size / 1e9:.1f} GB are needed in {disk}, {free / 1e9:.1f} GB are free; make room")


def _partial(out: Path) -> Path:
    return out.absolute().with_name(f".{out.name}.partial")


def total_bytes(variant: Variant) -> int:
    """Bytes of all weights."""
    return sum(tensor.elements for tensor in tensors(variant)) * BFLOAT16_BYTES


def shards(listed: list[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Neighboring tensors together, each shard within `shard_bytes` unless one tensor alone is larger."""
    parts: list[list[Tensor]] = [[]]
    size = 0
    for tensor in listed:
        if parts[-1] and size + tensor.elements * BFLOAT16_BYTES > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.elements * BFLOAT16_BYTES
    return parts


def _write_shards(
    folder: Path, listed: list[Tensor], block: NormalBlock, shard_bytes: int, advance: Callable[[int], object]
) -> None:
    parts = shards(listed, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        weight_map |= {tensor.name: name for tensor in part}
        with (folder / name).open("wb") as file:
            file.write(_safetensors_header(part))
            for tensor in part:
                block.write(file, tensor)
                advance(tensor.elements * BFLOAT16_BYTES)
    if len(parts) > 1:
        total = sum(tensor.elements for tensor in listed) * BFLOAT16_BYTES
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _safetensors_header(part: list[Tensor]) -> bytes:
    """Length and JSON header of a safetensors file whose data follow in the order of `part`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in part:
        end = offset + tensor.elements * BFLOAT16_BYTES
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@click.command()
@click.argument("variant", type=click.Choice(list(VARIANTS)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Another seed gives other weights.")
@click.option("--layers", type=click.IntRange(min=1), hidden=True, help="Keep only this many layers of each tower.")
def command(variant: str, out: Path, seed: int, layers: int | None) -> None:
    """Write a random-weight checkpoint of VARIANT into the new folder OUT."""
    chosen = VARIANTS[variant]
    if layers is not None:
        vision = replace(chosen.vision, layers=min(layers, chosen.vision.layers))
        chosen = replace(chosen, layers=min(layers, chosen.layers), vision=vision)
    check(chosen, out)
    begun, size = time.monotonic(), total_bytes(chosen)
    with Progress(sys.stderr) as progress, progress.phase("writing", size, "bytes") as advance:
        write(chosen, out, seed, advance=advance)
    seconds = time.monotonic() - begun
    click.echo(f"{out}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / 1e6 / seconds:.0f} MB/s")


def fail(message: str) -> NoReturn:
    """Say what is wrong in one line and exit with the status of a user's mistake."""
    click.echo(f"error: {message}", err=True)
    sys.exit(2)


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit status 2."""
    try:
        command.main(standalone_mode=False)
    except click.ClickException as error:
        fail(error.format_message())
    except EdgeError as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write {error.filename or 'the checkpoint'}: {error.strerror}")
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


if __name__ == "__main__":
    main()
