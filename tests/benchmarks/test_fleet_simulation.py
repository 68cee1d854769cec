"""The simulated fleet does what arithmetic says where that is enough, and loses and invents nothing."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.repository import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import fleet_simulation as fleet  # noqa: E402 - the folder of scripts is no package

from internvl_edge.base.toml import parse  # noqa: E402
from internvl_edge.planning.devices import Devices  # noqa: E402

PLAIN = replace(fleet.Assumptions().undisturbed(), spread=0.0, hand_out_s=0.0)


@pytest.mark.parametrize(("boxes", "items", "block"), [(1, 1000, 64), (10, 6400, 64), (7, 700, 100), (1000, 10, 1)])
def test_without_disturbances_it_is_arithmetic(boxes: int, items: int, block: int) -> None:
    found = fleet.simulate(boxes, items, 3.0, replace(PLAIN, block=block))
    rounds = math.ceil(math.ceil(items / block) / boxes)
    last = items - (rounds * boxes - 1) * block if boxes == 1 else block
    expected = 3.0 * ((rounds - 1) * block + min(block, last))
    assert found.hours * 3600 == pytest.approx(expected)
    assert (found.repeated, found.failures) == (0, 0)
    assert found.items_per_s == pytest.approx(items / expected)
    assert found.efficiency == pytest.approx(items * 3.0 / boxes / expected)


def test_a_slow_driver_is_the_limit() -> None:
    found = fleet.simulate(1000, 64_000, 0.001, replace(PLAIN, hand_out_s=0.5))
    assert found.hours * 3600 == pytest.approx(1000 * 0.5 + 0.064)


def test_slow_boxes_slow_the_fleet_by_their_share() -> None:
    found = fleet.simulate(100, 1_000_000, 1.0, replace(PLAIN, block=8, slow_share=0.2, slow_factor=2.0))
    assert found.efficiency == pytest.approx(0.9, abs=0.005)


def test_failures_repeat_about_half_a_block_each() -> None:
    assumed = replace(PLAIN, hours_between_failures=10.0, repair_s=600.0)
    found = fleet.simulate(100, 1_000_000, 3.0, assumed)
    hours = found.hours * 100
    assert found.failures == pytest.approx(hours / 10.17, rel=0.1)  # one in 10 hours of work and 10 minutes of repair
    assert found.repeated * 1_000_000 == pytest.approx(found.failures * 32, rel=0.15)
    assert found.efficiency == pytest.approx(10 / 10.17, abs=0.02)


def test_the_same_seed_gives_the_same_run() -> None:
    one, other, third = (
        fleet.simulate(50, 100_000, 3.0, replace(fleet.Assumptions(hours_between_failures=20.0), seed=seed))
        for seed in (1, 1, 2)
    )
    assert one == other != third


def test_larger_blocks_have_longer_tails_and_repeat_more() -> None:
    assumed = fleet.Assumptions(hours_between_failures=5.0)
    small, large = (fleet.simulate(100, 200_000, 3.0, replace(assumed, block=block)) for block in (16, 1024))
    assert large.tail_hours > 3 * small.tail_hours
    assert large.repeated > 10 * small.repeated
    assert large.hours > small.hours


def test_seconds_are_those_that_batch_measured_with_all_cores(tmp_path: Path) -> None:
    rows = {"4": 1.25, "1": 3.5}
    found = {
        "threads": 2,
        "machine": {"cores": 2},
        "questions_per_image": {
            name: {"seconds_per_item": {"loop": {"wall_s": 9.0, "cpu_s": 9.0}, "batch": {"wall_s": each, "cpu_s": 9.0}}}
            for name, each in rows.items()
        },
    }
    path = tmp_path / "batch.json"
    path.write_text(json.dumps(found))
    assert fleet.measured_seconds(path) == {"4": 5.0, "1": 3.5}
    path.write_text(json.dumps(found | {"threads": 1}))
    with pytest.raises(SystemExit, match="1 threads, not with all cores; give --seconds"):
        fleet.measured_seconds(path)


def test_fleets_are_simulations_of_every_size() -> None:
    assumed = fleet.Assumptions()
    found = fleet.fleets(20_000, 3.0, assumed)
    assert set(found["boxes"]["disturbed"]) == set(map(str, fleet.BOXES))
    for name, each in (("undisturbed", assumed.undisturbed()), ("disturbed", assumed)):
        hours = fleet.simulate(10, 20_000, 3.0, each).hours
        assert found["boxes"][name]["10"]["hours"] == pytest.approx(hours, rel=1e-3)
    hours = fleet.simulate(1000, 20_000, 3.0, replace(assumed, block=512)).hours
    assert found["blocks_of_1000_boxes"]["512"]["hours"] == pytest.approx(hours, rel=1e-3)


def test_energy_is_power_times_time() -> None:
    costs = parse((BENCHMARKS / "fleet_costs.toml").read_text(encoding="utf-8"), "fleet_costs.toml")
    found = fleet.energy(costs, Devices())
    assert set(found) == set(costs["boxes"]) <= set(Devices().all)
    for name, row in found.items():
        assert row["source"]
        kwh = row["watts"] * row["predicted_s_per_item"] * 1e6 / 3600 / 1000
        assert row["kwh_per_million"] == pytest.approx(kwh, rel=0.01), name
        assert row["energy_cost_per_million"] == pytest.approx(kwh * costs["price_per_kwh"], rel=0.02)
        assert "price_share_per_million" not in row
    costs["boxes"]["thor"] |= {"price": 3650.0, "years": 10}
    share = fleet.energy(costs, Devices())["thor"]
    assert share["price_share_per_million"] == pytest.approx(share["predicted_s_per_item"] * 1e6 / 86400, rel=0.02)
