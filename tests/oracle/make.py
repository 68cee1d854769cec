"""Write the small oracle: the full oracle's checkpoints with cut vocabularies, and their goldens under the new ids.

    python tests/oracle/make.py ../shared/oracle

A token that goes takes its row of the token table and its row of the head with it; no other weight changes. Every token
of the goldens' prompts, answers and texts stays, so the small oracle's goldens are the original code's own numbers.
Each oracle, the full one before anything is written and the small one after it, is held to two judges that are not the
product's: `reference.py` with the limits of `test_reference.py`, and for token ids the tokenizers of this file, which
are sentencepiece itself and a small byte-level BPE. SHA256SUMS is written last. Imports nothing from internvl_edge.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

HERE = Path(__file__).resolve().parent
NATIVE = "internvl-hf-qwen2-tiny"
ROWS = {"internvl2_5-qwen2-tiny": 4090, "internvl2_5-internlm2-tiny": 4041}
"""Tokens that stay; their remainder by 64 is that of the full vocabulary, so that padding is tested alike."""
FAMILIES = "families"
FAMILY_ROWS = {"internvl3_5-qwen3-tiny": 1344, "internvl2-internlm2-tiny": 1309}
"""The families that are committed; rows that no token has (Qwen3's) stay all."""
FAMILY_FEATURES = "feat/wide_2000x800.jpg/max6/stride"
"""Of the features of each family, those that are committed."""
TABLES = {
    "language_model.model.embed_tokens.weight",
    "language_model.lm_head.weight",
    "language_model.model.tok_embeddings.weight",
    "language_model.output.weight",
}
ID_ARRAYS = ("input_ids", "output_ids", "probe_token_ids")
SAME_ARRAYS = ("attention_mask", "probe_step_logits")
UNCHANGED_FILES = ("preprocessor_config.json", "special_tokens_map.json")
# Qwen2's words in Python's own classes; a number that is no digit, such as a half, would be a letter here.
LETTER = r"[^\W\d_]"
WORDS = re.compile(
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?{LETTER}+|\d| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Encode = Callable[[str], list[int]]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, values: Any, indent: int | None = 1) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def read_sentencepiece(path: Path) -> Any:
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at import
    model.ParseFromString(path.read_bytes())
    return model


# The vocabulary


def pieces_of(checkpoint: Path) -> dict[str, int]:
    """The ids of the pieces that merges make, without the tokens that were added to them."""
    if (checkpoint / "vocab.json").is_file():
        pieces: dict[str, int] = read_json(checkpoint / "vocab.json")
        return pieces
    model = read_sentencepiece(checkpoint / "tokenizer.model")
    return {piece.piece: index for index, piece in enumerate(model.pieces)}


def added_tokens(checkpoint: Path) -> dict[str, int]:
    decoder = read_json(checkpoint / "tokenizer_config.json")["added_tokens_decoder"]
    return {token["content"]: int(index) for index, token in decoder.items()}


def merges_of(checkpoint: Path) -> list[tuple[str, str]]:
    lines = (checkpoint / "merges.txt").read_text(encoding="utf-8").split("\n")
    return [(left, right) for left, right in (line.split() for line in lines[1:] if line)]


def used_ids(arrays: dict[str, np.ndarray], texts: dict[str, Any] | None = None) -> set[int]:
    """Every id in the goldens of one checkpoint."""
    used = set[int]()
    if texts is not None:
        used = set(texts["template_prompt_Hi_ids"]).union(*(row["ids"] for row in texts["rows"]))
    return used.union(*(array.ravel().tolist() for name, array in arrays.items() if name.endswith(ID_ARRAYS)))


def inside(piece: str) -> Iterator[str]:
    return (piece[start:end] for start in range(len(piece)) for end in range(start + 1, len(piece) + 1))


def choose_ids(checkpoint: Path, used: set[int], rows: int) -> list[int]:
    """The ids that stay, in their old order: those used, the pieces they are merged from, and the lowest others.

    Rows beyond all tokens stay, too.
    """
    pieces, added = pieces_of(checkpoint), set(added_tokens(checkpoint).values())
    added |= set(range(max(added) + 1, read_json(checkpoint / "config.json")["llm_config"]["vocab_size"]))
    whole = [piece for piece, index in pieces.items() if index in used]
    parts = {pieces[part] for piece in whole for part in inside(piece) if part in pieces}
    kept = used | added | parts
    others = (index for index in sorted(pieces.values()) if index not in kept)
    return sorted(kept.union(next(others) for _ in range(rows - len(kept))))


class Renumber:
    """The new id of every old one that stays: its place among them."""

    def __init__(self, kept: list[int]) -> None:
        self.kept = kept
        self._new = {old: new for new, old in enumerate(kept)}

    def __call__(self, ids: Any) -> Any:
        """Of one id or of nested lists; None, which stands for a token that a model has not, stays."""
        if isinstance(ids, list):
            return [self(item) for item in ids]
        return None if ids is None else self._new[ids]


# The checkpoint


def cut_checkpoint(source: Path, target: Path, new: Renumber) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in UNCHANGED_FILES:
        shutil.copyfile(source / name, target / name)
    weights = load_file(source / "model.safetensors")
    cut = {name: tensor[new.kept] if name in TABLES else tensor for name, tensor in weights.items()}
    save_file(cut, target / "model.safetensors", {"format": "pt"})
    config = read_json(source / "config.json")
    config |= renumber_roles(config, new)
    config["llm_config"] |= {"vocab_size": len(new.kept)} | renumber_roles(config["llm_config"], new)
    write_json(target / "config.json", config, indent=2)
    generation = read_json(source / "generation_config.json")
    write_json(target / "generation_config.json", generation | renumber_roles(generation, new), indent=2)
    added = read_json(source / "added_tokens.json")
    write_json(target / "added_tokens.json", {token: new(index) for token, index in added.items()}, indent=2)
    settings = read_json(source / "tokenizer_config.json")
    decoder = settings["added_tokens_decoder"].items()
    settings["added_tokens_decoder"] = {str(new(int(index))): token for index, token in decoder}
    write_json(target / "tokenizer_config.json", settings, indent=2)
    if (source / "tokenizer.model").is_file():
        cut_sentencepiece(source / "tokenizer.model", target / "tokenizer.model", new)
    else:
        cut_byte_level(source, target, new)


def renumber_roles(values: dict[str, Any], new: Renumber) -> dict[str, Any]:
    roles = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {role: new(values[role]) for role in roles if role in values}


def cut_sentencepiece(source: Path, target: Path, new: Renumber) -> None:
    """The last pieces are placeholders that became special tokens; they stay the last ones."""
    model = read_sentencepiece(source)
    pieces = [model.pieces[index] for index in new.kept if index < len(model.pieces)]
    del model.pieces[:]
    model.pieces.extend(pieces)
    model.trainer_spec.vocab_size = len(pieces)
    target.write_bytes(model.SerializeToString())


def cut_byte_level(source: Path, target: Path, new: Renumber) -> None:
    kept = set(new.kept)
    vocab = {piece: new(index) for piece, index in pieces_of(source).items() if index in kept}
    write_json(target / "vocab.json", vocab, indent=None)
    merges = [f"{left} {right}" for left, right in merges_of(source) if {left, right, left + right} <= set(vocab)]
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


# The goldens


def cut_arrays(arrays: dict[str, np.ndarray], new: Renumber) -> dict[str, np.ndarray]:
    """Only what a test reads: features as they are, ids renumbered, and of the logits the columns that stay."""
    cut = {}
    for name, array in arrays.items():
        if name.startswith("feat/") or name.endswith(SAME_ARRAYS):
            cut[name] = array
        elif name.endswith(ID_ARRAYS):
            cut[name] = np.array(new(array.tolist()), array.dtype)
        elif name.endswith("last_logits"):
            cut[name] = array[:, new.kept]
    return cut


def cut_cases(golden: dict[str, Any], arrays: dict[str, np.ndarray], new: Renumber) -> dict[str, Any]:
    """The same golden.json under the new ids; all but the ids and the statistics of the logits is the original's."""
    for case in golden["cases"]:
        expected, logits = case["expected"], arrays[f"{case['id']}/last_logits"].astype(np.float64)
        expected["output_ids"] = new(expected["output_ids"])
        expected["eos_token_id"] = new(expected["eos_token_id"])
        expected["last_logits_stats"] = {
            "mean": logits.mean(),
            "std": logits.std(),
            "min": logits.min(),
            "max": logits.max(),
            "abs_sum": np.abs(logits).sum(),
        }
    return golden | {"vocabulary": f"{len(new.kept)} of the tokens of the original, chosen by make.py"}


def cut_texts(texts: dict[str, Any], new: Renumber) -> dict[str, Any]:
    rows = [row | {"ids": new(row["ids"])} for row in texts["rows"]]
    special = {token: new(index) for token, index in texts["special"].items()}
    renumbered = {"template_prompt_Hi_ids": new(texts["template_prompt_Hi_ids"]), "rows": rows, "special": special}
    return texts | renumbered | renumber_roles(texts, new) | {"len": len(new.kept)}


def cut_entry(entry: dict[str, Any], new: Renumber) -> dict[str, Any]:
    """One checkpoint of python_inputs.json."""
    for case in entry["cases"]:
        case["expect"]["output_ids"] = new(case["expect"]["output_ids"])
    return entry | {"text": entry["text"] | {"vocab_size": len(new.kept)}}


def cut_oracle(full: Path, target: Path) -> None:
    for name in ("images", NATIVE):
        shutil.copytree(full / name, target / name, copy_function=shutil.copyfile, dirs_exist_ok=True)
    shutil.copyfile(full / "tile_grid_table.json", target / "tile_grid_table.json")
    texts, inputs = read_json(full / "tokenizer_goldens.json"), read_json(full / "python_inputs.json")
    entries = {entry["name"]: entry for entry in inputs["entries"]}
    for name, rows in ROWS.items():
        with np.load(full / name / "golden.npz") as file:
            arrays = dict(file)
        used = used_ids(arrays, texts[f"public/{name}"])
        new = Renumber(choose_ids(full / name / "checkpoint", used, rows))
        cut_checkpoint(full / name / "checkpoint", target / name / "checkpoint", new)
        cut = cut_arrays(arrays, new)
        np.savez_compressed(target / name / "golden.npz", **cut)
        write_json(target / name / "golden.json", cut_cases(read_json(full / name / "golden.json"), cut, new))
        texts[f"public/{name}"] = cut_texts(texts[f"public/{name}"], new)
        entries[name] = cut_entry(entries[name], new)
        print(f"{name}: {len(new.kept)} tokens stay, {len(used)} of them are in the goldens")
    for name, rows in FAMILY_ROWS.items():
        cut_family(full / FAMILIES / name, target / FAMILIES / name, rows)
    write_json(target / "tokenizer_goldens.json", texts)
    write_json(target / "python_inputs.json", inputs | {"entries": list(entries.values())})


def cut_family(source: Path, target: Path, rows: int) -> None:
    """A checkpoint of another family, which has no texts beside its cases."""
    with np.load(source / "golden.npz") as file:
        arrays = {key: file[key] for key in file if not key.startswith("feat/") or key.startswith(FAMILY_FEATURES)}
    new = Renumber(choose_ids(source / "checkpoint", used_ids(arrays), rows))
    cut_checkpoint(source / "checkpoint", target / "checkpoint", new)
    cut = cut_arrays(arrays, new)
    np.savez_compressed(target / "golden.npz", **cut)
    write_json(target / "golden.json", cut_cases(read_json(source / "golden.json"), cut, new))
    print(f"{source.name}: {len(new.kept)} rows stay")


# The judges


def sentencepiece_encoder(checkpoint: Path) -> Encode:
    """InternLM2's slow tokenizer: special tokens are cut out, sentencepiece encodes the rest, `<s>` comes first."""
    processor = sentencepiece.SentencePieceProcessor(str(checkpoint / "tokenizer.model"))
    encode = around_added_tokens(added_tokens(checkpoint), lambda text: list(processor.encode(text)))
    return lambda text: [processor.bos_id(), *encode(text)]


def byte_level_encoder(checkpoint: Path) -> Encode:
    """Qwen2's slow tokenizer: NFC, words, the bytes of each word as printable characters, merges by rank."""
    pieces, ranks = pieces_of(checkpoint), {pair: rank for rank, pair in enumerate(merges_of(checkpoint))}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}

    def encode(text: str) -> list[int]:
        words = [[characters[byte] for byte in word.encode()] for word in WORDS.findall(text)]
        return [pieces[piece] for word in words for piece in merge(word, ranks)]

    around = around_added_tokens(added_tokens(checkpoint), encode)
    return lambda text: around(unicodedata.normalize("NFC", text))


def merge(word: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Join the neighbors of the lowest rank, wherever they stand, until none may be joined."""
    while pairs := [pair for pair in pairwise(word) if pair in ranks]:
        best = min(pairs, key=lambda pair: ranks[pair])
        joined: list[str] = []
        for piece in word:
            if joined and (joined[-1], piece) == best:
                joined[-1] += piece
            else:
                joined.append(piece)
        word = joined
    return word


def around_added_tokens(added: dict[str, int], encode: Encode) -> Encode:
    pattern = re.compile("(" + "|".join(sorted(map(re.escape, added), key=len, reverse=True)) + ")")

    def encode_parts(text: str) -> list[int]:
        ids: list[int] = []
        for part in pattern.split(text):
            ids += [added[part]] if part in added else encode(part)
        return ids

    return encode_parts


def judge_tokenizers(oracle: Path) -> None:
    """Every text and every prompt of the goldens becomes the goldens' ids."""
    for name in (*ROWS, *(f"{FAMILIES}/{family}" for family in FAMILY_ROWS)):
        folder = oracle / name
        texts = read_json(oracle / "tokenizer_goldens.json").get(f"public/{name}")
        make = sentencepiece_encoder if (folder / "checkpoint" / "tokenizer.model").is_file() else byte_level_encoder
        encode, arrays = make(folder / "checkpoint"), np.load(folder / "golden.npz")
        wanted = [(row["text"], row["ids"]) for row in texts["rows"]] if texts else []
        if texts:
            wanted.append((texts["template_prompt_Hi"], texts["template_prompt_Hi_ids"]))
        for case in read_json(folder / "golden.json")["cases"]:
            masks = arrays[f"{case['id']}/attention_mask"]
            for row, short in enumerate(case["expected"]["prompt_compact"]):
                prompt = re.sub(r"(<IMG_CONTEXT>)\*(\d+)", lambda run: run[1] * int(run[2]), short)
                wanted.append((prompt, arrays[f"{case['id']}/input_ids"][row][masks[row] == 1].tolist()))
        for text, ids in wanted:
            if encode(text) != ids:
                sys.exit(f"{folder}: {text!r} becomes {encode(text)}, the golden says {ids}")
        print(f"{folder}: {len(wanted)} texts and prompts become the ids of the goldens")


def judge(oracle: Path, layer: str) -> None:
    judge_tokenizers(oracle)
    tests = HERE.parent / "helpers" / "test_reference.py"
    if pytest.main([str(tests), "-q", "-p", "no:cacheprovider", "-k", layer]) != pytest.ExitCode.OK:
        sys.exit(f"reference.py does not give the goldens of {oracle}")
    print(f"{oracle}: reference.py gives the goldens, within the limits of {tests.name}")


def write_sums(folder: Path) -> None:
    """For `sha256sum --check`: all that this script writes."""
    written = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    names = sorted(path.relative_to(folder).as_posix() for path in written)
    data = [name for name in names if name not in ("SHA256SUMS", "README.md", "make.py")]
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in data]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    full = Path(sys.argv[1]).resolve()
    os.environ |= {"INTERNVL_EDGE_ORACLE": str(full), "INTERNVL_EDGE_REQUIRE_ORACLE": "1"}
    judge(full, "full")
    cut_oracle(full, HERE)
    judge(HERE, "small")
    write_sums(HERE)


if __name__ == "__main__":
    main()
