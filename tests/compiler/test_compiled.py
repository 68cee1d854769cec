"""The kernels of engines that TensorRT for RTX really built: which copies a step makes, and how many kernels it starts.

No GPU is needed: the programs are text in the engine files. The bounds are those of TensorRT for RTX 1.7.1, which
compiles the same program for each compute capability.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from helpers.kv_scales import write_scales
from helpers.repository import REPOSITORY
from helpers.tiny_quantized import write_quantized
from internvl_edge import export_bundle
from internvl_edge.base.errors import EngineError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.compiler.bundle_engines import (
    build_engines,
    headers,
    notes,
    options_for,
    profiles,
)
from internvl_edge.compiler.compiled import CompiledProgram, Kernel, compiled_programs
from internvl_edge.compiler.engine import Build, build_engine
from internvl_edge.demo import CHECKPOINT
from internvl_edge.model.linear import Scheme
from internvl_edge.planning.devices import Devices
from internvl_edge.planning.programs import Programs
from internvl_edge.runtime.engines.tensorrt.flavour import load_flavour
from internvl_edge.runtime.engines.tensorrt.record import ENGINES, engine_folder

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx-cu13)")

RTX = Devices().target("rtx")
LAYERS = 6
# Quantized linears of the demo model, whose vocabulary of 711 tokens is odd as that of the published 2B.
HEAD = Scheme(8, None, True)
# The kind of a bundle -> the most kernels of a layer in a step of one token, in the program for the whole cache.
BOUNDS = {"bfloat16": 9, "int4": 10, "int4 with zero points": 16, "int8 cache": 11}
# The same for a step of four rows, whose products of q, k and v, and of gate and up, are not joined.
ROW_BOUNDS = {"bfloat16": 13, "int4": 13, "int4 with zero points": 24, "int8 cache": 14}
KINDS = ["bfloat16", "int4", pytest.param("int4 with zero points", marks=pytest.mark.slow), "int8 cache"]
# Kernels of a step that belong to no layer: the first norm, the mask, the head, the choice of the token.
ONCE = 12
Found = dict[Programs, CompiledProgram]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """Build the decoder of the demo model in one of the kinds, once."""

    @cache
    def build(kind: str) -> Found:
        folder = tmp_path_factory.mktemp("compiled")
        count = Programs.STEP if kind == "int8 cache" else Programs.WHOLE
        programs = compiled_programs(engine(checkpoint(kind, folder), folder, count))
        names = [Programs.STEP, *([Programs.WHOLE] if count == Programs.WHOLE else []), Programs.ONE]
        return dict(zip(names, programs, strict=True))

    return build


def checkpoint(kind: str, folder: Path) -> Path:
    if kind == "bfloat16":
        return CHECKPOINT
    body = Scheme(4, 128, symmetric="zero points" not in kind)
    made, twin = write_quantized(CHECKPOINT, folder, method="compressed-tensors", body=body, head=HEAD)
    shutil.rmtree(twin)
    if kind == "int8 cache":
        write_scales(made)
    return made


def engine(source: Path, folder: Path, programs: Programs, sms: tuple[int, ...] = (86,), rows: int = 1) -> Path:
    bundle = Bundle.open(export_bundle(source, folder / "bundle", "float16", dialects=["standard"]))
    options = options_for(RTX, profiles=int(programs), rows=rows)
    header, path = headers(bundle, options)["decoder"]
    build = Build(header, path, sms, profiles(bundle.manifest.model, options, "decoder"), folder / "decoder.engine")
    build_engine(load_flavour("tensorrt_rtx"), build, lambda phase, done, total: None, threading.Event())
    return build.output


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_starts_few_kernels_and_attends_once_per_layer(kind: str, compiled: Callable[[str], Found]) -> None:
    step = compiled(kind).get(Programs.WHOLE) or compiled(kind)[Programs.STEP]
    assert sum(kernel.attends for kernel in step.kernels) == LAYERS
    assert len(step.kernels) <= BOUNDS[kind] * LAYERS + ONCE
    one = compiled(kind)[Programs.ONE]
    assert sum(kernel.attends for kernel in one.kernels) == LAYERS
    assert len(step.kernels) < len(one.kernels)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_step_copies_the_cache_once_or_not_at_all(kind: str, compiled: Callable[[str], Found]) -> None:
    programs = compiled(kind)
    assert not programs[Programs.WHOLE].cache_rewrites
    copies = programs[Programs.STEP].cache_rewrites
    assert [kernel.steps for kernel in copies] == [("Slic",)] * (2 * LAYERS)
    # A program for several rows also transposes it. That is why a step has its own.
    assert [kernel.steps for kernel in programs[Programs.ONE].cache_rewrites] == [("Tran", "Slic")] * (2 * LAYERS)


def test_a_step_widens_an_int8_cache_once_and_transposes_nothing(compiled: Callable[[str], Found]) -> None:
    rewrites = compiled("int8 cache")[Programs.STEP].cache_rewrites
    assert LAYERS <= len(rewrites) <= 2 * LAYERS
    assert all("Tran" not in kernel.steps for kernel in rewrites)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_several_rows_reads_the_cache_in_place(kind: str, tmp_path: Path) -> None:
    """One attention per layer for all rows, and no copy of a 16-bit cache."""
    step, prompt = compiled_programs(engine(checkpoint(kind, tmp_path), tmp_path, Programs.STEP, rows=4))
    for program in (step, prompt):
        assert sum(kernel.attends for kernel in program.kernels) == LAYERS
        assert program.unpacked == ()
    assert len(step.kernels) <= ROW_BOUNDS[kind] * LAYERS + ONCE
    rewrites = step.cache_rewrites
    assert len(rewrites) <= (2 * LAYERS if kind == "int8 cache" else 0)  # an int8 cache is widened
    assert all("Tran" not in kernel.steps for kernel in rewrites)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_weights_are_dequantized_inside_their_product(kind: str, compiled: Callable[[str], Found]) -> None:
    """The int8 head is the hard one: an odd vocabulary, or a single row, made it a matrix of floats for each token."""
    for program in compiled(kind).values():
        assert program.unpacked == ()
        dequantized = {node for kernel in program.kernels for node in kernel.nodes if "DequantizeLinear" in node}
        assert dequantized


def test_int8_weights_with_float_inputs_have_one_program_and_are_dequantized_inside_their_products(
    tmp_path: Path,
) -> None:
    """A program for one row, or for products that are joined, would write them to memory as floats for each token."""
    choices = {"method": "compressed-tensors", "body": HEAD, "head": HEAD}
    made, _ = write_quantized(CHECKPOINT, tmp_path, **choices)
    bundle = Bundle.open(export_bundle(made, tmp_path / "bundle", "float16", dialects=["standard"]))
    options = options_for(RTX, opened=bundle)
    assert options.profiles == Programs.ONE
    assert notes(bundle, RTX, options) == [
        "one program serves prompts and steps: programs for one token dequantize int8 weights in memory"
    ]
    build_engines(bundle, RTX, options)
    (program,) = compiled_programs(engine_folder(bundle, RTX.name) / ENGINES["decoder"])
    assert program.unpacked == ()
    assert sum("DequantizeLinear" in node for kernel in program.kernels for node in kernel.nodes) > LAYERS


@pytest.mark.slow
def test_one_file_for_several_cards_holds_the_same_program(tmp_path: Path) -> None:
    found = []
    for name, sms in (("all", RTX.sms), ("one", (86,)), ("newest", (120,))):
        (tmp_path / name).mkdir()
        (program,) = compiled_programs(engine(checkpoint("int4", tmp_path / name), tmp_path / name, Programs.ONE, sms))
        found.append([kernel.name for kernel in program.kernels])
    assert found[0] == found[1] == found[2]


def test_a_planted_copy_and_an_unpacked_weight_are_seen(tmp_path: Path) -> None:
    """A head of one row with an odd number of columns, as headers had it, is dequantized in memory."""
    inputs, columns = 256, 1001
    weights = numpy_helper.from_array(_integers(inputs, columns), "weights")
    scale = numpy_helper.from_array(_integers(1, columns)[0].astype("float16") ** 2 + 1, "scale")
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["weights", "scale"], ["floats"], axis=1),
        onnx.helper.make_node("MatMul", ["x", "floats"], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info
    half = onnx.TensorProto.FLOAT16
    graph = onnx.helper.make_graph(
        nodes,
        "head",
        [value("x", half, [1, "rows", inputs])],
        [value("y", half, [1, "rows", columns])],
        [weights, scale],
    )
    header = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    shapes = {"x": ((1, 1, inputs), (1, 1, inputs), (1, 2, inputs))}
    build = Build(header.SerializeToString(), tmp_path / "head.onnx", (86,), (shapes,), tmp_path / "head.engine")
    build_engine(load_flavour("tensorrt_rtx"), build, lambda phase, done, total: None, threading.Event())
    (program,) = compiled_programs(build.output)
    assert [kernel.name for kernel in program.unpacked] == ["__myl_CastMulConcCast"]
    assert program.summary()["unpacked_weights"] == 1
    script = [sys.executable, str(REPOSITORY / "benchmarks" / "engine_kernels.py"), str(build.output)]
    shown = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert shown.startswith("program 0: kernels ")
    assert any(line.split()[:2] == ["U", "__myl_CastMulConcCast"] for line in shown.splitlines())
    listed = json.loads(subprocess.run([*script, "--json"], capture_output=True, text=True, check=True).stdout)
    assert [kernel["name"] for kernel in listed[0]["list"]] == [kernel.name for kernel in program.kernels]


def _integers(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-127, 127, (rows, columns)).astype(np.int8)


def test_kernels_are_told_apart() -> None:
    copy = Kernel("function", "__myl_TranSlic", ("Tran", "Slic"), (), ("present.0.key",), ("copied",))
    assert copy.moves
    assert not copy.attends
    update = Kernel("function", "__myl_AddScat", ("Add", "Scat"), (), ("present.0.key", "new"), ("present.0.key",))
    attention = Kernel("function", "_gemv_mha_v1", (), ("node_Attention_3",), ("copied",), ("attended",))
    assert attention.attends
    assert not attention.multiplies
    shapes: dict[str, tuple[tuple[int | str, ...], str]] = {
        "present.0.key": ((1, 2, 64, 8), "bf16"),
        "copied": ((1, 2, "window", 8), "bf16"),
    }
    program = CompiledProgram((update, copy, attention), 0, shapes, 0)
    assert program.cache_rewrites == (copy,)
    again = Kernel("function", "__myl_Tran", ("Tran",), (), ("copied",), ("transposed",))
    assert CompiledProgram((update, copy, again), 0, shapes, 0).cache_rewrites == (copy, again)


def test_what_is_no_engine_of_rtx_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "decoder.engine"
    path.write_bytes(b"ftrt" + bytes(5000))
    with pytest.raises(EngineError, match=r"decoder\.engine holds no compiled program in text; expected an engine of"):
        compiled_programs(path)
