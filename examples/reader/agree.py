"""Whether a bundle says what torch says: `python agree.py --state STATE --layout qwen2 --bundle BUNDLE [--count 500]`.

Both answer the first questions of the test stream greedily, each with its own preprocessing, prompt, cache or none.
Prints one JSON object: how many answers were compared and the indices of those that differ in any token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from batches import attention_bias, encoder, make_row
from export_reader import LAYOUTS, rounded_reader
from internlm2_vocabulary import internlm2_row_sources
from model import Reader, rotary_table
from pages import tiles
from torch import Tensor

from internvl_edge import InternVL
from internvl_edge.calibration.synthetic import SyntheticSample, sample


def token_numbers(layout: str) -> list[int]:
    """The training tokenizer's id of each token of a layout."""
    return internlm2_row_sources() if layout == "internlm2" else list(range(encoder().get_vocab_size()))


@torch.no_grad()
def greedy(reader: Reader, pixels: Tensor, prompt: list[int], numbers: list[int], limit: int) -> list[int]:
    """What plain greedy decoding says after a prompt, without a cache: at most `limit` of `numbers`, end included."""
    context, end = (encoder().token_to_id(token) for token in ("<IMG_CONTEXT>", "<|im_end|>"))
    allowed = torch.full((encoder().get_vocab_size(),), -torch.inf)
    allowed[numbers] = 0.0
    image, said = reader.see(pixels), list[int]()
    while len(said) < limit and end not in said:
        ids = torch.tensor([prompt + said])
        embeds = reader.language_model.model.embed_tokens(ids)
        embeds = embeds.masked_scatter((ids == context)[..., None], image)
        table = rotary_table(reader.config, torch.arange(ids.shape[1])[None])
        hidden = reader.think(embeds, *table, attention_bias(torch.zeros_like(ids)))
        said.append(int((reader.language_model.lm_head(hidden[0, -1]) + allowed).argmax()))
    return said


def agrees(bundle: InternVL, reader: Reader, layout: str, asked: SyntheticSample, limit: int = 64) -> bool:
    """Whether prompt and answer of one question are the same tokens on both sides."""
    numbers = token_numbers(layout)
    reply = bundle.chat(asked.question, images=[asked.image], max_new_tokens=limit)
    row = make_row(tiles(asked.image), [(asked.question, "", asked.task)], bos=layout == "internlm2")
    said = greedy(reader, torch.from_numpy(row.pixels.copy()), row.ids, numbers, limit)
    return [numbers[i] for i in reply.prompt_ids] == row.ids and [numbers[i] for i in reply.output_ids] == said


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--layout", choices=LAYOUTS, default="qwen2")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--count", type=int, default=500)
    a = parser.parse_args()
    reader = rounded_reader(torch.load(a.state, weights_only=True)["average"], a.layout)
    with InternVL.load(a.bundle, device="cpu", engine="onnxruntime") as bundle:
        differ = [i for i in range(a.count) if not agrees(bundle, reader, a.layout, sample("test", i))]
    print(json.dumps({"layout": a.layout, "count": a.count, "differ": differ}))


if __name__ == "__main__":
    main()
