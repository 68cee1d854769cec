"""onnxruntime-genai as a worker: cpu_onnxruntime_genai.py MODEL. Text alone: it has no graph for this family's tower.

Threads are set by hand; left alone, it used one core.
"""

from __future__ import annotations

import json
import sys

import onnxruntime_genai as og
from cpu_worker import STEPS, THREADS, TOKEN, Action, serve, timed

CONTEXT = 4096


def load() -> dict[str, Action]:
    config = og.Config(sys.argv[1])
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
    model = og.Model(config)

    def prompted(count: int) -> tuple[og.Generator, float]:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
        generator = og.Generator(model, parameters)
        return generator, timed(lambda: generator.append_tokens([TOKEN] * count))

    def prefill(count: int) -> float:
        return prompted(count)[1]

    def decode(context: int) -> float:
        generator = prompted(context)[0]
        generator.generate_next_token()  # chooses from the prompt's logits; what follows runs the model
        return timed(lambda: [generator.generate_next_token() for _ in range(STEPS)])

    return {"prefill": prefill, "decode": decode}


if __name__ == "__main__":
    serve(load)
