"""The tables and the chart of `cpu_peers.py`: ratios to the best peer, shares of the limits, quality by form."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from helpers.repository import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import cpu_peers_chart
import cpu_peers_quality
import cpu_peers_table
from reader_quality import ROWS

LLAMA, OPENVINO, GENAI = "llama.cpp Q4_0, mmproj q8_0", "OpenVINO GenAI int4, int8 tower", "onnxruntime-genai int4"
FORM = {"bits": 4, "group_size": 128, "symmetric": False, "lm_head": "int8", "vision": "int8", "int8_prompts": False}


def facts(decode: float, tile: float | None, resident: float, **more: Any) -> dict[str, Any]:
    rows: dict[str, Any] = {
        "decode 300": {"tokens_per_s": decode, "spread": 0.01, "seconds": []},
        "prefill 300": {"tokens_per_s": 10 * decode, "spread": 0.02, "seconds": []},
    }
    if tile:
        rows["vision 1"] = {"s": tile, "spread": 0.0, "seconds": []}
    memory = {"after decode": {"resident": resident}, "after vision": {"resident": 2 * resident}}
    memory["after long"] = {"resident": 9 * resident}
    return {"load_s": {"median": 0.5, "each": []}, "disk_bytes": 1e9, "memory": memory, "rows": rows, **more}


@pytest.fixture
def report() -> dict[str, Any]:
    known = {"form": FORM, "token_bytes": {"decode 300": 1e8}, "operations": {"prefill 300": 3e11, "vision 1": 4e11}}
    return {
        "date": "2026-11-29",
        "threads": 2,
        "machine": {"cpu": "a <CPU> & more"},
        "read_bandwidth": 2e10,
        "float32_matrix_rate": 2e11,
        "int8_matrix_rate": 1e12,
        "programs": {
            "ours": facts(100, 2.0, 8e8, **known),
            LLAMA: facts(50, 4.0, 1e9),
            OPENVINO: facts(80, 1.0, 2e9),
            GENAI: facts(60, None, 5e8, cannot="no tower"),
        },
        "missing": {"transformers bfloat16": "no environment transformers"},
    }


def cells(table: str, program: str) -> dict[str, str]:
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    head = next(line for line in lines if line[0] == "program")
    return dict(zip(head, next(line for line in lines if line[0] == program), strict=True))


def test_every_figure_stands_with_its_ratio_to_the_best_peer(report: dict[str, Any]) -> None:
    table = cpu_peers_table.table(report)
    ours, openvino, genai = (cells(table, label) for label in ("ours", OPENVINO, GENAI))
    assert ours["decode at 300, tokens/s"] == "100 ± 1% (1.25)", "faster than the best peer's 80"
    assert ours["tile, s"] == "2.00 ± 0% (0.50)", "slower than the best peer's 1 s, so below 1"
    assert ours["memory, text, GB"] == "0.80 (0.62)", "the leanest peer has 0.5 GB"
    assert ours["with tiles, GB"] == "1.60 (1.25)", "a peer without a tower does not count, later rows neither"
    assert openvino["tile, s"].endswith("(1.00)")
    assert genai["tile, s"] == genai["with tiles, GB"] == genai["on disk, GB"] == "-"


def test_what_is_missing_says_why(report: dict[str, Any]) -> None:
    notes = cpu_peers_table.notes(report)
    assert f"{GENAI}: no tower." in notes
    assert "transformers bfloat16 was left out: no environment transformers." in notes


def test_shares_of_the_limits(report: dict[str, Any]) -> None:
    lines = {line.split(" | ")[0].strip("| "): line for line in cpu_peers_table.limit_table(report).splitlines()}
    # 100 tokens/s of 1e8 bytes are 1e10 of 2e10 bytes/s; 3e11 operations in 0.3 s; 4e11 in 2 s.
    assert lines["ours"] == "| ours | 50% | - | - | 100% / 500% | - | 20% / 100% |"
    assert lines[GENAI] == f"| {GENAI} | - | - | - | 60% / 300% | - | - |", "bytes are known of our bundles alone"


def test_the_summary_compares_with_peers_alone(report: dict[str, Any]) -> None:
    head, *lines = cpu_peers_table.summary(report)
    assert head == ["measure", "best peer", "its figure", "ours", "goal"]
    found = {line[0]: line[1:] for line in lines}
    assert found["decode at 300, tokens/s"] == [OPENVINO, "80.0", "1.25 (100)", "1.25"]
    assert found["load, s"][-1] == "0.5 s"
    assert "decode at 8000, tokens/s" not in found


def test_a_terminal_gets_columns_of_equal_width(report: dict[str, Any]) -> None:
    first, legend, *lines = cpu_peers_table.terminal(report).splitlines()
    assert first == "It reads 20.0 GB/s, multiplies 0.20 TFLOP/s in float32, multiplies 1.00 TOP/s in int8."
    assert legend == "[1] ours"
    column = lines[0].index("[1]")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)
    assert max(map(len, lines)) <= 120


def test_a_run_without_peers_has_figures_and_no_ratios(report: dict[str, Any]) -> None:
    report["programs"] = {"ours": report["programs"]["ours"]}
    assert cells(cpu_peers_table.table(report), "ours")["tile, s"] == "2.00 ± 0%"
    assert len(cpu_peers_table.summary(report)) == 1


def test_quality_is_that_of_the_recipe_with_the_same_form() -> None:
    name, differs = cpu_peers_quality.nearest_row(FORM) or ("", [""])
    assert (name, differs) == ("recipe cpu", [])
    results = json.loads((REPOSITORY / "benchmarks/results/reader-quality-qwen2.json").read_text())["results"]
    exact = next(row["exact_match"] for row in results if row["name"] == "recipe cpu")
    assert cpu_peers_quality.exact_match(FORM).startswith(f"{exact:.3f} / ")


def test_a_form_that_differs_says_in_what() -> None:
    form = FORM | {"lm_head": "int4", "symmetric": True, "int8_prompts": True}
    name, differs = cpu_peers_quality.nearest_row(form) or ("", [])
    assert name == "recipe cpu, int8 prompts"
    assert differs == ["there int8 head", "there zero points"]
    assert cpu_peers_quality.nearest_row(FORM | {"bits": 2}) is None
    assert cpu_peers_quality.exact_match(FORM | {"bits": 2}) == "-"


@pytest.mark.parametrize("name", ROWS)
def test_each_row_of_the_readers_is_its_own_nearest_form_or_an_equal_one(name: str) -> None:
    form = cpu_peers_quality.row_form(name)
    nearest = cpu_peers_quality.nearest_row(form)
    assert nearest is not None
    assert nearest[1] == []
    assert cpu_peers_quality.row_form(nearest[0]) == form


def test_int8_prompts_have_a_divergence_of_their_own() -> None:
    kl = [float(cpu_peers_quality.smollm_kl(FORM | {"int8_prompts": prompts})) for prompts in (False, True)]
    assert 0 < kl[0] < kl[1]


def test_the_chart_holds_every_program_and_bars_that_compare(report: dict[str, Any]) -> None:
    drawn = ElementTree.fromstring(cpu_peers_chart.chart(report))
    words = ["".join(each.itertext()) for each in drawn.iter() if each.tag.endswith("text")]
    for label in report["programs"]:
        assert label in words
    assert any("a <CPU> & more" in word for word in words)
    bars = [each for each in drawn.iter() if each.tag.endswith("rect") and each.get("class") in ("ours", "peer")]
    panels = [bars[start : start + 4] for start in range(0, len(bars), 4)]
    widths = [[float(bar.get("width", "")) for bar in panel] for panel in panels]
    decode = next(panel for panel in widths if panel[0] == pytest.approx(1.25 * panel[2], rel=0.01))
    assert decode[1] == pytest.approx(decode[2] * 50 / 80, rel=0.01)


def test_the_page_holds_the_tables_of_its_results() -> None:
    page = cpu_peers_table.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- cpu-peers: ") >= 1
    assert cpu_peers_table.with_tables(page) == page, "run benchmarks/cpu_peers_table.py --docs"
