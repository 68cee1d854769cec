"""The report: what goes in comes out, the page needs nothing outside itself, and every command leaves its part."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, asdict, fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import tiny
from helpers.browser import launched_browser
from helpers.commands import assert_one_line, internvl_edge
from helpers.reports import HOSTILE, RUN, full_report
from internvl_edge.base.errors import EdgeError
from internvl_edge.base.jsonable import decode, encode
from internvl_edge.base.run_record import RunRecord
from internvl_edge.bundle.gate import Verdict
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.names import QUANTIZATION
from internvl_edge.bundle.quality import Measurement, Quality
from internvl_edge.checkpoint.record import LinearReport, read_record
from internvl_edge.evaluation.divergence import DivergenceSummary, histogram
from internvl_edge.evaluation.report import Overview, Report, find_report, overview, write_overview
from internvl_edge.evaluation.report.files import HTML, JSON, read_report, require_own_report, write_report
from internvl_edge.evaluation.report.meaning import LANDMARKS, divergence_in_words
from internvl_edge.evaluation.report.page import difference, render
from internvl_edge.evaluation.report.plots import divergence_plot
from internvl_edge.model.components import Component, Stored
from internvl_edge.model.linear import W8A8, Scheme

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BARE = Report("bundle", "b", "c", (), False, 10, ())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the full report."""
    folder = tmp_path_factory.mktemp("report")
    write_report(full_report(), folder)
    return folder


@pytest.fixture(scope="module")
def page(written: Path) -> str:
    return (written / HTML).read_text(encoding="utf-8")


# ---- files ----


def test_a_report_survives_its_file(written: Path) -> None:
    read, full = read_report(written), full_report()
    assert read is not None
    assert encode(read) == encode(full) == _json(written)
    assert read.quality is not None
    assert full.quality is not None
    assert math.isnan(read.quality.gate[1].value), "a figure that is no number is none again"
    assert replace(read, quality=replace(read.quality, gate=full.quality.gate)) == full, "NaN is not equal to itself"


def test_every_type_of_a_report_is_frozen_and_stands_in_its_file(written: Path) -> None:
    """What `evaluate` returns is what is stored: each part decodes by itself, from the place where it stands."""
    full, values = full_report(), _json(written)
    for part in (full.quality, full.quantization, full.comparison, full.suite):
        name = next(field.name for field in fields(full) if getattr(full, field.name) is part)
        assert encode(decode(type(part), values[name], strict=True)) == encode(part)
        with pytest.raises(FrozenInstanceError):
            setattr(part, fields(part)[0].name, None)


def test_what_is_no_number_is_null_and_comes_back() -> None:
    run = RunRecord("now", float("nan"), 0, "m", {})
    text = json.dumps(encode(run), allow_nan=False)
    assert np.isnan(decode(RunRecord, json.loads(text)).seconds)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 99}', '{"format_version": 1, "kind": 3}'])
def test_a_strange_file_is_no_report(tmp_path: Path, text: str) -> None:
    (tmp_path / JSON).write_text(text, encoding="utf-8")
    assert read_report(tmp_path) is None


def test_facts_of_an_older_version_are_read_when_a_run_is_taken_up() -> None:
    record = full_report().quantization
    assert record is not None
    facts = record.linears[0]
    older = {**asdict(facts), "fallback": True}
    assert decode(LinearReport, json.loads(json.dumps(older))) == facts


def test_an_older_report_completes_one_of_the_same_files_only() -> None:
    older = full_report()
    newer = replace(older, comparison=None)
    assert encode(newer.completed_by(older)) == encode(older)
    assert newer.quality is not None
    others = replace(newer, quality=replace(newer.quality, files="others"))
    assert others.completed_by(older).comparison is None
    assert newer.completed_by(None) == newer


def test_without_the_extra_figures_are_written_and_a_line_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(BARE, tmp_path)
    monkeypatch.delitem(sys.modules, "internvl_edge.evaluation.report.page")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    written = write_report(replace(BARE, name="newer"), tmp_path)
    assert "jinja2: pip install 'internvl-edge[report]'" in written.hint
    assert written.html is None
    assert written.hint.endswith(f"{tmp_path / HTML} is of an earlier run")  # it is kept until there is a newer one
    assert sorted(path.name for path in tmp_path.iterdir()) == [HTML, JSON]
    assert json.loads(written.json.read_text(encoding="utf-8"))["name"] == "newer"


def test_every_divergence_is_counted() -> None:
    kl = np.array([0, 1e-12, 1e-7, 0.5, 99, 1e5, np.inf, np.nan])
    found = histogram(kl)
    assert sum(found.counts) == 6
    assert (found.counts[0], found.counts[-1]) == (3, 2)


@pytest.mark.parametrize("kl", [[0.0], [math.nan], [math.inf], [math.inf, math.nan, 0.1]])
def test_figures_that_are_no_numbers_are_drawn_without_them(kl: list[float]) -> None:
    summary = DivergenceSummary(len(kl), kl[0], kl[0], kl[0], 0.5, math.nan, math.nan)
    assert divergence_plot(histogram(np.array(kl)), summary).svg.startswith("<svg")


# ---- the page ----


class _Page(HTMLParser):
    """Tags, addresses and ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background", "ping"):
                self.addresses.append(value or "")
            elif name == "id":
                self.ids.append(value or "")
            elif name.startswith("on"):
                self.handlers.append(name)


def test_no_address_leaves_the_page(page: str) -> None:
    found = _Page(page)
    assert len(found.addresses) > 6
    assert [address[:40] for address in found.addresses if not address.startswith(("#", "data:image/"))] == []
    assert found.tags.isdisjoint({"script", "link", "base", "iframe", "object", "embed", "form", "meta http-equiv"})
    assert found.handlers == []
    assert [target for target in re.findall(r"url\(([^)]*)\)", page) if not target.startswith("#")] == []
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_references_inside_the_page_have_their_target_once(page: str) -> None:
    found = _Page(page)
    assert len(set(found.ids)) == len(found.ids)
    inside = {address[1:] for address in found.addresses if address.startswith("#")}
    assert inside | set(re.findall(r"url\(#([^)]*)\)", page)) <= set(found.ids)


def test_text_stays_text(page: str) -> None:
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script") > 5
    assert "\u202e" in HOSTILE
    assert "\u202e" not in page, "what follows would read from right to left"


def test_a_page_of_a_whole_model_stays_below_two_megabytes(page: str) -> None:
    assert page.count("data:image/jpeg") == 6
    assert len(page.encode()) < 2_000_000


def test_plots_have_no_colours_of_their_own(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 8
    for drawing in drawings:
        assert re.findall(r"#[0-9a-fA-F]{6}\b", drawing) == []
        assert "var(--" in drawing


def test_what_is_not_known_is_left_out() -> None:
    text = render(BARE)
    for heading in ("The gate", "side by side", "Suite", "Size", "How it was quantized", "<svg", "None"):
        assert heading not in text


def test_only_quantized_linears_have_errors_on_the_page() -> None:
    """A linear of the tower may stay float because its error as int8 would be the largest of all."""
    report = replace(full_report(), quality=None)
    assert report.quantization is not None
    worst, *others = report.quantization.linears
    kept = replace(worst, scheme=None, error=876.0, sqnr_db=-58.85, cosine=0.123456)
    text = render(replace(report, quantization=replace(report.quantization, linears=(kept, *others))))
    assert kept.name in text
    assert not any(f">{figure}</td>" in text for figure in ("876", "-58.9", "0.123456"))
    errors = [linear.error for linear in others if linear.error is not None]
    assert f"{sum(errors) / len(errors):.3f}" in text


def test_the_first_sentence_says_how_each_part_is_stored() -> None:
    int8, int4 = Scheme(8, None, symmetric=True), Scheme(4, 32, symmetric=True)
    parts = {"vision": (Stored(9, "float16", W8A8),), "lm_head": (Stored(1, "float16", int8),)}
    parts["decoder"] = (Stored(4, "float16", int8), Stored(3, "float16", int4))
    sizes = tuple(Component(name, 500_000_000, 1, 8, stored) for name, stored in parts.items())
    text = render(replace(BARE, components=sizes))
    assert "1.50 billion weights: vision and lm_head in int8; decoder in int8 and int4 in groups of 32." in text


def test_the_verdict_stands_in_front() -> None:
    report = replace(full_report(), quantization=None, comparison=None)
    words = {
        "failed": ("Failed its gate, accepted", (Verdict("kl>0.01", 0.0213, True), Verdict("kl<0", 0.0213, False))),
        "passed": ("Passed its gate, accepted", (Verdict("kl>0.05", 0.0213, False),)),
        "no gate": ("Measured, no gate set, accepted", ()),
    }
    assert report.quality is not None
    for state, (verdict, gate) in words.items():
        quality = replace(report.quality, gate=gate)
        assert quality.state == state
        text = render(replace(report, quality=quality))
        assert verdict in text[: text.index("<h2>")]


def test_a_page_lists_the_first_mistakes_and_counts_all() -> None:
    suite = full_report().suite
    assert suite is not None
    text = render(replace(BARE, suite=suite))
    assert "<summary>40 answers that are not right</summary>" in text
    more = replace(suite, mistakes=tuple(replace(suite.mistakes[0], case=f"case {n}") for n in range(57)))
    text = render(replace(BARE, suite=more))
    assert "<summary>57 answers that are not right, the first 40 of them</summary>" in text
    assert re.findall(r"<td>case (\d+)</td>", text) == [str(n) for n in range(40)]


def test_the_first_difference_of_two_answers_is_marked() -> None:
    assert difference("45.1", "45.0") == "45.<mark>1</mark>"
    assert difference("45", "45.0") == "45"
    assert difference("<b>", "<i>") == "&lt;<mark>b&gt;</mark>"


# ---- the commands ----


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, the same in 4 bits, and a bundle of each."""
    folder = tmp_path_factory.mktemp("made")
    tiny.write_checkpoint(folder / "original", dtype="float32")
    rounded = ("--scheme", "w4a16-rtn", "--group-size", 32, "--symmetric")
    for arguments in (
        ("quantize", folder / "original", "-o", folder / "rounded", *rounded),
        ("export", folder / "original", "-o", folder / "float", "--dtype", "float32"),
        ("export", folder / "rounded", "-o", folder / "int4"),
    ):
        result = internvl_edge(*arguments)
        assert result.returncode == 0, result.stderr
    return folder


def _json(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / JSON).read_text(encoding="utf-8"))
    return values


def test_quantize_writes_both_files_into_its_folder(made: Path) -> None:
    report = _json(made / "rounded")
    assert (made / "rounded" / HTML).is_file()
    assert report["quantization"]["recipe"]["decoder"] == "w4a16-rtn"
    decoder = next(part for part in report["components"] if part["name"] == "decoder")
    assert 4.5 <= decoder["bits_per_weight"] < 5.5
    stored = sum(path.stat().st_size for path in (made / "rounded").glob("*.safetensors"))
    assert sum(part["bytes"] for part in report["components"]) == pytest.approx(stored, rel=0.15)


def test_export_carries_what_the_quantizer_said_of_these_weights(made: Path, tmp_path: Path) -> None:
    assert QUANTIZATION in Manifest.read(made / "int4").files
    assert QUANTIZATION not in Manifest.read(made / "float").files
    assert read_record(made / "original") is None
    other = Path(shutil.copytree(made / "rounded", tmp_path / "other"))
    assert read_record(other) == read_record(made / "rounded") is not None
    (other / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert read_record(other) is None


def test_evaluate_puts_the_quantization_and_the_answers_into_one_report(made: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    questions = tmp_path / "questions.jsonl"
    lines = [{"images": ["a.png"], "prompt": HOSTILE}, {"prompt": "Why does bread rise?", "answer": "Gas."}]
    questions.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    result = internvl_edge(
        *("evaluate", made / "int4", "--reference", made / "float", "--data", questions, "--max-new-tokens", 4),
        *("--fail-if", "kl<0"),
    )
    assert result.returncode == 0, result.stderr
    assert "int4.report/report.html" in result.stderr
    report = _json(made / "int4.report")
    assert (decode(Quality, report["quality"]).state, report["kind"]) == ("passed", "bundle")
    assert report["quantization"]["recipe"]["decoder"] == "w4a16-rtn"
    assert set(report["comparison"]["kinds"]) == {"images", "text"}
    (sample,) = [each for each in report["comparison"]["samples"] if each["pictures"]]
    assert all(not each["same"] for each in report["comparison"]["samples"] if each is not sample)
    assert sample["question"] == HOSTILE
    assert sample["pictures"][0].startswith("data:image/jpeg;base64,")
    assert sample["same"] == (sample["reference"] == sample["candidate"])
    counted = sum(report["comparison"]["histogram"]["counts"])
    assert counted == report["comparison"]["greedy"]["positions"]
    assert str(made) not in (made / "int4.report" / JSON).read_text(encoding="utf-8"), "paths are nobody's business"
    assert sorted(path.name for path in (made / "int4").iterdir()) == sorted(
        [*Manifest.read(made / "int4").files, "manifest.json"]
    )


# ---- a browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched_browser() as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 360])
def test_a_browser_loads_nothing_else_and_shows_everything(
    browser: Any, written: Path, tmp_path: Path, scheme: str, width: int
) -> None:
    address = (written / HTML).as_uri()
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    requests: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.goto(address)
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert problems == []
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    shown = page.evaluate("[...document.querySelectorAll('svg')].filter(svg => svg.getClientRects().length).length")
    assert shown == 8
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill.match(/\\d+/g).map(Number)[0]")
    assert (light > 200, light > ink) == ((True, True) if scheme == "light" else (False, False))
    page.close()


@pytest.mark.parametrize("name", [JSON, HTML])
def test_files_of_somebody_else_are_not_replaced_by_a_report(tmp_path: Path, name: str) -> None:
    require_own_report(tmp_path / "absent")
    (tmp_path / name).write_text('["years of work"]')
    with pytest.raises(EdgeError, match=f"{tmp_path / name} is no report of ours, .* choose another --report"):
        require_own_report(tmp_path)
    (tmp_path / name).unlink()
    write_report(BARE, tmp_path)
    require_own_report(tmp_path)


# ---- what figures mean, and several bundles ----


def test_the_landmarks_are_the_committed_measurements() -> None:
    results = [
        {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["results"]}
        for path in sorted(RESULTS.glob("reader-quality-*.json"))
    ]
    assert len(results) == 2
    for mark in LANDMARKS:
        rows = [(found["float"], found[name]) for found in results for name in mark.rows]
        kls = [row["kl"] for _, row in rows]
        points = [100 * (row["exact_match"] - whole["exact_match"]) for whole, row in rows]
        assert mark.least == pytest.approx(min(kls), abs=1e-5)
        assert mark.most == pytest.approx(max(kls), abs=1e-5)
        assert mark.points == pytest.approx((min(points), max(points)), abs=0.01)


@pytest.mark.parametrize(
    ("kl", "words"),
    [
        (0.0, "less than any quantization"),
        (0.0002, "what 8-bit weights"),
        (0.001, "more than 8-bit weights, int8 tower or int8 cache cost"),
        (0.005, "what 4-bit weights with AWQ cost"),
        (0.02, "what 4-bit weights rounded without data"),
        (0.5, "16 times the most"),
        (math.nan, "the model is broken"),
    ],
)
def test_every_divergence_has_words(kl: float, words: str) -> None:
    assert words in divergence_in_words(kl)


def _known(name: str, kl: float, **measured: Any) -> Report:
    report = full_report()
    assert report.quality is not None
    how = replace(Measurement("reader", 64, 0, "cpu", "onnxruntime", RUN.date, reference="float"), **measured)
    quality = replace(report.quality, figures={"kl": kl, "top1": 1 - kl}, measured={"comparison": how})
    return replace(report, name=name, quality=quality)


def _rows(found: Overview) -> dict[str, tuple[tuple[str, ...], int | None]]:
    return {row.label: (row.texts, row.best) for row in found.rows}


def test_an_overview_finds_the_best_of_each_row() -> None:
    reports = [_known("a", 0.02), replace(_known("b", 0.01), bytes=900_000_000), _known("c", 0.03)]
    found = overview(reports, ["x/a", "x/b", "x/c"])
    rows = _rows(found)
    assert found.warnings == ()
    assert rows["kl"] == (("0.02", "0.01", "0.03"), 1)
    assert rows["top1"] == (("98.00%", "99.00%", "97.00%"), 1)
    assert rows["all files"] == (("812 MB", "900 MB", "812 MB"), None), "two share the smallest size"
    assert rows["sign, exact_match"][0] == ("95.0% of 500",) * 3
    assert "suite" not in rows


def test_an_overview_says_which_runs_cannot_be_compared() -> None:
    reports = [_known("a", 0.02), _known("a", 0.01, seed=3), _known("c", 0.03)]
    found = overview(reports, ["x/a", "y/a", "c"])
    assert found.names == ("x/a", "y/a", "c"), "folders of one name are told apart"
    (warning,) = found.warnings
    assert "x/a and y/a: seed is 0 in one run and 3 in the other" in warning
    assert _rows(found)["kl"] == (("0.02", "0.01", "0.03"), None)


def test_an_overview_shows_the_answers_that_differ() -> None:
    first, second = _known("a", 0.02), _known("b", 0.02)
    assert first.comparison is not None
    assert second.comparison is not None
    pair = replace(first.comparison.samples[0], candidate="GO")
    first = replace(first, comparison=replace(first.comparison, samples=(pair, replace(pair, name="other", same=True))))
    second = replace(second, comparison=replace(second.comparison, samples=()))
    (answers,) = overview([first, second], ["a", "b"]).answers
    assert (answers.reference, answers.candidates) == ("STOP", ("GO", None))


def test_the_overview_page_is_a_page_of_ours(tmp_path: Path) -> None:
    reports = [_known("a", 0.02), _known("b", 0.01, seed=1)]
    found = overview(reports, ["a", "b"])
    written = write_overview(found, reports, tmp_path)
    assert written.html is not None
    text = written.html.read_text(encoding="utf-8")
    values = json.loads(written.json.read_text(encoding="utf-8"))
    assert [bundle["quality"]["figures"]["kl"] for bundle in values["bundles"]] == [0.02, 0.01]
    assert values["warnings"] == list(found.warnings)
    assert "<script" not in text
    assert "https://" not in text.replace(HOSTILE, "").replace("https://example.com", "")
    assert "seed is 0 in one run and 1 in the other" in text
    assert text.count("<svg") == 1


def test_the_command_shows_bundles_and_a_timed_one_has_its_speed_on_the_page(made: Path, tmp_path: Path) -> None:
    result = internvl_edge("report", made / "float", made / "int4", "-o", tmp_path / "page")
    assert result.returncode == 0, result.stderr
    assert "all files" in result.stdout
    assert (tmp_path / "page" / "overview.html").exists()
    assert "Not measured yet: internvl-edge bench int4 --report" in render(find_report(made / "int4"))
    assert_one_line(internvl_edge("report", tmp_path), "neither a bundle nor a folder with a report.json")


def test_bench_completes_the_report_of_a_bundle(made: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(made / "int4", tmp_path / "int4"))
    result = internvl_edge("bench", bundle, "--report", "--repeat", 1, "--threads", 1)
    assert result.returncode == 0, result.stderr
    report = read_report(tmp_path / "int4.report")
    assert report is not None
    assert report.speed is not None
    assert {figure.name for figure in report.speed.figures} > {"load", "decode at 300"}
    assert report.commands["speed"].endswith("bench int4 --repeat 1 --report --threads 1")
    assert "tokens/s after 300 tokens" in (tmp_path / "int4.report" / HTML).read_text(encoding="utf-8")
    kept = replace(find_report(bundle), speed=None).completed_by(report)
    assert kept.speed == report.speed
    assert kept.commands == report.commands
