"""Native checkpoints whose chat template this project does not write are refused, and nothing of a template is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import tiny
from helpers.repository import REPOSITORY
from internvl_edge import export_bundle
from internvl_edge.base.errors import CheckpointError
from internvl_edge.checkpoint.chat_template import check_chat_template

NATIVE = REPOSITORY / "tests" / "oracle" / "internvl-hf-qwen2-tiny" / "checkpoint"


def test_the_native_template_passes() -> None:
    assert (NATIVE / "chat_template.jinja").is_file()
    check_chat_template(NATIVE)


def test_a_folder_without_template_passes(tmp_path: Path) -> None:
    check_chat_template(tmp_path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_other_templates_are_refused_at_export(tmp_path: Path, name: str) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", layout="native")
    known = (NATIVE / "chat_template.jinja").read_text(encoding="utf-8")
    for template, message in (
        (known.replace("<|im_start|>", "[INST]"), r"lacks <\|im_start\|>"),
        ("<|im_start|>system\nYou are helpful.<|im_end|>" + known, "system turn of its own"),
    ):
        if name.endswith(".json"):
            settings = json.loads((checkpoint / name).read_text(encoding="utf-8"))
            (checkpoint / name).write_text(json.dumps(settings | {"chat_template": template}), encoding="utf-8")
        else:
            (checkpoint / name).write_text(template, encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            export_bundle(checkpoint, tmp_path / "bundle")


@pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b'{"chat_template": "<|im_', b"[]", b"\xff\xfe"])
def test_a_damaged_file_is_named_at_export(tmp_path: Path, name: str, content: bytes) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", layout="native")
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} .*download it again"):
        export_bundle(checkpoint, tmp_path / "bundle")
