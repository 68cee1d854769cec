"""A report with every section, as large as one of a published model, with text that is hostile to pages."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from PIL import Image

from internvl_edge.base.run_record import RunRecord
from internvl_edge.bundle.gate import Verdict
from internvl_edge.bundle.quality import Measurement, Quality
from internvl_edge.checkpoint.record import ActivationRange, LinearReport, QuantizationRecord, TowerReport
from internvl_edge.evaluation import (
    AnswerPair,
    Comparison,
    DivergenceSummary,
    Estimate,
    MetricResult,
    Mistake,
    QuestionSettings,
    SuiteResult,
)
from internvl_edge.evaluation.compare import small_picture
from internvl_edge.evaluation.divergence import histogram
from internvl_edge.evaluation.metrics import wilson
from internvl_edge.evaluation.report import Report
from internvl_edge.model.components import Component, Stored
from internvl_edge.model.linear import W8A8, Scheme

INT4 = Scheme(4, 128, symmetric=True)

HOSTILE = '"><script src="https://example.com/x.js">alert(1)</script><img src=x onerror=alert(2)> \u202e & 中文'
RUN = RunRecord("2026-01-02 03:04", 3725.0, 3_210_000_000, "Some CPU, 8 cores", {"python": "3.12", "numpy": "2.1"})
FIGURES = DivergenceSummary(1200, 0.0213, 0.31, 2.5, 0.962, 9.1, 9.4)


def full_report() -> Report:
    """24 layers of tower and decoder, six pictures."""
    comparison = Comparison(
        reference="internvl-1b",
        settings=QuestionSettings(HOSTILE, seed=0, max_tiles=None, max_new_tokens=64),
        cases=64,
        image_tokens=81920,
        greedy=FIGURES,
        kinds={"images": FIGURES, "text": FIGURES},
        same_answers=0.75,
        same_prefix=0.87,
        answers=FIGURES,
        worst_case=HOSTILE,
        histogram=histogram(np.random.default_rng(0).lognormal(-5, 2, 1200)),
        samples=tuple(map(_sample, range(6))),
        run=RUN,
    )
    share = Estimate(0.95, 0.93, 0.965, "wilson")
    loss = Estimate(0.01, -0.002, 0.022, "bootstrap")
    total = {
        "exact_match": MetricResult(500, share, replace(share, value=0.96), loss),
        "anls": MetricResult(500, Estimate(0.97, 0.95, 0.98, "bootstrap"), share, loss),
    }
    tags = {"sign": total, HOSTILE: {"exact_match": MetricResult(200, wilson(100, 200))}, "none": {}}
    mistakes = tuple(Mistake(f"sign {n}", HOSTILE, "STOP" * n) for n in range(40))
    return Report(
        kind="bundle",
        name="internvl-1b-int4",
        source=HOSTILE,
        architecture=(("Decoder", "qwen2, 24 layers"),),
        quantized=True,
        bytes=812_000_000,
        components=(
            Component("vision", 304_000_000, 310_000_000, 8.16, (Stored(96, "float16", W8A8),)),
            Component("decoder", 358_000_000, 201_000_000, 4.5, (Stored(168, "float16", INT4),)),
        ),
        quality=Quality(
            files="0123456789abcdef" * 4,
            figures={"kl": 0.0213, "top1": 0.962, "exact_match": 0.95},
            measured={"suite": Measurement("reader", 500, 0, "cpu", "onnxruntime", RUN.date)},
            gate=(Verdict("kl>0.05", 0.0213, False), Verdict("exact_match<0.96", math.nan, True)),
            accepted=HOSTILE,
        ),
        quantization=quantization_record(),
        comparison=comparison,
        suite=SuiteResult(QuestionSettings("reader"), "exact_match", 500, total, RUN, tags, mistakes),
    )


def quantization_record() -> QuantizationRecord:
    return QuantizationRecord(
        checkpoint="internvl-1b",
        recipe={"decoder": "w4a16-awq", "layers": [[HOSTILE, "fp"]], "vision_int8": {"smoothing": True, "keep": []}},
        samples=64,
        tokens=51200,
        image_tokens=40000,
        broken=(HOSTILE,),
        weights={"model.safetensors": 700_000_000},
        components=(),
        linears=tuple(_linears()),
        tower=TowerReport(64, 0.9996, 0.9981, 0.9997),
        bits_per_weight=4.5,
        predicted_kl=0.02,
        run=RUN,
    )


def _linears() -> list[LinearReport]:
    kinds = {
        "vision": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
        "decoder": [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))],
    }
    random = np.random.default_rng(1)
    names = [f"{part}.layers.{n}.{kind}" for part in kinds for n in range(24) for kind in kinds[part]]
    return [
        LinearReport(
            name=name,
            dtype="float16",
            scheme=INT4,
            bits_per_weight=4.25,
            error=float(error),
            sqnr_db=float(-20 * np.log10(error)),
            cosine=float(1 - error**2 / 2),
            reason=HOSTILE,
            inputs=ActivationRange(float(90 * error), 3.1, 2.2, 3.5, tuple((n, float(90 - n)) for n in range(8))),
        )
        for name, error in zip(names, random.uniform(0.01, 0.9, len(names)), strict=True)
    ]


def _sample(number: int) -> AnswerPair:
    """Noise: no photograph makes a larger JPEG file."""
    noise = np.random.default_rng(number).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    return AnswerPair(
        name=f"sign {number}",
        question=HOSTILE,
        pictures=(small_picture(Image.fromarray(noise)),),
        reference="STOP",
        candidate=HOSTILE,
        expected="STOP",
        kl=0.03,
        same=False,
    )
