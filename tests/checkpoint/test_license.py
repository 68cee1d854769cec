"""The license of a checkpoint is read from its card, and only plain entries are."""

from __future__ import annotations

from pathlib import Path

import pytest

from internvl_edge.checkpoint.license import License, read_license

READ = {
    "---\nlicense: mit\n---\n": License("mit"),
    "---\r\nlicense: 'apache-2.0'\r\n---\r\n": License("apache-2.0"),
    "\ufeff---\nlicense: mit # as the original\n---": License("mit"),
    "---\ntags:\n- license\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n": License(
        "other", "qwen", "LICENSE"
    ),
    '---\nlicense: other\nlicense_link: "https://example.com/a?b=c"\n---\n': License(
        "other", "", "https://example.com/a?b=c"
    ),
    "---\nlicense: other\nlicense_link: javascript:alert(1)\nlicense_name: <b>\n---\n": License("other"),
}
UNKNOWN = (
    "",
    "license: mit\n",
    "---\nlicense: mit\n",
    "---\nlicense: [mit, apache-2.0]\n---\n",
    "---\nlicense:\n- mit\n---\n",
    "---\nmodel:\n  license: mit\n---\n",
    "---\nlicense: &a mit\n---\n",
    '---\nlicense: "a\\nb"\n---\n',
    "---\ntags: x\n---\nlicense: mit\n",
    "---\n" + "x: y\n" * 20000 + "license: mit\n---\n",
)


@pytest.mark.parametrize("text", READ)
def test_a_plain_entry_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_license(tmp_path) == READ[text]


@pytest.mark.parametrize("text", UNKNOWN, ids=range(len(UNKNOWN)))
def test_anything_else_is_no_license(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_license(tmp_path) is None


def test_bytes_that_are_no_text_are_no_license(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert read_license(tmp_path) is None
    assert read_license(tmp_path / "nowhere") is None
