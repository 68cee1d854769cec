"""`internvl-edge bench` on a tiny bundle: every figure is there and adds up; speeds themselves are not judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers import tiny
from internvl_edge import export_bundle
from internvl_edge.base.errors import EdgeError, EngineError
from internvl_edge.base.run_record import run_record
from internvl_edge.cli import bench as bench_command
from internvl_edge.cli.bench import command
from internvl_edge.runtime import limits
from internvl_edge.runtime.bench import BenchResult, Figure, bench


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    return export_bundle(tiny.write_checkpoint(folder / "checkpoint"), folder / "bundle")


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_STREAM_BYTES", 8 << 20)
    monkeypatch.setattr(limits, "_MATRIX", 128)


def test_a_report_holds_every_figure(bundle: Path, tmp_path: Path) -> None:
    arguments = [str(bundle), "--repeat", "1", "--threads", "1", "--json", "--plot", str(tmp_path / "bench.png")]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    report = json.loads(result.stdout)
    names = [figure["name"] for figure in report["figures"]]
    assert names == [
        *("load", "vision, 1 tile", "vision, 7 tiles", "prefill 300", "prefill 1800"),
        *("decode at 300", "decode at 2000", "first token, 1 tile + 300", "first token, 7 tiles + 300"),
        "second question, 7 tiles + 300",
    ]
    assert all(figure["value"] > 0 for figure in report["figures"])
    assert report["disk_bytes"] == sum(p.stat().st_size for p in bundle.iterdir() if p.name != "manifest.json")
    assert report["peak_rss_bytes"] > 10e6
    # share of the limit = bytes per token * tokens per second / bandwidth; the weights are float32 here
    decode = report["figures"][5]["value"]
    read = report["decode_limit"]["decode at 300"] * report["bandwidth"] / decode
    assert (bundle / "decoder.data").stat().st_size * 0.8 < read < (bundle / "decoder.data").stat().st_size * 2
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_rows_and_samples_are_measured_where_asked_for(bundle: Path) -> None:
    arguments = [str(bundle), "--repeat", "1", "--threads", "1", "--rows", "3", "--json"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    figures = {figure["name"]: figure for figure in json.loads(result.stdout)["figures"]}
    expected = [f"decode at {context}, {rows}" for context in (300, 2000) for rows in ("1 row", "2 rows")]
    assert list(figures)[-5:] == [*expected, "3 samples, 300 + 32"]
    assert figures["decode at 300, 2 rows"]["unit"] == "tokens/s"


def test_a_table_is_printed_for_people(bundle: Path) -> None:
    result = CliRunner().invoke(command, [str(bundle), "--repeat", "1", "--threads", "1"], catch_exceptions=False)
    assert "of what memory allows" in result.stdout
    assert "peak memory" in result.stdout


@pytest.mark.parametrize(
    ("name", "message"), [("missing/x.png", "no folder"), ("x.foo", "PNG or SVG"), ("x", "PNG"), ("d.png", "written")]
)
def test_a_plot_that_cannot_be_written_is_found_out_before_measuring(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "d.png").mkdir()
    monkeypatch.setattr("internvl_edge.cli.bench.bench", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(EdgeError, match=message):
        CliRunner().invoke(command, [str(bundle), "--plot", str(tmp_path / name)], catch_exceptions=False)


def test_figures_are_printed_even_if_the_plot_fails(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(report: BenchResult, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("internvl_edge.cli.bench._plot", full)
    arguments = [str(bundle), "--repeat", "1", "--threads", "1", "--plot", str(tmp_path / "x.svg")]
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, OSError)
    assert "peak memory" in result.stdout


def test_no_runs_cannot_be_asked_for(bundle: Path) -> None:
    with pytest.raises(EngineError, match="repeat is 0"):
        bench(bundle, repeat=0)


def test_a_context_that_is_too_short_is_found_before_measuring(bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"the context has 1024 tokens, .* needs \d+; give --context"):
        bench(bundle, threads=1, context=1024)


def test_spread_is_half_the_range() -> None:
    assert limits.median_and_spread([1.0, 2.0, 4.0]) == (2.0, 0.75)


def test_a_plot_has_readable_labels_an_axis_for_each_kind_and_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib as mpl

    mpl.rcParams["svg.fonttype"] = "none"  # text stays text in the file
    monkeypatch.setattr(bench_command, "processor", lambda: "Some CPU of Mine")
    figures = [
        Figure("load", 1.234567, "s"),
        Figure("prefill 300", 2271.4, "tokens/s", 0.4),
        Figure("prefill 1800", 22714.0, "tokens/s"),
        Figure("decode at 300", 84.26, "tokens/s"),
    ]
    report = BenchResult("my-bundle", "cpu", 2, 1e10, 1e11, 10, 10, figures, {}, run_record(1.0))
    bench_command._plot(report, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    for label in ("1.23", "2,270", "22,700", "84.3", "my-bundle: Some CPU of Mine, 2 threads"):
        assert f">{label}<" in text
    assert ">prefill tokens/s<" in text
    assert ">decode tokens/s<" in text
    assert "e+0" not in text
