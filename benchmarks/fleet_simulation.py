"""How long 1 to 1000 boxes take for 10 million images, with stragglers and failures, and what the energy costs.

    python benchmarks/fleet_simulation.py [--seconds S] [--images 10000000] [--costs FILE.toml]

A discrete-event simulation; nothing runs but this script. An item is an image with four questions, or with one. Its
seconds are the wall time that `batch.py` measured with all cores of a machine (results/batch-int4.json, way "batch"):
a box is that machine. `--seconds` takes another time for items of one kind. One driver hands out blocks of items, one
after the other. A box computes one block at a time, and its rows count when the block is complete, as in Ray Data. A
box that fails loses its block, which another one computes again after it was missed. Everything that was not measured
is in `Assumptions`, and in the results.

Writes results/fleet-simulation.json: time, throughput, repeated work and the tail for each number of boxes, with and
without disturbances, for several sizes of blocks; and energy per million images on boards, from the speeds that `plan`
predicts (upper bounds, one tile and one answer of 100 tokens at a time) and the table of costs.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import tempfile
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_variants import VARIANTS, json_files
from record import RESULTS, write_results

from internvl_edge.base.toml import parse
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.planning.devices import Devices
from internvl_edge.planning.footprint import RECIPES, Footprint
from internvl_edge.planning.planner import predict

HERE = Path(__file__).parent
BOXES = (1, 10, 100, 1000)
BLOCKS = (64, 512, 4096)
# What `batch.py` wrote for the bundle that `export` makes by default.
MEASURED = "batch-int4.json"
RECIPE, TILES, ANSWER_TOKENS = "w4a16, int8 head and vision", 1, 100


@dataclass(frozen=True)
class Assumptions:
    """What the simulation takes for granted. None of it was measured.

    Attributes:
        block: items that a box gets at once, and that are lost together.
        spread: standard deviation of the logarithm of an item's seconds.
        slow_share, slow_factor: so many boxes take so many times as long for everything (a hot board, another job).
        hours_between_failures: mean for one box; exponential. 0 for none.
        repair_s: until a box that failed works again: a restart and loading the model.
        missed_s: until the driver notices that a box is gone, and gives its block to another one.
        hand_out_s: of the driver, for each block.
        seed: of the random numbers.
    """

    block: int = 64
    spread: float = 0.5
    slow_share: float = 0.05
    slow_factor: float = 2.0
    hours_between_failures: float = 720.0
    repair_s: float = 300.0
    missed_s: float = 30.0
    hand_out_s: float = 0.005
    seed: int = 0

    def undisturbed(self) -> Assumptions:
        return replace(self, slow_share=0.0, hours_between_failures=0.0)


@dataclass(frozen=True)
class Outcome:
    """What a simulated fleet did.

    Attributes:
        hours: until the last row.
        items_per_s: all items over all seconds.
        efficiency: the same, against as many boxes that never wait, fail or slow down.
        repeated: share of the items that were computed more than once, from 0.
        failures: of boxes, until the end.
        tail_hours: from 99 % of the rows to the last one.
    """

    hours: float
    items_per_s: float
    efficiency: float
    repeated: float
    failures: int
    tail_hours: float


def simulate(boxes: int, items: int, seconds: float, assumed: Assumptions) -> Outcome:
    """Run `items` through `boxes` whose items take `seconds` on average."""
    random = np.random.default_rng(assumed.seed)
    blocks = deque([assumed.block] * (items // assumed.block) + [items % assumed.block] * (items % assumed.block > 0))
    slow = np.zeros(boxes, bool)
    slow[: round(boxes * assumed.slow_share)] = True
    fails_at = [_next_failure(random, 0.0, assumed) for _ in range(boxes)]
    # (time, kind, box, items): a box asks for work, a block is done, or a lost block is noticed.
    events: list[tuple[float, int, int, int]] = [(0.0, 0, box, 0) for box in range(boxes)]
    idle: list[int] = []
    done, free_at, repeated, failures = 0, 0.0, 0.0, 0
    nearly, now = math.inf, 0.0
    while done < items:
        now, kind, box, count = heapq.heappop(events)
        if kind == 1:
            done += count
            if done >= 0.99 * items:
                nearly = min(nearly, now)
        elif kind == 2:
            blocks.append(count)
            while idle and blocks:
                heapq.heappush(events, (now, 0, idle.pop(), 0))
            continue
        if not blocks:
            idle.append(box)
            continue
        begins = now
        while fails_at[box] < begins:  # it failed while it had nothing to do, or was down
            failures += 1
            begins = max(begins, fails_at[box] + assumed.repair_s)
            fails_at[box] = _next_failure(random, fails_at[box] + assumed.repair_s, assumed)
        if begins > now:
            heapq.heappush(events, (begins, 0, box, 0))
            continue
        count = blocks.popleft()
        begins = free_at = max(now, free_at) + assumed.hand_out_s
        lasts = seconds * _block_factor(random, count, assumed.spread) * (assumed.slow_factor if slow[box] else 1.0)
        if fails_at[box] < begins + lasts:
            failed = max(begins, fails_at[box])
            failures += 1
            repeated += count * (failed - begins) / lasts
            heapq.heappush(events, (failed + assumed.missed_s, 2, -1, count))
            heapq.heappush(events, (failed + assumed.repair_s, 0, box, 0))
            fails_at[box] = _next_failure(random, failed + assumed.repair_s, assumed)
        else:
            heapq.heappush(events, (begins + lasts, 1, box, count))
    return Outcome(
        hours=now / 3600,
        items_per_s=items / now,
        efficiency=items * seconds / boxes / now,
        repeated=repeated / items,
        failures=failures,
        tail_hours=(now - nearly) / 3600,
    )


def _block_factor(random: np.random.Generator, count: int, spread: float) -> float:
    """Return the mean of `count` log-normal numbers of mean 1, drawn as a normal number where there are many."""
    if count < 32:
        return float(random.lognormal(-spread * spread / 2, spread, count).mean()) * count
    deviation = math.sqrt((math.exp(spread * spread) - 1) / count)
    return max(0.1, float(random.normal(1, deviation))) * count


def _next_failure(random: np.random.Generator, after: float, assumed: Assumptions) -> float:
    hours = assumed.hours_between_failures
    return after + float(random.exponential(hours * 3600)) if hours else math.inf


def energy(costs: dict[str, Any], devices: Devices) -> dict[str, dict[str, Any]]:
    """Return seconds and energy of a million images on each board of the table, from `plan`'s predictions."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in json_files(VARIANTS["1B"]).items():
            (Path(folder) / name).write_text(json.dumps(content), encoding="utf-8")
        config = read_config(Path(folder))
    footprint, found = Footprint(config, RECIPES[RECIPE]), {}
    for name, box in costs["boxes"].items():
        speed = predict(footprint, devices.device(name), TILES)
        seconds = speed.first_token_s + ANSWER_TOKENS / speed.decode_tokens_per_s
        kwh = box["watts"] * seconds * 1e6 / 3.6e6
        found[name] = {
            "predicted_s_per_item": round(seconds, 4),
            "watts": box["watts"],
            "source": box["source"],
            "kwh_per_million": round(kwh, 2),
            "energy_cost_per_million": round(kwh * costs["price_per_kwh"], 2),
        }
        if "price" in box:
            share = seconds * 1e6 / (box["years"] * 365.25 * 86400)
            found[name]["price_share_per_million"] = round(box["price"] * share, 2)
    return found


def measured_seconds(path: Path) -> dict[str, float]:
    """Return the wall seconds of an image and all its questions, by how many questions it has.

    They are those of results of `batch.py` that were measured with all cores of the machine.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["threads"] != found["machine"]["cores"]:
        raise SystemExit(f"{path} was measured with {found['threads']} threads, not with all cores; give --seconds")
    return {
        questions: int(questions) * each["seconds_per_item"]["batch"]["wall_s"]
        for questions, each in found["questions_per_image"].items()
    }


def fleets(images: int, seconds: float, assumed: Assumptions) -> dict[str, Any]:
    """Simulate each number of boxes, with and without disturbances, and several sizes of blocks."""
    kinds = {"undisturbed": assumed.undisturbed(), "disturbed": assumed}
    boxes = {
        name: {str(count): _rounded(simulate(count, images, seconds, each)) for count in BOXES}
        for name, each in kinds.items()
    }
    sizes = {
        str(block): _rounded(simulate(max(BOXES), images, seconds, replace(assumed, block=block))) for block in BLOCKS
    }
    return {"seconds_per_item": seconds, "boxes": boxes, f"blocks_of_{max(BOXES)}_boxes": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="of one item on one box  [default: as batch.py measured]")
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--costs", type=Path, default=HERE / "fleet_costs.toml")
    asked = parser.parse_args()
    seconds = {"any": asked.seconds} if asked.seconds else measured_seconds(RESULTS / MEASURED)
    assumed, costs = Assumptions(), parse(asked.costs.read_text(encoding="utf-8"), asked.costs.name)
    values: dict[str, Any] = {"measured": None if asked.seconds else MEASURED, "images": asked.images}
    values |= {"assumptions": asdict(assumed)}
    values |= {"questions_per_image": {name: fleets(asked.images, each, assumed) for name, each in seconds.items()}}
    values |= {"price_per_kwh": costs["price_per_kwh"], "currency": costs["currency"]}
    values |= {"boards": {"recipe": RECIPE, "tiles": TILES, "tokens": ANSWER_TOKENS, **energy(costs, Devices())}}
    print(write_results("fleet-simulation", values))


def _rounded(outcome: Outcome) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in asdict(outcome).items()}


if __name__ == "__main__":
    main()
