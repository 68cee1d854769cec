"""OpenVINO GenAI as a worker: cpu_openvino_genai.py MODEL [VISION.xml].

The language model runs in GenAI's own pipeline. Its pipeline for pictures takes no InternVL of this layout, so the
tower is run by OpenVINO itself, and the first token of a question about a picture is the sum of both: tiles, then a
prompt of as many tokens. What GenAI reports about its steps is taken, so that its tokens' texts cost it nothing.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai
from cpu_worker import STEPS, TEXT, THREADS, TILE, TILE_TOKENS, TOKEN, Action, serve, timed

PROPERTIES = {"INFERENCE_NUM_THREADS": THREADS, "NUM_STREAMS": 1}


@cache
def tower() -> Any:
    core = ov.Core()
    return core.compile_model(core.read_model(sys.argv[2]), "CPU", PROPERTIES)


@cache
def requests() -> Any:
    """OpenVINO GenAI's pipeline for several requests at once, with its paged attention."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens = 1, 4096
    return openvino_genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU", PROPERTIES)


def load() -> dict[str, Action]:
    pipeline = openvino_genai.LLMPipeline(sys.argv[1], "CPU", ATTENTION_BACKEND="SDPA", **PROPERTIES)
    pixels = np.random.default_rng(0).integers(0, 256, (1, TILE, TILE, 3), np.uint8)

    def answered(count: int, tokens: int) -> Any:
        config = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        return pipeline.generate(ov.Tensor(np.full((1, count), TOKEN, np.int64)), config).perf_metrics

    def prefill(count: int) -> float:
        return float(answered(count, 1).get_ttft().mean) / 1e3

    def decode(context: int) -> float:
        return float(answered(context, STEPS + 1).get_tpot().mean) / 1e3 * STEPS

    def several(count: int) -> float:
        """Prompts in one step of the pipeline for several requests, then its further steps, one token of each."""
        batched = requests()
        config = openvino_genai.GenerationConfig(max_new_tokens=STEPS + 1, ignore_eos=True, do_sample=False)
        prompt = ov.Tensor(np.full((1, TEXT), TOKEN, np.int64))
        handles = [batched.add_request(number, prompt, config) for number in range(count)]
        batched.step()
        if [len(handle.read()) for handle in handles] != [1] * count:
            raise RuntimeError("one step did not read all prompts")
        seconds = timed(lambda: [batched.step() for _ in range(STEPS)])
        if batched.has_non_finished_requests():
            raise RuntimeError("a step did not append a token to each request")
        return seconds

    def vision(count: int) -> float:
        tower()
        return timed(lambda: [tower()({"pixels": pixels}) for _ in range(count)])

    def first_token(count: int) -> float:
        return vision(count) + prefill(count * TILE_TOKENS + TEXT)

    actions = {"prefill": prefill, "decode": decode, "rows": several}
    return actions | ({"vision": vision, "first_token": first_token} if len(sys.argv) > 2 else {})


if __name__ == "__main__":
    serve(load)
