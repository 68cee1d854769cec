"""onnxruntime-genai as a worker: cpu_onnxruntime_genai.py MODEL. Text alone: it has no graph for this family's tower.

Threads are set by hand; left alone, it used one core.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnxruntime_genai as og
from cpu_worker import STEPS, TEXT, THREADS, TOKEN, Action, context_for, serve, timed


def load() -> dict[str, Action]:
    config = og.Config(sys.argv[1])
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
    model = og.Model(config)

    def prompted(count: int, rows: int = 1) -> tuple[og.Generator, float]:
        parameters = og.GeneratorParams(model)
        context = context_for(count)
        parameters.set_search_options(max_length=context, min_length=context, do_sample=False, batch_size=rows)
        generator = og.Generator(model, parameters)
        tokens = np.full((rows, count), TOKEN, np.int32)
        return generator, timed(lambda: generator.append_tokens(tokens))

    def prefill(count: int) -> float:
        return prompted(count)[1]

    def steps(generator: og.Generator) -> float:
        generator.generate_next_token()  # chooses from the prompt's logits; what follows runs the model
        return timed(lambda: [generator.generate_next_token() for _ in range(STEPS)])

    held: tuple[int, Any] = (0, None)  # tokens of the prompt in a generator, and that generator

    def decode(context: int) -> float:
        nonlocal held
        if held[0] == context:
            held[1].rewind_to(context - 1)
            held[1].append_tokens(np.array([TOKEN], np.int32))
        else:
            held = (0, None)
            held = (context, prompted(context)[0])
        return steps(held[1])

    def several(count: int) -> float:
        return steps(prompted(TEXT, count)[0])

    return {"prefill": prefill, "decode": decode, "rows": several}


if __name__ == "__main__":
    serve(load, "onnxruntime-genai has no graph for this family's tower")
