"""llama.cpp as a worker: cpu_llama_cpp.py MODEL.gguf [MMPROJ.gguf], by the C interface that llama-cpp-python wraps."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llama_cpp
import numpy as np
from cpu_worker import CONTEXT, STEPS, TEXT, THREADS, TILE, TOKEN, Action, context_for, serve, timed
from llama_cpp import mtmd_cpp

BATCH = 2048


class LlamaCpp:
    """One model, its cache and, once a tile comes, its vision projector."""

    def __init__(self, path: str) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        self.context: Any = None
        self._shape = (0, 0)
        self.open(CONTEXT)
        self._vision: Any = None

    def open(self, tokens: int, rows: int = 1) -> None:
        """Have a cache for so many tokens in all, of so many sequences."""
        if self._shape == (tokens, rows):
            return
        if self.context:
            llama_cpp.llama_free(self.context)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_seq_max = tokens, BATCH, rows
        parameters.n_threads = parameters.n_threads_batch = THREADS
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self._shape = (tokens, rows)

    @property
    def memory(self) -> Any:
        return llama_cpp.llama_get_memory(self.context)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)

    def back_to(self, count: int) -> None:
        """Forget what follows the first `count` tokens."""
        if not llama_cpp.llama_memory_seq_rm(self.memory, 0, count, -1):
            raise RuntimeError("llama_memory_seq_rm failed")

    def step(self, first: int, count: int, rows: int) -> None:
        """Append `count` tokens to each of `rows` sequences, from position `first` on; logits after each last one."""
        batch = llama_cpp.llama_batch_init(count * rows, 0, 1)
        batch.n_tokens = count * rows
        for index in range(count * rows):
            row, position = divmod(index, count)
            batch.token[index], batch.pos[index] = TOKEN, first + position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
            batch.logits[index] = position == count - 1
        failed = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_get_logits_ith(self.context, -1)

    def eval(self, count: int) -> None:
        """Append `count` tokens; the logits after the last are there when this returns."""
        tokens = (llama_cpp.llama_token * count)(*[TOKEN] * count)
        for start in range(0, count, BATCH):
            part = min(BATCH, count - start)
            first = ctypes.cast(ctypes.byref(tokens, start * ctypes.sizeof(llama_cpp.llama_token)), type_of_tokens)
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(first, part)):
                raise RuntimeError("llama_decode failed")
        llama_cpp.llama_get_logits_ith(self.context, -1)

    def vision(self) -> Any:
        if self._vision is None:
            parameters = mtmd_cpp.mtmd_context_params_default()
            parameters.use_gpu, parameters.print_timings, parameters.n_threads = False, False, THREADS
            self._vision = mtmd_cpp.mtmd_init_from_file(sys.argv[2].encode(), self.model, parameters)
        return self._vision

    def tile(self) -> Any:
        """The chunk of image tokens that one tile of random pixels becomes."""
        pixels = np.random.default_rng(0).integers(0, 256, (TILE, TILE, 3), np.uint8)
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd_cpp.mtmd_bitmap_init(TILE, TILE, data)
        marker = mtmd_cpp.mtmd_default_marker()
        text = mtmd_cpp.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd_cpp.mtmd_tokenize(self.vision(), chunks, ctypes.byref(text), bitmaps, 1):
            raise RuntimeError("mtmd_tokenize failed")
        each = [mtmd_cpp.mtmd_input_chunks_get(chunks, i) for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks))]
        images = [chunk for chunk in each if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == 1]
        if [mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk) for chunk in images] != [256]:
            raise RuntimeError("a tile did not become one chunk of 256 tokens")
        return images[0]


type_of_tokens = ctypes.POINTER(llama_cpp.llama_token)


def load() -> dict[str, Action]:
    llama = LlamaCpp(sys.argv[1])

    held = 0  # tokens of the prompt that the cache begins with

    def prefill(count: int) -> float:
        nonlocal held
        llama.open(context_for(count))
        llama.clear()
        held = count
        return timed(lambda: llama.eval(count))

    def decode(context: int) -> float:
        if held == context:
            llama.back_to(context)
        else:
            prefill(context)
        return timed(lambda: [llama.eval(1) for _ in range(STEPS)])

    def several(count: int) -> float:
        nonlocal held
        llama.open(CONTEXT, count)
        llama.clear()
        held = 0
        llama.step(0, TEXT, count)
        return timed(lambda: [llama.step(TEXT + step, 1, count) for step in range(STEPS)])

    def vision(count: int) -> float:
        chunk = llama.tile()
        return timed(lambda: [mtmd_cpp.mtmd_encode_chunk(llama.vision(), chunk) for _ in range(count)])

    def first_token(count: int) -> float:
        nonlocal held
        chunk = llama.tile()
        llama.open(CONTEXT)
        llama.clear()
        held = 0

        def question() -> None:
            past = llama_cpp.llama_pos(0)
            for _ in range(count):
                if mtmd_cpp.mtmd_helper_eval_chunk_single(
                    llama.vision(), llama.context, chunk, past.value, 0, BATCH, False, ctypes.byref(past)
                ):
                    raise RuntimeError("mtmd_helper_eval_chunk_single failed")
            llama.eval(TEXT)

        return timed(question)

    actions = {"prefill": prefill, "decode": decode, "rows": several}
    return actions | ({"vision": vision, "first_token": first_token} if len(sys.argv) > 2 else {})


if __name__ == "__main__":
    serve(load)
