"""CPU seconds of quantizing, by part: `w4a16-awq` with an int8 tower, on a random model of a 1B's shapes in few layers.

    python benchmarks/quantize_profile.py WORK [--vision-layers 3] [--layers 3] [--name before]

One thread, one process, so that CPU seconds are those of the work itself. A part is a function of this project; its
seconds are its own, without those of the parts that it calls. The tower and the decoder have few layers, all alike, and
every figure is of these: a whole 1B has 24 of each. WORK keeps the checkpoint and the data. With PYTHONPATH of another
commit's tree, the same script measures that one (a part that it does not have counts as the part that calls it).
Results: results/quantize-profile.json, one entry for each NAME.
"""

from __future__ import annotations

import functools
import importlib
import json
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from checkpoint_variants import VARIANTS
from quantize_memory import write_data
from random_checkpoint import write
from record import RESULTS, write_results

import internvl_edge
from internvl_edge.calibration import DataOptions
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.recipe import Recipe, VisionInt8

# Part -> the functions whose time it is: module and name below `internvl_edge`, a class's with a dot.
PARTS = {
    "tower forward": ["calibration.models:Tower.run", "calibration.models:Tower.first"],
    "tower, way back": ["calibration.stream:BlockStream.back"],
    "tower, int8 linears": ["quantize.vision:quantize_linear"],
    "decoder forward": ["calibration.models:Decoder.run", "calibration.models:Decoder.first"],
    "statistics": ["calibration.statistics:Observer.__call__"],
    "Gram matrices": ["calibration.statistics:_add_gram", "quantize.layer:symmetrize"],
    "scale search": ["quantize.layer:search_scale"],
    "clipping": ["quantize.layer:search_clipping", "quantize.layer:block_gram"],
    "factor for compensation": ["quantize.layer:inverse_factor", "quantize.layer:feedback_factor"],
    "compensated rounding": ["quantize.layer:compensated_rounding"],
    "is everything finite?": [
        "calibration.block_weights:require_finite",
        "quantize.layer:require_finite",
        "quantize.vision:require_finite",
        "calibration.statistics:Observer.check",
    ],
    "reading weights": ["calibration.models:load_block"],
    "reading and writing hidden states": [
        "calibration.stream:BlockStream.inputs",
        "calibration.stream:BlockStream._propagate",
    ],
    "report and packing": ["quantize.layer:OutputComparison.add", "quantize.layer:Grid.pack"],
    "data": ["quantize.pipeline:prepare"],
}
# Everything inside these counts for them: the way back also goes forward.
WHOLE = "tower, way back"


class Clock:
    """CPU seconds of each part, and of what is in none."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack = ["everything else"]
        self._since = time.process_time()

    def enter(self, part: str) -> None:
        """Count for `part` from now on."""
        self._count()
        self._stack.append(part)

    def leave(self) -> None:
        """Count for the caller again."""
        self._count()
        self._stack.pop()

    def _count(self) -> None:
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def watch(self, part: str, where: str) -> None:
        """Count the calls of one function for a part; a function that is not there counts for its caller."""
        module, _, path = where.partition(":")
        try:
            owner: Any = importlib.import_module(f"internvl_edge.{module}")
        except ModuleNotFoundError:  # in another commit's tree
            return
        *outer, name = path.split(".")
        for each in outer:
            owner = getattr(owner, each)
        if (function := getattr(owner, name, None)) is not None:
            setattr(owner, name, self._timed(part, function))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **more: Any) -> Any:
            if WHOLE in self._stack:
                return function(*arguments, **more)
            self.enter(part)
            try:
                return function(*arguments, **more)
            finally:
                self.leave()

        return timed


def commit() -> str | None:
    """The commit of the tree that is measured."""
    command = ["git", "-C", str(Path(internvl_edge.__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--vision-layers", default=3)
@click.option("--layers", default=3)
@click.option("--samples", default=64)
@click.option("--tokens", default=390, help="About this many in each sample; with the picture's about 512.")
@click.option("--vision-cosine", default=VisionInt8().cosine)
@click.option("--name", help="Of the entry in the results; without it nothing is recorded.")
def main(
    work: Path, vision_layers: int, layers: int, samples: int, tokens: int, vision_cosine: float, name: str | None
) -> None:
    """Quantize once and print the parts."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, out = work / f"1B-{vision_layers}-{layers}", work / "out"
    shape = VARIANTS["1B"]
    if not checkpoint.exists():
        write(replace(shape, layers=layers, vision=replace(shape.vision, layers=vision_layers)), checkpoint)
    data = write_data(work / "data", checkpoint, samples, tokens)
    for left in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(left, ignore_errors=True)
    clock = Clock()
    for part, places in PARTS.items():
        for where in places:
            clock.watch(part, where)
    recipe = Recipe(vision="int8", vision_int8=VisionInt8(cosine=vision_cosine))
    began = time.process_time()
    report = quantize_checkpoint(checkpoint, out, recipe, data=DataOptions(data))
    total = time.process_time() - began
    clock.enter("end")
    found = {part: round(clock.seconds[part], 1) for part in [*PARTS, "everything else"]}
    values = {
        "commit": commit(),
        "vision_layers": vision_layers,
        "layers": layers,
        "vision_cosine": vision_cosine,
        "samples": report.record.samples,
        "tokens": report.record.tokens,
        "cpu_s": round(total, 1),
        "parts": found,
    }
    for part, seconds in sorted(found.items(), key=lambda item: -item[1]):
        click.echo(f"{seconds:8.1f} s {100 * seconds / total:5.1f} %  {part}")
    click.echo(f"{total:8.1f} s")
    if name:
        path = RESULTS / "quantize-profile.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
        click.echo(f"wrote {write_results('quantize-profile', {'rows': rows | {name: values}})}")


if __name__ == "__main__":
    main()
