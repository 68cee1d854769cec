"""Convert token ids to text while the model still generates.

All pieces joined are exactly the final text: the whole reply decoded, cut before the first stop string, and stripped.
So a piece never has a part of a character, a part of a stop string, or whitespace at the end of the reply.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from internvl_edge.base.errors import PromptError
from internvl_edge.model.tokenizer import Tokenizer


class TextStream:
    """The text of one reply, which grows token by token.

    `stopped` is True after a stop string was found; later ids are ignored. `text` is the text returned so far.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), keep_special: bool = False) -> None:
        """Start a reply. `stop` is a text that ends it, or several such texts.

        The stop string that is complete first ends the reply. Of two that end at the same place, the longer one is cut
        off.

        Raises:
            PromptError: a stop string is empty, or can never occur because special tokens are dropped.
        """
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stop):
            raise PromptError("a stop string is empty; leave it out")
        if not keep_special and (lost := tokenizer.special_token_in(stop)):
            raise PromptError(f"a stop string holds {lost}, which is dropped from answers; set keep_special=True")
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._characters = codecs.getincrementaldecoder("utf-8")(tokenizer.decode_errors)
        self._stop = stop
        self._held = ""  # this text may still become a stop string
        self._space = ""  # this whitespace may still be the end of the reply
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token, and return the text that is now certain, often ""."""
        return self._advance(self._tokenizer.token_bytes(token_id, skip_special=not self._keep_special), final=False)

    def finish(self) -> str:
        """End the reply, and return the rest of its text."""
        return self._advance(b"", final=True)

    def _advance(self, data: bytes, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + self._characters.decode(data, final)
        ends = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            text, self._held = text[: min(ends)[1]], ""
        else:
            keep = 0 if final else self._possible_stop(text)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return self._emit(text)

    def _possible_stop(self, text: str) -> int:
        """Return the length of the longest end of `text` that is the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0

    def _emit(self, text: str) -> str:
        text = self._space + text
        if not self.text:
            text = text.lstrip()
        piece = text.rstrip()
        self._space = text[len(piece) :]
        self.text += piece
        return piece
