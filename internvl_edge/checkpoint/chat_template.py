"""Check a native checkpoint's chat template against the one that this project writes, without running it.

A Jinja template is code that comes with a checkpoint. The required properties are visible in its text: turns open with
`<|im_start|>` and their role, an image is one `<IMG_CONTEXT>`, and the template does not add a system turn by itself.
"""

from __future__ import annotations

from pathlib import Path

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.json_files import FILE_BYTES, TOKENIZER_BYTES, read_bytes

from .json_files import read_json

_EXPECTED = ("<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>")
_OWN_SYSTEM_TURN = "<|im_start|>system"


def check_chat_template(folder: Path) -> None:
    """Check that a native checkpoint's template does not write other prompts than `internvl_native`.

    A folder without a template passes, because nothing contradicts.

    Raises:
        CheckpointError: the template lacks a marker, adds a system turn by itself, or is in a damaged file.
    """
    template = _read_template(folder)
    if template is None:
        return
    missing = [marker for marker in _EXPECTED if marker not in template]
    if missing or _OWN_SYSTEM_TURN in template:
        found = f"lacks {', '.join(missing)}" if missing else "writes a system turn of its own"
        raise CheckpointError(
            f"{folder}: the chat template {found}; expected the template of native InternVL checkpoints. If yours adds "
            "only a system text, put their template back, and give the text when you ask (--system)"
        )


def _read_template(folder: Path) -> str | None:
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        try:
            return read_bytes(own_file, CheckpointError, "download it again", limit=FILE_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{own_file} is not UTF-8 ({error}); download it again") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(folder / name, default={}, limit=TOKENIZER_BYTES).get("chat_template")
        if isinstance(template, str):
            return template
    return None
