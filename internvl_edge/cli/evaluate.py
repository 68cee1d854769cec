"""`internvl-edge evaluate BUNDLE --reference CHECKPOINT|BUNDLE`, or `--suite NAME`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.request import ChatOptions

from ..errors import EdgeError
from ..evaluation import SUITES, Comparison, SuiteScore, compare, read_cases, reference_bundle, run_suite
from ..evaluation.divergence import Summary
from .options import load_model, loading_options
from .output import print_json, print_table

_SUITE_ANSWER_TOKENS = 256


@click.command("evaluate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--reference", help="What to compare with: a checkpoint (folder or hub id) or a bundle.")
@click.option("--suite", type=click.Choice(list(SUITES)), help="Count exact answers to a suite's questions.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Images or JSON Lines to compare on [default: the built-in set]."
)
@click.option("--samples", type=click.IntRange(min=1), help="How many [default: 32, of a suite 500].")
@click.option("--seed", type=int, default=0, show_default=True, help="Which samples, and in which order.")
@click.option("--max-tiles", type=click.IntRange(min=1), help="Most tiles of an image.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Compared per answer."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@loading_options
def command(
    bundle: Path,
    reference: str | None,
    suite: str | None,
    data: Path | None,
    samples: int | None,
    seed: int,
    max_tiles: int | None,
    max_new_tokens: int,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure how good BUNDLE is.

    With --reference, both answer the same questions: how far do predictions and answers differ? With --suite, answers
    are compared with the right ones.
    """
    if (reference is None) == (suite is None):
        raise EdgeError("give either --reference, a checkpoint or a bundle to compare with, or --suite")
    options: ChatOptions = {"max_tiles": max_tiles, "max_new_tokens": max_new_tokens}
    if suite is not None:
        if data is not None:
            raise EdgeError("--suite brings its own questions; leave --data out")
        options["max_new_tokens"] = _SUITE_ANSWER_TOKENS
        score = _suite(bundle, suite, samples or 500, seed, options, values)
        _print(as_json, {"bundle": str(bundle), "suite": suite, "seed": seed, **score.to_dict()}, _suite_rows(score))
        return
    assert reference is not None
    found = _compare(bundle, reference, data, samples or 32, seed, options, values)
    facts = {"bundle": str(bundle), "reference": reference, "data": str(data or "built-in"), "seed": seed}
    _print(as_json, {**facts, **found.to_dict()}, _comparison_rows(found))


def _compare(
    bundle: Path,
    reference: str,
    data: Path | None,
    samples: int,
    seed: int,
    options: ChatOptions,
    values: dict[str, Any],
) -> Comparison:
    cases = read_cases(data, samples, seed)
    with reference_bundle(reference, progress=sys.stderr.isatty()) as folder, _bar(2 * len(cases)) as advance:

        def load(path: Path) -> Callable[[], InternVL]:
            return lambda: load_model(path, dict(values))

        return compare(load(bundle), load(folder), cases, options, advance)


def _suite(
    bundle: Path, suite: str, samples: int, seed: int, options: ChatOptions, values: dict[str, Any]
) -> SuiteScore:
    with load_model(bundle, values) as model, _bar(samples) as advance:
        return run_suite(model, itertools.islice(SUITES[suite](seed), samples), options, advance)


def _print(as_json: bool, values: dict[str, Any], rows: list[tuple[str, object]]) -> None:
    if as_json:
        print_json(values)
    else:
        print_table(rows)


def _comparison_rows(found: Comparison) -> list[tuple[str, object]]:
    return [
        ("questions", f"{found.cases}, {found.image_tokens} image tokens"),
        ("tokens compared", found.greedy.positions),
        *_divergence_rows(found.greedy),
        ("largest in", found.worst),
        ("greedy answers the same", f"{found.same_answers:.1%}"),
        ("greedy tokens the same", f"{found.same_prefix:.1%} before the first difference"),
        *_answer_rows(found.answers),
    ]


def _divergence_rows(summary: Summary) -> list[tuple[str, object]]:
    return [
        ("KL divergence", f"mean {summary.kl_mean:.5f}, p99 {summary.kl_p99:.4f}, max {summary.kl_max:.3f} nats"),
        ("same most probable token", f"{summary.top1_agreement:.2%}"),
    ]


def _answer_rows(summary: Summary | None) -> list[tuple[str, object]]:
    if summary is None:
        return []
    return [
        (
            "perplexity of the answers",
            f"{summary.candidate_perplexity:.4f}, reference {summary.reference_perplexity:.4f}",
        ),
        ("KL on the answers", f"mean {summary.kl_mean:.5f} nats over {summary.positions} tokens"),
    ]


def _suite_rows(score: SuiteScore) -> list[tuple[str, object]]:
    tasks = [(task, f"{score.share(task):.1%} of {count}") for task, count in score.asked.items()]
    return [("exact answers", f"{score.total:.1%} of {sum(score.asked.values())}"), *tasks]


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal's standard error."""
    with click.progressbar(length=total, label="evaluate", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        yield bar.update
