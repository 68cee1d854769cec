"""What `internvl-edge evaluate` found, as rows of a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable

from internvl_edge.bundle.quality import Quality
from internvl_edge.evaluation import Comparison, SuiteScore
from internvl_edge.evaluation.divergence import Summary

Row = tuple[str, object]


def comparison_rows(found: Comparison) -> list[Row]:
    """How far a bundle is from its reference."""
    return [
        ("questions", f"{found.cases}, {found.image_tokens} image tokens"),
        ("tokens compared", found.greedy.positions),
        *_divergence_rows(found.greedy),
        ("largest in", found.worst),
        ("greedy answers the same", f"{found.same_answers:.1%}"),
        ("greedy tokens the same", f"{found.same_prefix:.1%} before the first difference"),
        *_answer_rows(found.answers),
    ]


def _divergence_rows(summary: Summary) -> list[Row]:
    return [
        ("KL divergence", f"mean {summary.kl_mean:.5f}, p99 {summary.kl_p99:.4f}, max {summary.kl_max:.3f} nats"),
        ("same most probable token", f"{summary.top1_agreement:.2%}"),
    ]


def _answer_rows(summary: Summary | None) -> list[Row]:
    if summary is None:
        return []
    return [
        (
            "perplexity of the answers",
            f"{summary.candidate_perplexity:.4f}, reference {summary.reference_perplexity:.4f}",
        ),
        ("KL on the answers", f"mean {summary.kl_mean:.5f} nats over {summary.positions} tokens"),
    ]


def suite_rows(score: SuiteScore, reference: SuiteScore | None) -> list[Row]:
    """Exact answers, in all and by task, beside those of a reference."""

    def row(name: str, count: int, share: Callable[[SuiteScore], float]) -> Row:
        beside = f", reference {share(reference):.1%}" if reference else ""
        return name, f"{share(score):.1%} of {count}{beside}"

    def of_task(task: str) -> Callable[[SuiteScore], float]:
        return lambda found: found.share(task)

    total = row("exact answers", sum(score.asked.values()), lambda found: found.total)
    return [total, *(row(task, count, of_task(task)) for task, count in score.asked.items())]


def gate_rows(quality: Quality) -> list[Row]:
    """The verdict and what it is made of; none without conditions."""
    conditions = [(f"  {'failed' if verdict.failed else 'passed'}", verdict) for verdict in quality.gate]
    return [("gate", quality.state), *conditions] if quality.gate else []
