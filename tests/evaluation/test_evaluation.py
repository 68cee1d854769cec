"""Comparing two bundles, and judging one by a suite: figures against torch, and every mistake as one line."""

from __future__ import annotations

import errno
import io
import json
import re
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import internvl_edge as package
from helpers import tiny, tiny_quantized
from helpers.commands import assert_one_line, internvl_edge
from helpers.reference import Reference, tile_image
from internvl_edge import EdgeError, InternVL, evaluate, export_bundle
from internvl_edge.base.progress import Progress
from internvl_edge.base.units import share
from internvl_edge.bundle.gate import judge, parse_condition
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.quality import Quality
from internvl_edge.bundle.quality_record import quality_of, record_quality
from internvl_edge.cli import output
from internvl_edge.evaluation import (
    Case,
    Comparison,
    EvaluationSettings,
    Mistake,
    QuestionSettings,
    Suite,
    compare,
    reference_bundle,
    run_suite,
)
from internvl_edge.evaluation.divergence import Divergence, divergence, summarize
from internvl_edge.evaluation.metrics import bootstrap, wilson
from internvl_edge.evaluation.report import read_report


class Pair(NamedTuple):
    """A checkpoint, the same with weights rounded to 4 bits (stored as floats), and a bundle of each."""

    original: Path
    rounded: Path
    reference: Path
    candidate: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    original = tiny.write_checkpoint(folder / "original", text="internlm2", dtype="float32")
    _, rounded = tiny_quantized.write_quantized(original, folder / "quantized")
    bundles = [export_bundle(made, folder / f"{made.name}-bundle") for made in (original, rounded)]
    return Pair(original, rounded, *bundles)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)).save(path)
    return [Case("picture", "What is this?", (path,), "A cat."), Case("text", "Why does bread rise?")]


@pytest.fixture(scope="module")
def comparison(pair: Pair, cases: list[Case]) -> Comparison:
    return _compare(pair.candidate, pair.reference, cases)


def _compare(candidate: Path, reference: Path, cases: list[Case], shown: int = 0) -> Comparison:
    def loading(path: Path) -> InternVL:
        return InternVL.load(path, engine="onnxruntime", threads=1)

    settings = QuestionSettings(max_new_tokens=8)
    return compare(lambda: loading(candidate), lambda: loading(reference), cases, settings, shown=shown)


# ---- figures ----


def _logits(seed: int, positions: int = 12, vocabulary: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=3, size=(positions, vocabulary)).astype(np.float32)


def test_divergence_and_perplexity_are_torchs() -> None:
    reference, candidate, targets = _logits(0), _logits(1), np.arange(12)
    found = divergence(reference, candidate, targets)
    p, q = (F.log_softmax(torch.from_numpy(x).double(), dim=-1) for x in (reference, candidate))
    np.testing.assert_allclose(found.kl, F.kl_div(q, p, reduction="none", log_target=True).sum(-1), rtol=1e-12)
    expected = F.cross_entropy(torch.from_numpy(candidate).double(), torch.from_numpy(targets)).exp()
    assert summarize([found]).candidate_perplexity == pytest.approx(float(expected), rel=1e-12)


def test_the_same_predictions_diverge_by_nothing_and_padding_is_no_nan() -> None:
    logits = _logits(2)
    logits[:, 40:] = -3e4
    found = divergence(logits, logits, np.zeros(12, int))
    assert found.kl.max() == 0
    assert found.same_prefix == 12
    assert summarize([found]).top1_agreement == 1


def test_positions_count_the_same_whatever_their_sequence() -> None:
    parts = [divergence(_logits(0, n), _logits(1, n), np.zeros(n, int)) for n in (2, 10)]
    together = summarize(parts)
    assert together.positions == 12
    assert together.kl_mean == pytest.approx(np.concatenate([part.kl for part in parts]).mean())
    assert together.kl_mean != pytest.approx(np.mean([part.kl.mean() for part in parts]))


def test_the_same_prefix_ends_at_the_first_difference() -> None:
    reference, candidate = _logits(0), _logits(0)
    candidate[7, reference[7].argmin()] = reference[7].max() + 1
    assert divergence(reference, candidate, np.zeros(12, int)).same_prefix == 7


# ---- two models ----


def test_a_comparison_is_that_of_the_torch_reference(pair: Pair, cases: list[Case], comparison: Comparison) -> None:
    """Each answer anew in torch: greedy by the original, then both models' logits along it."""
    original, rounded = Reference(pair.original), Reference(pair.rounded)
    parts, same = [], []
    for case in cases:
        tiles = tile_image(Image.open(case.images[0]), 12, size=56) if case.images else None
        with InternVL.load(pair.reference, threads=1) as model:
            prompt = model.chat(case.question, list(case.images), max_new_tokens=1).prompt_ids
        greedy = original.generate(prompt, tiles, max_new_tokens=8)
        along = rounded.generate(prompt, tiles, forced=greedy.ids).step_logits
        parts.append(divergence(greedy.step_logits.numpy(), along.numpy(), greedy.ids))
        same.append(rounded.generate(prompt, tiles, max_new_tokens=8).ids == greedy.ids)
    expected = summarize(parts)
    assert comparison.greedy.kl_mean > 1e-3, "rounding that changes nothing shows nothing"
    assert comparison.greedy.kl_mean == pytest.approx(expected.kl_mean, rel=1e-3)
    assert comparison.greedy.kl_max == pytest.approx(expected.kl_max, rel=1e-3)
    assert comparison.greedy.top1_agreement == expected.top1_agreement
    assert comparison.greedy.positions == expected.positions
    assert comparison.same_answers == np.mean(same)


def test_given_answers_have_the_perplexity_of_the_torch_reference(
    pair: Pair, cases: list[Case], comparison: Comparison
) -> None:
    case = cases[0]
    tiles = tile_image(Image.open(case.images[0]), 12, size=56)
    with InternVL.load(pair.reference, threads=1) as model:
        prompt = model.chat(case.question, list(case.images), max_new_tokens=1).prompt_ids
        answer = model.answer_ids(case.answer)
    assert comparison.answers is not None
    for folder, found in (
        (pair.original, comparison.answers.reference_perplexity),
        (pair.rounded, comparison.answers.candidate_perplexity),
    ):
        logits = Reference(folder).generate(prompt, tiles, forced=answer).step_logits
        assert found == pytest.approx(float(F.cross_entropy(logits, torch.tensor(answer)).exp()), rel=1e-3)


def test_a_bundle_equals_its_checkpoint(pair: Pair, cases: list[Case]) -> None:
    with reference_bundle(str(pair.original)) as exported:
        found = _compare(pair.reference, exported, cases)
    assert not exported.exists()
    assert found.greedy.kl_max < 1e-9
    assert (found.same_answers, found.same_prefix, found.greedy.top1_agreement) == (1, 1, 1)


def test_answers_that_are_shown_are_those_the_models_give_by_themselves(pair: Pair, cases: list[Case]) -> None:
    found = _compare(pair.candidate, pair.reference, [cases[1], *[cases[0]] * 3], shown=2)
    assert [sample.name for sample in found.samples] == ["picture", "picture"], "pictures come first"
    said = []
    for folder in (pair.reference, pair.candidate):
        with InternVL.load(folder, engine="onnxruntime", threads=1) as model:
            said.append(model.chat(cases[0].question, list(cases[0].images), max_new_tokens=8))
    assert (found.samples[0].reference, found.samples[0].candidate) == (said[0].text, said[1].text)
    assert found.samples[0].same == (said[0].output_ids == said[1].output_ids)


def test_kinds_of_questions_are_also_counted_apart(comparison: Comparison) -> None:
    assert set(comparison.kinds) == {"images", "text"}
    assert sum(kind.positions for kind in comparison.kinds.values()) == comparison.greedy.positions
    weighted = sum(kind.kl_mean * kind.positions for kind in comparison.kinds.values())
    assert weighted / comparison.greedy.positions == pytest.approx(comparison.greedy.kl_mean)
    assert comparison.greedy.kl_mean == comparison.figures["kl"]


def test_the_histogram_is_that_of_the_tokens_of_the_greedy_answers(comparison: Comparison) -> None:
    edges, counts = np.array(comparison.histogram.edges), np.array(comparison.histogram.counts)
    assert counts.sum() == comparison.greedy.positions
    assert (edges[:-1] * counts).sum() <= comparison.figures["kl"] * counts.sum() <= (edges[1:] * counts).sum()
    last = counts.nonzero()[0][-1]
    assert edges[last] <= comparison.figures["kl_max"] < edges[last + 1]


def test_models_with_other_prompts_are_not_compared(pair: Pair, cases: list[Case], tmp_path: Path) -> None:
    other = export_bundle(tiny.write_checkpoint(tmp_path / "other"), tmp_path / "bundle")
    with pytest.raises(EdgeError, match="compare bundles of the same model"):
        _compare(other, pair.reference, cases)


def test_a_full_disk_is_named_with_what_to_do(pair: Pair, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, array: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(
        EdgeError, match=r"logits in /.*\(No space left on device\), .* MB a case; set TMPDIR .*--samples$"
    ):
        _compare(pair.candidate, pair.reference, cases)


def test_an_answer_along_its_own_tokens_has_the_same_logits(pair: Pair) -> None:
    with InternVL.load(pair.reference, engine="onnxruntime", threads=1) as model:
        free = model.trace("What is this?", max_new_tokens=6)
        forced = model.trace("What is this?", answer=free.reply.output_ids)
    assert forced.reply.output_ids == free.reply.output_ids
    np.testing.assert_allclose(forced.logits, free.logits, atol=1e-4)


# ---- suites ----


def test_a_suite_scores_answers_per_tag_beside_those_of_a_reference(pair: Pair) -> None:
    with InternVL.load(pair.reference, threads=1) as model:
        said = model.chat("What is this?", max_new_tokens=4).text
    right, wrong = (
        Case(name, "What is this?", answer=said + end, tags=(name,)) for name, end in (("a", ""), ("b", "?"))
    )
    suite = Suite("three", [right, replace(right, tags=("a", "c")), wrong], "exact_match")
    log = io.StringIO()
    with Progress(log) as progress:
        score = run_suite(
            lambda: InternVL.load(pair.reference, threads=1),
            suite,
            QuestionSettings("three", max_new_tokens=4),
            lambda: InternVL.load(pair.candidate, threads=1),
            progress,
        )
    exact = [score.tags[tag]["exact_match"] for tag in "abc"] + [score.total["exact_match"]]
    assert [result.bundle.value for result in exact] == [1, 0, 1, 2 / 3]
    assert [result.asked for result in exact] == [2, 1, 1, 3]
    assert exact[3].bundle == wilson(2, 3)
    assert "choice_accuracy" not in score.total, "no question has choices"
    assert score.mistakes == (Mistake("b", said + "?", said),)
    with InternVL.load(pair.candidate, threads=1) as model:
        other = model.chat("What is this?", max_new_tokens=4).text
    expected = [float(other == said), float(other == said + "?")]
    assert [score.tags[tag]["exact_match"].reference for tag in "ab"] == [
        wilson(round(2 * expected[0]), 2),
        wilson(round(expected[1]), 1),
    ]
    assert score.figures["exact_match_loss"] == pytest.approx((2 * expected[0] + expected[1]) / 3 - 2 / 3)
    loss = score.total["exact_match"].loss
    assert loss == bootstrap([expected[0] - 1, expected[0] - 1, expected[1]])
    shown = [f"internvl-edge: answering the suite with the {who}, 3 questions" for who in ("bundle", "reference")]
    assert [line for line in log.getvalue().splitlines() if ", 3 questions" in line] == shown


def test_a_file_of_own_questions_is_scored_recorded_and_judged(pair: Pair, tmp_path: Path) -> None:
    """The command, from a file with tags and choices to the manifest, the report and the exit status."""
    bundle = shutil.copytree(pair.candidate, tmp_path / "bundle")
    with InternVL.load(bundle, threads=1) as model:
        said = model.chat("What is this?", max_new_tokens=3).text
    lines = [
        {"id": "one", "prompt": "What is this?", "answer": [said + "!", "no", said], "tags": ["x", "y"]},
        {"id": "two", "prompt": "What is this?", "answer": "B", "choices": ["never", f"{said} indeed"], "tags": "y"},
    ]
    data = tmp_path / "own.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    common = (
        "evaluate",
        bundle,
        "--suite",
        data,
        "--threads",
        1,
        "--max-new-tokens",
        3,
        "--report",
        tmp_path / "report",
    )
    found = internvl_edge(*common, "--json", "--fail-if", "exact_match<0.6", "--fail-if", "choice_accuracy<0")
    assert found.returncode == 1, found.stderr
    assert "failed: exact_match is 50.00% (exact_match<0.6)" in found.stderr
    printed = json.loads(found.stdout)
    assert (printed["suite"], printed["metric"], printed["asked"]) == ("own.jsonl", "exact_match", 2)
    assert printed["scores"]["exact_match"] == {
        "asked": 2,
        "bundle": asdict(wilson(1, 2)),
        "reference": None,
        "loss": None,
    }
    assert printed["scores"]["choice_accuracy"]["asked"] == 1
    assert {tag: scores["exact_match"]["bundle"]["value"] for tag, scores in printed["tags"].items()} == {
        "x": 1,
        "y": 0.5,
    }
    assert printed["wrong"] == [{"case": "two", "expected": "B", "answered": said}]
    recorded, report = quality_of(Manifest.read(bundle)), read_report(tmp_path / "report")
    assert report is not None
    assert report.suite is not None
    assert report.suite.figures == recorded.figures == printed["figures"]
    assert recorded.measured["suite"].data == "own.jsonl"
    assert recorded.measured["suite"].answer_tokens == 3

    reader = ("evaluate", bundle, "--suite", "reader", "--samples", 3, "--max-new-tokens", 3, "--threads", 1)
    assert_one_line(
        internvl_edge(*reader, "--no-report"),
        "2 questions of own.jsonl",
        "data is own.jsonl in one run and reader in the other",
        "--replace",
    )
    assert internvl_edge(*reader, "--no-report", "--replace").returncode == 0
    assert quality_of(Manifest.read(bundle)).gate == (), "conditions on one suite do not hold for another"


def test_a_table_of_a_suite_has_intervals_and_tags(pair: Pair, tmp_path: Path) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text(json.dumps({"prompt": "Why?", "answer": "x", "tags": ["t"]}), encoding="utf-8")
    common = ("--suite", data, "--metric", "anls", "--threads", 1, "--max-new-tokens", 2, "--no-report", "--no-record")
    found = internvl_edge("evaluate", pair.candidate, "--reference", pair.reference, *common, "--samples", 1)
    assert found.returncode == 0, found.stderr
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in found.stdout.splitlines())
    assert rows["suite"] == "1 question of own.jsonl"
    assert rows["anls"] == rows["t"] == "0% (0% to 0%) of 1, reference 0%, loss 0% (0% to 0%)"
    assert rows["exact_match"].startswith(f"0% (0% to {share(wilson(0, 1).high)}) of 1")
    assert rows["intervals"] == "95 %, wilson and bootstrap"


# ---- the command ----


def test_the_command_prints_figures_of_users_data(pair: Pair, cases: list[Case], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    lines = [{"images": [str(case.images[0])] if case.images else [], "prompt": case.question} for case in cases]
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    common = ("--data", data, "--max-new-tokens", 4, "--threads", 1)
    result = internvl_edge("evaluate", pair.candidate, "--reference", pair.reference, *common, "--json")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert (printed["cases"], printed["answers"]) == (2, None)
    assert printed["greedy"]["kl_mean"] > 0
    table = internvl_edge("evaluate", pair.candidate, "--reference", pair.original, *common, "--no-record")
    assert table.returncode == 0, table.stderr
    assert f"same most probable token  {share(printed['greedy']['top1_agreement'])}" in table.stdout


def test_the_figures_are_those_of_the_manifest_the_report_and_the_library(pair: Pair, tmp_path: Path) -> None:
    asked = {"samples": 2, "seed": 5, "max_tiles": 1, "max_new_tokens": 4, "threads": 1}
    options = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", value)]
    both = ("--reference", pair.reference, "--suite", "reader", "--fail-if", "kl>=0", "--fail-if", "top1<0")
    shown = ("--report", tmp_path / "report", "--json", "--replace")  # other tests may have measured it otherwise
    result = internvl_edge("evaluate", pair.candidate, *both, *options, *shown)
    assert result.returncode == 1, result.stderr
    printed = json.loads(result.stdout)
    assert {"kl", "top1", "exact_match", "exact_match_loss"} < printed["figures"].keys()
    recorded, report = quality_of(Manifest.read(pair.candidate)), read_report(tmp_path / "report")
    assert report is not None
    assert report.comparison is not None
    assert report.suite is not None
    assert report.quality == recorded
    assert recorded.figures == printed["figures"] == {**report.comparison.figures, **report.suite.figures}
    assert asdict(report.comparison.greedy) == printed["greedy"]
    assert [asdict(mistake) for mistake in report.suite.mistakes] == printed["wrong"]
    found = evaluate(
        EvaluationSettings(
            pair.candidate, str(pair.reference), "reader", fail_if=("kl>=0", "top1<0"), engine="onnxruntime", **asked
        )
    )
    assert found.figures == printed["figures"]
    assert [verdict.condition for verdict in found.failed] == ["kl>=0"]
    assert found.comparison is not None
    assert replace(found.comparison, run=report.comparison.run) == report.comparison


def test_a_smaller_run_replaces_recorded_figures_only_when_asked(pair: Pair, tmp_path: Path) -> None:
    bundle = shutil.copytree(pair.candidate, tmp_path / "bundle")
    record_quality(bundle, Quality(Manifest.read(bundle).fingerprint))  # other tests may have measured it
    common = ("evaluate", bundle, "--reference", pair.reference, "--max-tiles", 1, "--threads", 1, "--no-report")

    def recorded() -> tuple[int, set[str]]:
        quality = quality_of(Manifest.read(bundle))
        return quality.measured["comparison"].questions, {verdict.condition for verdict in quality.gate}

    first = internvl_edge(*common, "--samples", 3, "--max-new-tokens", 4, "--fail-if", "kl>9")
    assert first.returncode == 0, first.stderr
    for smaller in (("--samples", 2, "--max-new-tokens", 4), ("--samples", 3, "--max-new-tokens", 3)):
        assert_one_line(internvl_edge(*common, *smaller), "figures of 3 questions", "--replace", "--no-record")
        assert internvl_edge(*common, *smaller, "--no-record").returncode == 0
    without_reference = (*common[:2], *common[4:], "--suite", "reader", "--samples", 1)
    assert internvl_edge(*without_reference).returncode == 0, "a run of the other kind replaces nothing"
    assert recorded() == (3, {"kl>9"})
    replaced = internvl_edge(*common, "--samples", 2, "--max-new-tokens", 4, "--fail-if", "kl>8", "--replace")
    assert "condition kl>9 of an earlier run is replaced by kl>8" in replaced.stderr
    assert recorded() == (2, {"kl>8"})


def test_settings_that_do_not_fit_together_are_refused() -> None:
    for values, message in (
        ({"suite": "none"}, "no suite 'none'; known are reader, or give a file"),
        ({"suite": "reader", "images": "x"}, "--images is the folder"),
        ({"suite": "reader", "metric": "bleu"}, "no metric 'bleu' of a suite; known are exact_match"),
        ({"reference": "r", "metric": "anls"}, "--metric chooses how a --suite is judged"),
        ({"data": "questions.jsonl"}, "--data is compared with a --reference"),
        ({"fail_if": ("kl>1",)}, "--fail-if needs figures"),
        ({"reference": "r", "fail_if": ("kl",)}, "METRIC"),
        ({"reference": "r", "samples": 0}, "at least 1"),
    ):
        with pytest.raises(EdgeError, match=message):
            EvaluationSettings("bundle", **values)
    with pytest.raises(EdgeError, match="give --reference"):
        evaluate(EvaluationSettings("bundle"))


def test_the_package_hands_on_every_name_that_it_lists() -> None:
    for name in package.__all__:
        assert getattr(package, name).__name__ == name


def test_mistakes_are_one_line(pair: Pair, tmp_path: Path) -> None:
    assert_one_line(internvl_edge("evaluate", pair.candidate), "--reference", "--suite")
    broken = tmp_path / "data.jsonl"
    broken.write_text('{"prompt": 3}\n', encoding="utf-8")
    compared = ("evaluate", pair.candidate, "--no-record", "--reference", pair.reference, "--data")
    assert_one_line(internvl_edge(*compared, broken), "data.jsonl:1", "not a text")
    assert_one_line(internvl_edge(*compared, tmp_path / "none"), "does not exist")
    missing = tmp_path / "missing.jsonl"
    missing.write_text('{"images": ["none.png"], "prompt": "What?"}\n', encoding="utf-8")
    assert_one_line(internvl_edge(*compared, missing), "missing.jsonl:1", "none.png")


def _compare_module() -> Any:
    """The module; its name in the package is that of the function."""
    return sys.modules["internvl_edge.evaluation.compare"]


def _followed(kl: list[float], same: bool) -> Any:
    same_top = np.ones(len(kl), bool)
    same_top[-1] = same
    part = Divergence(np.array(kl), same_top, np.zeros(len(kl)), np.zeros(len(kl)))
    return _compare_module()._CandidateAnswer(part, None, 0)


def test_cases_whose_answers_differ_are_shown_first() -> None:
    picture = (Image.new("RGB", (8, 8)),)
    cases = [Case(f"{index}", "q", picture if index % 2 else ()) for index in range(20)]
    followed = [_followed([0.01 * index], True) for index in range(20)]
    for index, kl in ((4, 9.0), (7, 0.5), (13, 0.6)):  # of the text (4), the divergence is the largest
        followed[index] = _followed([kl], False)
    assert _compare_module()._chosen(cases, followed, 2) == [13, 7]
    assert _compare_module()._chosen(cases, followed, 3) == [13, 7, 4]
    chosen = _compare_module()._chosen(cases, followed, 6)
    assert chosen[:3] == [13, 7, 4]
    assert chosen[3:] == sorted(chosen[3:])
    assert 19 in chosen[3:]  # the largest divergence of those that are the same
    assert all(index % 2 for index in chosen[3:])
    assert len(set(chosen)) == 6
    assert _compare_module()._chosen(cases, followed, 0) == []
    assert len(_compare_module()._chosen(cases, followed, 50)) == 3 + 8


@pytest.mark.parametrize(("nll", "meaningful"), [(np.log(999), True), (np.log(1001), False), (12.0, False)])
def test_perplexity_of_what_the_reference_would_not_say_is_left_out(
    comparison: Comparison, nll: float, meaningful: bool
) -> None:
    part = Divergence(np.zeros(4), np.ones(4, bool), np.full(4, nll), np.full(4, nll + 0.1))
    found = replace(comparison, answers=summarize([part]))
    assert ("perplexity_ratio" in found.figures) == meaningful
    rows = {str(name): str(value) for name, value in output._comparison_rows(found)}
    said = rows["perplexity of the answers"]
    assert said.startswith("left out: the reference's is ") != meaningful
    assert not re.search(r"\d{6}|\.\d{5}", " ".join(rows.values()))
    if not meaningful:
        assert "above 1,000" in said
        verdict = judge([parse_condition("perplexity_ratio>1.2")], found.figures)[0]
        assert str(verdict) == "perplexity_ratio is not measured (perplexity_ratio>1.2)"


def test_the_report_says_how_to_repeat_it(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "my bundle").symlink_to(pair.candidate)
    (tmp_path / "q.jsonl").write_text('{"prompt": "Why?", "answer": "So."}\n')
    words = ("evaluate", "my bundle", "--reference", str(pair.reference), "--data", str(tmp_path / "q.jsonl"))
    words = (*words, "--max-new-tokens", "2", "--no-record", "--fail-if", "kl<0", "--fail-if", "top1<0")
    words = (*words, "--report", "r")
    run = partial(internvl_edge, directory=tmp_path)
    assert run(*words, "--json", "--quiet").returncode == 0
    (command,) = json.loads((tmp_path / "r" / "report.json").read_text())["commands"].values()
    repeated = [pair.reference.name if word == str(pair.reference) else word for word in words]
    repeated = ["q.jsonl" if word == str(tmp_path / "q.jsonl") else word for word in repeated]
    assert sorted(shlex.split(command)[1:]) == sorted(repeated)
    assert "evaluate &#39;my bundle&#39; --reference" in (tmp_path / "r" / "report.html").read_text()
    (tmp_path / pair.reference.name).symlink_to(pair.reference)
    assert run(*shlex.split(command)[1:]).returncode == 0
