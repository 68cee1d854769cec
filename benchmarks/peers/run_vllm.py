"""vLLM's own reading of checkpoints: run_vllm.py (REQUEST OUT)..., which writes OUT.json and, if it loads, OUT.npz.

vLLM is imported once, which takes most of the time, and every checkpoint is loaded in a process forked from that one.
REQUEST: {"checkpoint": folder, "tokenizer": folder, "dtype": name, "top": count, "prompts": [{"text": ..., "image"?:
file, "answer"?: ...} or {"ids": [...]}]}. OUT.npz holds of prompt N `ids_N` [n], `tokens_N` and `logprobs_N` [n - 1,
top]: the likeliest tokens after each of the first n - 1. OUT.json holds versions, what vLLM computes each linear with,
greedy answers to texts without their `answer`, and the error where loading or answering ends in one.

The folder is loaded as `quantize` left it. Published checkpoints bring the code of their configuration classes and
vLLM asks for it; those of this project's tests have none, so the classes are defined here. Nothing here knows
quantization.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

import numpy as np
import torch
import torchvision_operators  # noqa: F401
from PIL import Image
from transformers import AutoConfig, PretrainedConfig
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.internlm2 import InternLM2ForCausalLM
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.internvl import InternVLChatModel
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

ANSWER_TOKENS = 24


class InternLM2Config(PretrainedConfig):
    """Every field as it stands in `llm_config`."""

    model_type = "internlm2"


class InternVisionConfig(PretrainedConfig):
    """Every field as it stands in `vision_config`; vLLM also asks for this one, which only training needs."""

    model_type = "intern_vit_6b"
    initializer_factor = 1.0


class InternVLChatConfig(PretrainedConfig):
    """The published layout's fields, `llm_config` and `vision_config` as configurations of their own."""

    model_type = "internvl_chat"

    def __init__(self, llm_config: Any = None, vision_config: Any = None, **fields: Any) -> None:
        described = dict(llm_config or {"model_type": "internlm2"})
        self.llm_config = AutoConfig.for_model(described.pop("model_type"), **described)
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        super().__init__(**fields)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        return self.llm_config


def load(request: dict[str, Any]) -> Any:
    """The engine. Models are registered as classes: vLLM would look at them in a process without torchvision's help."""
    AutoConfig.register("internlm2", InternLM2Config)
    AutoConfig.register("internvl_chat", InternVLChatConfig)
    for model in (InternVLChatModel, InternLM2ForCausalLM, Qwen2ForCausalLM):
        ModelRegistry.register_model(model.__name__, model)
    ModelRegistry.register_model("InternVLForConditionalGeneration", InternS1ForConditionalGeneration)
    return LLM(
        request["checkpoint"],
        tokenizer=request["tokenizer"],
        dtype=request["dtype"],
        max_model_len=2048,
        max_num_seqs=4,
        max_logprobs=request["top"],
        enforce_eager=True,
        seed=0,
    )


def linears(model: torch.nn.Module) -> dict[str, int]:
    """How many linears vLLM computes how: its method, scheme and kernel by their class names."""
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, LinearBase | ParallelLMHead):
            scheme = getattr(module, "scheme", None)
            kernel = getattr(scheme or module.quant_method, "kernel", None)
            parts = [type(part).__name__ for part in (module.quant_method, scheme, kernel) if part is not None]
            found[f"{name.split('.')[0]}: {' '.join(parts)}"] += 1
    return dict(found)


def measure(llm: Any, request: dict[str, Any], out: Path) -> list[str]:
    """Write the likeliest tokens of all positions; returns greedy answers to the prompts that have an answer."""
    wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=request["top"])
    arrays: dict[str, np.ndarray] = {}
    for number, given in enumerate(request["prompts"]):
        result = llm.generate(prompt(given, given.get("answer", "")), wanted, use_tqdm=False)[0]
        # One entry more where the prompt's own token is not among the likeliest.
        rows = [sorted(row.items(), key=lambda item: item[1].rank) for row in result.prompt_logprobs[1:]]
        rows = [row[: request["top"]] for row in rows]
        arrays[f"ids_{number}"] = np.array(result.prompt_token_ids, np.int32)
        arrays[f"tokens_{number}"] = np.array([[token for token, _ in row] for row in rows], np.int32)
        arrays[f"logprobs_{number}"] = np.array([[found.logprob for _, found in row] for row in rows], np.float32)
    np.savez(out, **arrays)
    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    asked = [prompt(given, "") for given in request["prompts"] if given.get("answer")]
    return [result.outputs[0].text for result in llm.generate(asked, greedy, use_tqdm=False)] if asked else []


def prompt(given: dict[str, Any], answer: str) -> dict[str, Any]:
    """One entry of the request as vLLM takes it."""
    if "ids" in given:
        return {"prompt_token_ids": given["ids"]}
    images = {"multi_modal_data": {"image": [Image.open(given["image"])]}} if "image" in given else {}
    return {"prompt": given["text"] + answer, **images}


def reason(error: BaseException) -> str:
    """The error's message in one line, without the help page that pydantic appends; where it arose if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if not line.strip().startswith("For further")]
    if not any(lines):
        last = traceback.extract_tb(error.__traceback__)[-1]
        lines = [f"in {Path(last.filename).name}, {last.name}: {last.line}"]
    return f"{type(error).__name__}: {' '.join(' '.join(lines).split())}"[:1000]


def read(request: dict[str, Any], out: Path) -> None:
    """Load one checkpoint and write what came of it."""
    packages = ("vllm-cpu", "torch", "transformers", "compressed-tensors")
    found: dict[str, Any] = {"versions": {name: version(name) for name in packages}}
    try:
        llm = load(request)
        found["quantization"] = llm.llm_engine.model_config.quantization
        found["linears"] = llm.apply_model(linears)[0]
        found["answers"] = measure(llm, request, out.with_suffix(".npz"))
    except Exception as error:  # whatever vLLM says is the result
        found["error"] = reason(error)
    out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    for request, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        if not (child := os.fork()):
            read(json.loads(Path(request).read_text(encoding="utf-8")), Path(out))
            os._exit(0)
        if status := os.waitpid(child, 0)[1]:
            sys.exit(f"{request}: the process ended with {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
