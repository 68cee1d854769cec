"""Export a checkpoint to a bundle.

The bundle is written to a temporary sibling folder, which is renamed at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import tokenizers

from internvl_edge import __version__
from internvl_edge.base.errors import EdgeError
from internvl_edge.base.files import readable_disk_errors, require_space
from internvl_edge.base.folders import new_folder
from internvl_edge.base.hub import hub_source
from internvl_edge.base.jsonable import dumps
from internvl_edge.base.progress import Advance, Progress, as_progress
from internvl_edge.base.replaceable import require_replaceable
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import sha256
from internvl_edge.bundle.contents import bundle_files
from internvl_edge.bundle.manifest import FileEntry, Manifest, SpecialTokens
from internvl_edge.bundle.token_table import TYPES, int8_table, table_bytes, table_type
from internvl_edge.checkpoint.chat_template import check_chat_template
from internvl_edge.checkpoint.layouts import linear_names
from internvl_edge.checkpoint.license import read_license
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import read_record
from internvl_edge.checkpoint.tokenizer_files import build_tokenizer, end_tokens, token_ids
from internvl_edge.model.components import Component, components
from internvl_edge.model.linear import INT8, Scheme
from internvl_edge.model.template import template_for

from .builder import Types
from .decoder import build_decoder
from .prompts import build_prompts
from .quantized import PackedWeights
from .vision import build_vision
from .weights import NUMPY_DTYPES, WeightFile, convert_blocks

DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
# bfloat16 is missing because ONNX Runtime has no bfloat16 kernels on a CPU. TensorRT's graphs get the type of their
# device when they are built.
ACTIVATIONS = ("float32", "float16")
_EMBED_TOKENS = "decoder.embed_tokens.weight"
_LAYERS = "decoder.layers."
# Phases of the progress that an export shows.
EXPORT_PHASES = 2


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    dtype: str = "float32",
    activations: str = "float32",
    *,
    dialects: Sequence[str] = tuple(names.DECODERS),
    token_table: str = "auto",
    int8_prompts: bool = False,
    force: bool = False,
    progress: bool | Progress = False,
) -> Path:
    """Export an InternVL checkpoint folder to a bundle folder.

    Args:
        checkpoint: local folder (the command line resolves a hub id, see `internvl_edge.checkpoint.hub`).
        out: the bundle to make.
        dtype: stored type of the weights: "float32", "float16" or "bfloat16".
        activations: type that the graphs compute in, "float32" or "float16"; float32 is right for CPUs.
        dialects: the decoders to write; quantized weights are stored once for each.
        token_table: "float" (in `dtype`), "int8" (one scale per token), or "auto": int8 where the layers of the decoder
            are quantized.
        int8_prompts: add a graph that computes long prompts in int8, for CPUs and decoders with 4-bit weights: faster,
            at the price of a second copy of the weights in 8 bits (see `prompts`).
        force: replace an existing bundle at `out`, if nothing else lies in it.
        progress: show the progress on standard error.

    Returns:
        The bundle's folder.

    Raises:
        EdgeError: the checkpoint is not usable, `out` exists, or the disk is full. No files are left behind.
    """
    for name, value, known in (("dtype", dtype, DTYPES), ("activations", activations, ACTIVATIONS)):
        if value not in known:
            raise EdgeError(f"{name} {value!r} is not one of {', '.join(known)}")
    if not dialects or not set(dialects) <= set(names.DECODERS):
        raise EdgeError(f"dialects {list(dialects)} are not some of {', '.join(names.DECODERS)}")
    if int8_prompts and "onnxruntime" not in dialects:
        raise EdgeError("prompts in int8 go with the onnxruntime decoder, which --dialect leaves out; add it")
    if token_table not in TYPES:
        raise EdgeError(f"token table {token_table!r} is not one of {', '.join(TYPES)}")
    source, target = Checkpoint(Path(checkpoint)), Path(out)
    permit = partial(require_replaceable, target, force, "a bundle", bundle_files)
    permit()
    with readable_disk_errors(target), new_folder(target, permit) as folder:
        types = Types(DTYPES[dtype], DTYPES[activations])
        packed = PackedWeights(source, types)
        quantized = any(name.startswith(_LAYERS) for name in source.schemes)
        table = dtype if table_type(token_table, quantized) == "float" else "int8"
        export = _Export(source, folder, types, packed, table, as_progress(progress))
        export.run(dtype, activations, dialects, int8_prompts)
    return target


class _Export:
    """One export in progress. It collects the SHA-256 of each file that it writes."""

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, types: Types, packed: PackedWeights, table: str, progress: Progress
    ) -> None:
        self._checkpoint = checkpoint
        self._record = read_record(checkpoint.folder)
        self._folder = folder
        self._types = types
        self._packed = packed
        self._table = table
        self._progress = progress
        self._digests: dict[str, str] = {}

    def run(self, dtype: str, activations: str, dialects: Sequence[str], int8_prompts: bool) -> None:
        self._progress.expect(EXPORT_PHASES)
        with self._progress.phase("writing the graphs"):
            files = self._write_graphs(dialects, int8_prompts)
        self._write_weights(files)
        self._write_manifest(dtype, activations)

    def _write_graphs(self, dialects: Sequence[str], int8_prompts: bool) -> list[WeightFile]:
        """Write graphs and tokenizer, and return the files of weights that the graphs refer to."""
        config = self._checkpoint.config
        if config.layout == "native":
            check_chat_template(self._checkpoint.folder)
        tokenizer = build_tokenizer(self._checkpoint.folder, config)
        (self._folder / names.TOKENIZER).write_bytes(tokenizer)
        tokens = tokenizers.Tokenizer.from_buffer(tokenizer).get_vocab().values()
        vision, decoder, prompts = (WeightFile(f"{name}.data") for name in ("vision", "decoder", "prompts"))
        ir.save(build_vision(self._checkpoint, self._types, vision), self._folder / names.VISION)
        for dialect in dialects:
            graph = build_decoder(self._checkpoint, self._types, dialect, decoder, self._packed, max(tokens) + 1)
            ir.save(graph, self._folder / names.DECODERS[dialect])
        if int8_prompts:
            ir.save(build_prompts(self._checkpoint, self._types, prompts), self._folder / names.PROMPTS)
        if self._record:
            (self._folder / names.QUANTIZATION).write_text(dumps(self._record), encoding="utf-8")
        return [file for file in (vision, decoder, self._packed.blocks, prompts) if file.size]

    def _write_manifest(self, dtype: str, activations: str) -> None:
        config, record, packing = self._checkpoint.config, self._record, self._checkpoint.quantization
        hub = hub_source(self._checkpoint.folder)
        tokenizer = (self._folder / names.TOKENIZER).read_bytes()
        manifest = Manifest(
            producer=f"internvl-edge {__version__}",
            source=hub.repository if hub else self._checkpoint.folder.resolve().name,
            model=config,
            template=template_for(config.template, config.system_message),
            tokens=SpecialTokens(*token_ids(tokenizer, end_tokens(self._checkpoint.folder, config))),
            dtype=dtype,
            activations=activations,
            token_table=self._table,
            files={path.name: self._entry(path) for path in sorted(self._folder.iterdir())},
            kv_cache="int8" if self._checkpoint.kv_scales else None,
            linears=self._linears(),
            components=self._components(dtype),
            quantization=self._packed.summary(packing.method) if packing else None,
            hub=hub or (record.hub if record else None),
            license=read_license(self._checkpoint.folder),
        )
        manifest.write(self._folder)

    def _linears(self) -> dict[str, Scheme]:
        """Return the quantized linears of the graphs. The vision tower's unused last layers are in no graph."""
        schemes = self._checkpoint.schemes
        return {name: schemes[name] for name in linear_names(self._checkpoint.config) if name in schemes}

    def _components(self, dtype: str) -> tuple[Component, ...]:
        types, schemes = self._types, self._checkpoint.schemes
        if self._table == "int8":
            schemes = schemes | {_EMBED_TOKENS.removesuffix(".weight"): INT8}
        return components(self._checkpoint.shapes, schemes, dtype, types.weights.bitwidth, types.activations.bitwidth)

    def _write_weights(self, files: list[WeightFile]) -> None:
        vocabulary, width = self._checkpoint.shapes[_EMBED_TOKENS]
        total = sum(file.size for file in files) + table_bytes((vocabulary, width), self._table)
        require_space(self._folder, total, "the bundle", "make room, choose another disk or a 16-bit --dtype")
        with self._progress.phase("writing the weights", total, "bytes") as advance:
            for file in files:
                self._digests[file.name] = file.write(self._folder, advance)
            self._digests[names.EMBEDDINGS] = self._write_embeddings(advance)

    def _write_embeddings(self, progress: Advance) -> str:
        digest = hashlib.sha256()
        table = self._checkpoint.tensor(_EMBED_TOKENS)
        rounded = self._table == "int8"
        dtype = np.dtype(np.float32) if rounded else NUMPY_DTYPES[self._types.weights]
        blocks = convert_blocks(_EMBED_TOKENS, table, dtype, table.shape)
        with (self._folder / names.EMBEDDINGS).open("wb") as file:
            for block in int8_table(blocks, table.shape) if rounded else blocks:
                data: memoryview = block.reshape(-1).view(np.uint8).data
                file.write(data)
                digest.update(data)
                progress(len(data))
        return digest.hexdigest()

    def _entry(self, path: Path) -> FileEntry:
        return FileEntry(path.stat().st_size, self._digests.get(path.name) or sha256(path))
