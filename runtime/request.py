"""A question with its images becomes prompt tokens and tiles.

Everything that can be wrong with a request is found here, before any work starts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.base.errors import PromptError
from internvl_edge.base.text import shown
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.preprocess import load_image, tile_image
from internvl_edge.model.prompt import build_prompt
from internvl_edge.model.template import PromptTemplate
from internvl_edge.model.tokenizer import Tokenizer

ImageSource = str | Path | bytes | Image.Image
# One entry per `<image>` mark; a list of images shares one mark.
Images = Sequence[ImageSource | Sequence[ImageSource]]


class ChatOptions(TypedDict, total=False):
    """What can be said beside question and images.

    Attributes:
        max_tiles: most tiles of an image, one number or one per image; default: the checkpoint's own limit.
        history: earlier turns as (question, answer); their `<image>` marks take the first images.
        system: system text instead of the checkpoint's; "" leaves the system turn out.
        max_new_tokens: most tokens of the answer; default 1024.
        temperature, top_k, top_p, repetition_penalty, seed: see `Sampling`; default greedy.
        stop: strings that end the answer and are not part of it.
        speculate: guess tokens from the prompt and verify several at once; see `lookup`. The answer is the same.
        exif: turn images as their EXIF orientation says; the original does not, which is the default.
    """

    max_tiles: int | Sequence[int] | None
    history: Sequence[tuple[str, str]]
    system: str | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int | None
    stop: Sequence[str]
    speculate: bool
    exif: bool


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        prompt_ids: [seq] tokens; image tokens are the template's placeholder.
        is_image: [seq], where `prompt_ids` stands for pixels.
        tiles: uint8 [tiles, S, S, 3] of each image, in order; their tokens fill `is_image` in this order.
        max_new_tokens: bound of the answer.
        seconds: what decoding and tiling took.
    """

    prompt_ids: NDArray[np.int64]
    is_image: NDArray[np.bool_]
    tiles: list[NDArray[np.uint8]]
    max_new_tokens: int
    seconds: float


class RequestBuilder:
    """Turns questions into requests for one model."""

    def __init__(
        self, config: ModelConfig, template: PromptTemplate, tokenizer: Tokenizer, image_token: int, capacity: int
    ) -> None:
        self._config = config
        self._template = template
        self._tokenizer = tokenizer
        self._image_token = image_token
        self._capacity = capacity

    def build(self, question: str, images: Images, options: ChatOptions) -> Request:
        """Check and prepare one request.

        Raises:
            PromptError: question, marks, images, limits and context do not fit together.
            ImageError: an image cannot be read or exceeds a limit.
        """
        started = time.perf_counter()
        groups = [[entry] if isinstance(entry, ImageSource) else list(entry) for entry in _as_entries(images)]
        tiles = self._tile([source for group in groups for source in group], options)
        per_image = iter(len(image) for image in tiles)
        prompt = build_prompt(
            self._template,
            question,
            [sum(next(per_image) for _ in group) for group in groups],
            tokens_per_tile=self._config.tokens_per_tile,
            history=options.get("history", ()),
            system=options.get("system"),
        )
        ids = np.array(self._tokenizer.encode(prompt), np.int64)
        max_new_tokens = options.get("max_new_tokens", 1024)
        self._check(ids, max_new_tokens, sum(map(len, tiles)))
        return Request(ids, ids == self._image_token, tiles, max_new_tokens, time.perf_counter() - started)

    def _tile(self, sources: list[ImageSource], options: ChatOptions) -> list[NDArray[np.uint8]]:
        limits = options.get("max_tiles")
        if limits is None:
            limits = self._config.max_tiles
        if isinstance(limits, int):
            limits = [limits] * len(sources)
        if len(limits) != len(sources):
            raise PromptError(
                f"max_tiles has {len(limits)} numbers for {len(sources)} images; give one, or one per image"
            )
        config, exif = self._config, options.get("exif", False)
        return [
            tile_image(
                load_image(source, exif=exif),
                image_size=config.vision.image_size,
                max_tiles=limit,
                min_tiles=min(config.min_tiles, limit),
                use_thumbnail=config.use_thumbnail,
            )
            for source, limit in zip(sources, limits, strict=True)
        ]

    def _check(self, ids: NDArray[np.int64], max_new_tokens: int, tiles: int) -> None:
        if max_new_tokens < 1:
            raise PromptError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        self._check_table(ids)
        image_tokens = tiles * self._config.tokens_per_tile
        found = int(np.count_nonzero(ids == self._image_token))
        if found != image_tokens:
            raise PromptError(f"the prompt holds {found} image tokens for {tiles} tiles, which need {image_tokens}")
        if len(ids) + max_new_tokens > self._capacity:
            raise PromptError(
                f"prompt {len(ids)} tokens ({image_tokens} of images) + answer up to {max_new_tokens} exceed the "
                f"context of {self._capacity}; use fewer tiles, a shorter answer or a larger context"
            )

    def _check_table(self, ids: NDArray[np.int64]) -> None:
        """Bundles of older versions can hold tokenizers with more tokens than the model has rows for."""
        rows = self._config.decoder.vocab_size
        if len(beyond := ids[ids >= rows]):
            token = self._tokenizer.decode([int(beyond[0])], skip_special=False)
            raise PromptError(
                f"the prompt holds {shown(token)}, token {beyond[0]}, but the model has {rows} tokens; leave it out, "
                "or export a checkpoint whose embedding was resized"
            )


def _as_entries(images: Images) -> Images:
    if isinstance(images, str | Path | bytes | Image.Image):
        raise PromptError("images is a single image, expected a list: images=[...]")
    return images
