"""Conditions on figures, the manifest that carries them, and what a bundle with a failed or missing gate says."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from helpers import tiny, tiny_quantized
from helpers.commands import assert_one_line, internvl_edge
from helpers.manifests import change_manifest
from internvl_edge import InternVL, QualityWarning, export_bundle
from internvl_edge.base.errors import BundleError, EdgeError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.gate import METRICS, Condition, Verdict, judge, parse_condition, require_measurable
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.names import DECODERS, MANIFEST
from internvl_edge.bundle.quality import _COMPARED, Measurement, Quality
from internvl_edge.bundle.quality_record import quality_of, quality_warning, record_quality
from internvl_edge.cli import cli
from internvl_edge.evaluation import Comparison, compare, evaluator

FIGURES = {"kl": 0.02, "exact_match": 0.97}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float bundle and one of the same model in 4 bits."""
    folder = tmp_path_factory.mktemp("made")
    original = tiny.write_checkpoint(folder / "original", dtype="float32")
    quantized, _ = tiny_quantized.write_quantized(original, folder)
    return export_bundle(original, folder / "float"), export_bundle(quantized, folder / "int4")


@pytest.fixture
def quantized(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the 4-bit bundle, of which nothing is known."""
    return Path(shutil.copytree(made[1], tmp_path / "bundle"))


def _graded(folder: Path, *conditions: str, accepted: str = "") -> Quality:
    """Record FIGURES and conditions in a bundle's manifest."""
    known = quality_of(Manifest.read(folder))
    quality = known.with_figures(FIGURES, {}, map(parse_condition, conditions))
    quality = replace(quality, accepted=accepted)
    record_quality(folder, quality)
    return quality


# ---- conditions ----


@pytest.mark.parametrize(
    ("text", "passing", "failing"),
    [
        ("kl>0.05", 0.05, 0.0500001),
        ("kl >= 5e-2", 0.0499999, 0.05),
        ("exact_match<0.95", 0.95, 0.9499999),
        (" exact_match <= 0.95 ", 0.9500001, 0.95),
        ("exact_match_loss>-.1", -0.2, 0.0),
    ],
)
def test_a_condition_holds_on_its_side_of_the_limit(text: str, passing: float, failing: float) -> None:
    condition = parse_condition(text)
    assert not condition.fails(passing)
    assert condition.fails(failing)


def test_what_is_no_number_fails_every_condition() -> None:
    for sign in ("<", "<=", ">", ">="):
        assert Condition("kl", sign, 0.5).fails(math.nan)
    assert judge([parse_condition("kl>0.05")], {})[0].failed


@pytest.mark.parametrize("text", ["", "kl", "kl=0.05", "kl==0.05", "0.05<kl", "kl>0.05 and top1<1", "kl>", "kl><1"])
def test_what_is_no_condition_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(EdgeError, match=r"METRIC.*kl>0\.05|is not a number|there is no metric"):
        parse_condition(text)


@pytest.mark.parametrize("text", ["kl>five", "kl>nan", "kl>inf", "kl>0,05"])
def test_a_limit_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(EdgeError, match="not a number"):
        parse_condition(text)


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(EdgeError, match="no metric 'perplexity'") as error:
        parse_condition("perplexity>20")
    for metric in METRICS:
        assert metric in str(error.value)


@pytest.mark.parametrize("limit", [0.05, 1.0, 1e-7, 0.1 + 0.2, 123456.789])
def test_a_condition_survives_being_written(limit: float) -> None:
    condition = Condition("kl", ">=", limit)
    assert parse_condition(str(condition)) == condition


def test_conditions_on_what_is_not_measured_are_refused() -> None:
    conditions = [parse_condition("exact_match_loss>0.01")]
    require_measurable(conditions, ["suite", "reference"])
    with pytest.raises(EdgeError, match="needs --reference"):
        require_measurable(conditions, ["suite"])
    with pytest.raises(EdgeError, match="data that holds answers"):
        require_measurable([parse_condition("perplexity_ratio>1.1")], ["reference"])
    with pytest.raises(EdgeError, match=r"choice_accuracy<0\.5 needs a suite with choices"):
        require_measurable([parse_condition("choice_accuracy<0.5")], ["suite"])


# ---- the manifest ----


def test_figures_and_conditions_survive_the_manifest(quantized: Path) -> None:
    recorded = _graded(quantized, "kl>0.05", "exact_match<0.99")
    assert [verdict.failed for verdict in recorded.gate] == [False, True]
    reread = quality_of(Bundle.open(quantized).manifest)
    assert reread == recorded
    assert (reread.state, reread.figures) == ("failed", FIGURES)


def test_a_figure_that_is_no_number_survives_the_manifest(quantized: Path) -> None:
    record_quality(
        quantized, Quality(Manifest.read(quantized).fingerprint, {}, {}, (Verdict("kl>0.05", math.nan, True),))
    )
    json.loads((quantized / MANIFEST).read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert math.isnan(quality_of(Manifest.read(quantized)).gate[0].value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_figures_of_a_broken_model_are_null_in_json_and_fail_when_read_back(quantized: Path, value: float) -> None:
    record_quality(
        quantized, Quality(Manifest.read(quantized).fingerprint).with_figures({"kl": value, "top1": 0.5}, {}, [])
    )
    written = json.loads((quantized / MANIFEST).read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert written["quality"]["figures"] == {"kl": None, "top1": 0.5}
    reread = quality_of(Manifest.read(quantized))
    assert math.isnan(reread.figures["kl"])
    assert reread.with_figures({}, {}, [parse_condition("kl>0.05")]).state == "failed"


def test_recording_changes_the_manifest_alone_and_in_one_step(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in quantized.iterdir()}
    whole = (quantized / MANIFEST).read_text(encoding="utf-8")
    (quantized / MANIFEST).chmod(0o640)

    def interrupted(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", interrupted)
        with pytest.raises(BundleError, match=r"cannot be written.*--no-record"):
            _graded(quantized, "kl>0.05")
    assert (quantized / MANIFEST).read_text(encoding="utf-8") == whole
    _graded(quantized, "kl>0.05")
    after = {path.name: path.stat().st_mtime_ns for path in quantized.iterdir()}
    assert set(after) == set(before), "a temporary file was left"
    assert {name for name in after if after[name] != before[name]} == {MANIFEST}
    assert stat.S_IMODE((quantized / MANIFEST).stat().st_mode) == 0o640
    Bundle.open(quantized)


def test_figures_of_other_weights_do_not_count(made: tuple[Path, Path], quantized: Path) -> None:
    """The entry is copied into the manifest of a bundle with other weights."""
    _graded(quantized, "exact_match<0.99")
    strange = Manifest.read(quantized)
    other = replace(Manifest.read(made[0]), quality=strange.quality, linears=strange.linears)
    assert quality_of(other) == Quality(other.fingerprint)
    assert quality_warning(made[0], other) is None


def test_figures_are_not_recorded_for_files_that_changed_meanwhile(made: tuple[Path, Path], quantized: Path) -> None:
    with pytest.raises(BundleError, match="changed while it was evaluated"):
        record_quality(quantized, quality_of(Manifest.read(made[0])))


def test_newer_figures_are_held_against_earlier_conditions() -> None:
    first = Quality("x").with_figures({"kl": 0.02}, {}, [parse_condition("kl>0.05")])
    assert first.state == "passed"
    suite = replace(first, accepted="why not").with_figures({"exact_match": 0.9}, {}, [])
    assert (suite.state, suite.accepted) == ("passed", "")
    worse = suite.with_figures({"kl": 0.06}, {}, [parse_condition("exact_match<0.8")])
    assert [str(verdict.condition) for verdict in worse.failed] == ["kl>0.05"]
    assert len(worse.gate) == 2
    wider = worse.with_figures({}, {}, [parse_condition("kl>=0.1")])
    assert (wider.state, [verdict.condition for verdict in wider.gate]) == ("passed", ["kl>=0.1", "exact_match<0.8"])


def _measured(kind: str, questions: int, answer_tokens: int | None = 64) -> dict[str, Measurement]:
    how = Measurement("reader", questions, 0, "cpu", "onnxruntime", "2026-11-01 12:00 UTC")
    return {kind: replace(how, answer_tokens=answer_tokens)}


def test_figures_of_two_runs_never_stand_together() -> None:
    first = Quality("x").with_figures(
        {"kl": 0.02, "perplexity_ratio": 1.1, "exact_match": 0.9},
        _measured("comparison", 60) | _measured("suite", 500),
        map(parse_condition, ["kl>0.05", "perplexity_ratio>1.2", "exact_match<0.8"]),
    )
    newer = ({"kl": 0.03}, _measured("comparison", 80))
    kept = first.with_figures(*newer, [])
    assert kept.figures == {"kl": 0.03, "exact_match": 0.9}
    assert [verdict.condition for verdict in kept.failed] == ["perplexity_ratio>1.2"], (
        "a condition goes only when asked"
    )
    second = first.with_figures(*newer, [], drop_unmeasured=True)
    assert second.figures == kept.figures
    assert list(map(str, first.unmeasured(*newer))) == ["perplexity_ratio>1.2"]
    assert [verdict.condition for verdict in second.gate] == ["kl>0.05", "exact_match<0.8"]
    assert {kind: how.questions for kind, how in second.measured.items()} == {"comparison": 80, "suite": 500}


def test_conditions_on_a_suite_go_with_its_figures() -> None:
    first = Quality("x").with_figures(
        {"kl": 0.02, "exact_match": 0.9, "anls": 0.95},
        _measured("comparison", 60) | _measured("suite", 500),
        map(parse_condition, ["kl>0.05", "exact_match<0.8", "anls<0.9"]),
    )
    again = first.with_figures({"exact_match": 0.7, "anls": 0.9}, _measured("suite", 500), [])
    assert [str(verdict.condition) for verdict in again.failed] == ["exact_match<0.8"]
    other = {"suite": replace(_measured("suite", 9)["suite"], data="own.jsonl")}
    assert list(map(str, first.unmeasured({"exact_match": 0.1}, other))) == ["exact_match<0.8", "anls<0.9"]
    stated = [parse_condition("exact_match<0.05")]
    newer = first.with_figures({"exact_match": 0.1}, other, stated, drop_unmeasured=True)
    assert newer.figures == {"kl": 0.02, "exact_match": 0.1}
    assert [verdict.condition for verdict in newer.gate] == ["kl>0.05", "exact_match<0.05"]
    assert newer.state == "passed"


@pytest.mark.parametrize(
    ("questions", "answer_tokens", "says_less"), [(60, 64, False), (61, 65, False), (59, 64, True), (500, 63, True)]
)
def test_a_run_says_less_with_fewer_questions_or_shorter_answers(
    questions: int, answer_tokens: int, says_less: bool
) -> None:
    recorded = _measured("comparison", 60)["comparison"]
    newer = replace(recorded, questions=questions, answer_tokens=answer_tokens, date="2026-11-02 12:00 UTC")
    assert ("say less" in recorded.why_kept(newer)) == says_less
    assert not replace(recorded, answer_tokens=None).why_kept(replace(recorded, answer_tokens=1))


@pytest.mark.parametrize(
    "change",
    [
        {"data": "other"},
        {"seed": 1},
        {"reference": "other"},
        {"max_tiles": 1},
        {"device": "cuda"},
        {"engine": "openvino"},
        {"dialect": "standard"},
        {"exact": True},
    ],
)
def test_a_run_of_something_else_does_not_replace_however_large(change: dict[str, Any]) -> None:
    recorded = _measured("comparison", 60)["comparison"]
    newer = replace(recorded, questions=6000, **change)
    assert next(iter(change)).replace("_", " ") in recorded.why_kept(newer)
    assert newer.why_kept(recorded)
    settings = {field.name for field in fields(Measurement)} - {"questions", "date", "answer_tokens"}
    assert set(_COMPARED) == settings, "a new setting is compared, too"


def test_the_device_that_evaluate_takes_by_itself_is_the_cpu() -> None:
    recorded = _measured("comparison", 60)["comparison"]
    assert not recorded.why_kept(replace(recorded, device="auto"))


def test_a_condition_that_replaces_another_is_named() -> None:
    strict = Quality("x").with_figures({"kl": 0.02}, {}, [parse_condition("kl>0.001")])
    newer = [parse_condition("kl>0.05"), parse_condition("top1<0.9")]
    assert [tuple(map(str, pair)) for pair in strict.replaced(newer)] == [("kl>0.001", "kl>0.05")]
    assert strict.replaced(strict.conditions) == []


@pytest.mark.parametrize("damage", [{"gate": [{"condition": "kl"}]}, {"gate": 3}, {"accepted": 1}, {"files": None}])
def test_an_entry_that_cannot_be_read_counts_as_none(quantized: Path, damage: dict[str, Any]) -> None:
    record_quality(quantized, _graded(quantized, "exact_match<0.99"))

    def damaged(values: dict[str, Any]) -> None:
        values["quality"] = {name: value for name, value in (values["quality"] | damage).items() if value is not None}

    change_manifest(quantized, damaged)
    manifest = Manifest.read(quantized)
    assert quality_of(manifest) == Quality(manifest.fingerprint)
    assert quality_warning(quantized, manifest) is None


# ---- warnings ----


def _warnings(folder: Path) -> list[str]:
    """What two loads from one place say under Python's ordinary filter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", QualityWarning)
        for _ in range(2):
            InternVL.load(folder, threads=1).close()
    return [str(warning.message) for warning in caught if warning.category is QualityWarning]


def test_a_bundle_that_nobody_measured_or_gave_a_gate_does_not_warn(quantized: Path) -> None:
    assert _warnings(quantized) == []
    _graded(quantized)
    assert _warnings(quantized) == []


def test_a_failed_gate_warns_once_until_it_is_accepted(quantized: Path) -> None:
    _graded(quantized, "exact_match<0.99")
    (message,) = _warnings(quantized)
    assert "failed its quality gate: exact_match is 97.00% (exact_match<0.99); use another bundle" in message
    assert "\n" not in message
    _graded(quantized, "exact_match<0.99", accepted="good enough for signs")
    assert _warnings(quantized) == []


def test_a_passed_gate_and_float_weights_do_not_warn(made: tuple[Path, Path], quantized: Path) -> None:
    _graded(quantized, "kl>0.05")
    assert _warnings(quantized) == []
    assert _warnings(made[0]) == []


# ---- the commands ----


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    path.write_text('{"prompt": "Why does bread rise?"}\n{"prompt": "What is rain?"}\n', encoding="utf-8")
    return path


def test_a_failed_condition_is_a_line_and_exit_status_1(
    made: tuple[Path, Path], quantized: Path, questions: Path
) -> None:
    evaluate = ("evaluate", quantized, "--reference", made[0], "--data", questions, "--max-new-tokens", 4)
    failed = internvl_edge(*evaluate, "--fail-if", "kl>=0", "--fail-if", "top1<0", "--fail-if", "kl_max>=0", "--json")
    assert failed.returncode == 1, failed.stderr
    lines = [line for line in failed.stderr.splitlines() if line.startswith("failed: ")]
    assert [line.split()[1] for line in lines] == ["kl", "kl_max"]
    printed = json.loads(failed.stdout)
    assert [entry["failed"] for entry in printed["gate"]] == [True, False, True]
    assert quality_of(Manifest.read(quantized)).figures == pytest.approx(printed["figures"])

    run = ("run", quantized, "What is rain?", "--max-new-tokens", 2)
    warned = internvl_edge(*run, "--quiet")
    assert warned.returncode == 0
    assert warned.stderr.count("\n") == 1
    assert warned.stderr.startswith("internvl-edge: warning: ")
    assert "failed its quality gate" in warned.stderr
    shown = internvl_edge("inspect", quantized, "--json")
    facts = json.loads(shown.stdout)
    assert facts["quality"]["state"] == "failed"
    assert [verdict["failed"] for verdict in facts["quality"]["gate"]] == [True, False, True]
    assert facts["quality"]["figures"]["kl"] == pytest.approx(printed["figures"]["kl"])

    accepted = internvl_edge("evaluate", quantized, "--accept", "a test")
    assert accepted.returncode == 0, accepted.stderr
    assert internvl_edge(*run, "--quiet").stderr == ""
    assert json.loads(internvl_edge("inspect", quantized, "--json").stdout)["quality"]["accepted"] == "a test"


def test_a_passed_gate_is_exit_status_0_and_silence(made: tuple[Path, Path], quantized: Path, questions: Path) -> None:
    evaluate = ("evaluate", quantized, "--reference", made[0], "--data", questions, "--max-new-tokens", 4)
    passed = internvl_edge(*evaluate, "--fail-if", "top1<0")
    assert passed.returncode == 0, passed.stderr
    assert "top1 is" in passed.stdout
    assert internvl_edge("run", quantized, "What is rain?", "--max-new-tokens", 2, "--quiet").stderr == ""
    unrecorded = internvl_edge(*evaluate, "--fail-if", "kl>=0", "--no-record", "--no-report")
    assert unrecorded.returncode == 1
    assert quality_of(Manifest.read(quantized)).state == "passed"


@pytest.mark.parametrize(("locked", "hint"), [("bundle", "--no-record"), ("", "--no-report")])
def test_what_cannot_be_written_is_found_out_first(
    quantized: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, locked: str, hint: str
) -> None:
    closed = quantized if locked else quantized.parent
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or Path(path) != closed)
    asked = ["evaluate", str(quantized), "--reference", "nowhere", "--data", str(questions)]
    with pytest.raises(EdgeError, match=hint):
        CliRunner().invoke(cli, asked, catch_exceptions=False)


@pytest.mark.parametrize("suite", [(), ("--suite", "reader")])
def test_a_bundle_that_cannot_be_loaded_is_found_out_before_the_reference_is_exported(
    quantized: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, suite: tuple[str, ...]
) -> None:
    monkeypatch.setattr(evaluator, "reference_bundle", lambda *_, **__: pytest.fail("the reference was prepared"))

    def refused(bundle: Path, *options: str) -> str:
        asked = ["evaluate", str(bundle), "--reference", "nowhere", "--data", str(questions), *suite, *options]
        with pytest.raises(EdgeError) as raised:
            CliRunner().invoke(cli, asked, catch_exceptions=False)
        return str(raised.value)

    assert "not a bundle" in refused(quantized.with_name("typo"))
    assert refused(quantized, "--device", "tensorrt")  # there are no engines, whatever else this machine lacks
    decoder = quantized / DECODERS["onnxruntime"]
    assert "no room" in refused(quantized, "--context", "1")
    changed = bytearray(decoder.read_bytes())
    changed[len(changed) // 2] ^= 1
    decoder.write_bytes(changed)
    assert "was changed" in refused(quantized)
    decoder.unlink()
    manifest = Manifest.read(quantized)
    files = {name: entry for name, entry in manifest.files.items() if name != decoder.name}
    replace(manifest, files=files).write(quantized)
    assert "dialect" in refused(quantized, "--dialect", "onnxruntime")


def test_the_command_prints_null_for_a_broken_model(
    made: tuple[Path, Path], quantized: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> Comparison:
        found = compare(*arguments, **options)
        return replace(found, greedy=replace(found.greedy, kl_mean=math.nan, kl_max=math.inf))

    monkeypatch.setattr(evaluator, "compare", broken)
    asked = ["evaluate", str(quantized), "--reference", str(made[0]), "--data", str(questions), "--json"]
    result = CliRunner().invoke(cli, [*asked, "--max-new-tokens", "2", "--fail-if", "kl>1"], catch_exceptions=False)
    printed = json.loads(result.stdout, parse_constant=pytest.fail)
    assert (printed["figures"]["kl"], printed["greedy"]["kl_max"], printed["gate"][0]["value"]) == (None, None, None)
    assert printed["gate"][0]["failed"]


def test_mistakes_are_one_line_before_anything_is_loaded(quantized: Path, questions: Path) -> None:
    compared = ("evaluate", quantized, "--reference", "nowhere", "--data", questions)
    assert_one_line(internvl_edge(*compared, "--fail-if", "accuracy<0.9"), "no metric 'accuracy'", "kl_p99")
    assert_one_line(internvl_edge(*compared, "--fail-if", "exact_match<0.9"), "exact_match<0.9 needs --suite")
    assert_one_line(internvl_edge(*compared, "--fail-if", "perplexity_ratio>2"), "holds answers")
    assert_one_line(internvl_edge("evaluate", quantized, "--fail-if", "kl>1"), "--fail-if needs figures")
    assert_one_line(internvl_edge("evaluate", quantized, "--accept", " "), "needs a reason")
