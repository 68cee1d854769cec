"""`deploy`: what it decides, what it says, what it repeats and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.calibration_data import write_data
from helpers.commands import assert_one_line, internvl_edge
from helpers.fake_hub import COMMIT, FakeHub, serving
from helpers.tiny import write_checkpoint
from internvl_edge.base import machine
from internvl_edge.base.errors import EdgeError, EngineError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.quality_record import quality_of, record_quality
from internvl_edge.checkpoint.record import read_record
from internvl_edge.demo import CHECKPOINT
from internvl_edge.deployment import Deployed, Request, Stage, deploy
from internvl_edge.deployment import stages as stages_module
from internvl_edge.deployment.state import STATE, StateFile
from internvl_edge.evaluation import EvaluationSettings, evaluator
from internvl_edge.recipe.recipe import Recipe

RECIPE = Recipe(decoder="w4a16-rtn", group_size=32, lm_head="int8")
FAST = ("--scheme", "w4a16-rtn", "--group-size", "32", "--vision", "fp", "--no-evaluate")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask few questions and draw no pages in this process. The commands below do all of it."""
    monkeypatch.setattr(evaluator, "_CASES", 2)
    monkeypatch.setattr(stages_module, "write_report", lambda report, folder: None)


def request(checkpoint: Path, output: Path, device: str = "cpu", **changes: Any) -> Request:
    made = Request(str(checkpoint), output, device, recipe=RECIPE, recipe_name="four bits", evaluate=False)
    return replace(made, **changes)


def said(asked: Request) -> tuple[Deployed, list[Stage]]:
    stages: list[Stage] = []
    return deploy(asked, said=lambda number, stage: stages.append(stage)), stages


def kept(asked: Request) -> list[str]:
    return [stage.name for stage in said(asked)[1] if stage.kept]


# ---- the command ----


@pytest.fixture(scope="module")
def deployed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """A deployment on a CPU by the command: its folder, what was printed, and the arguments."""
    folder = tmp_path_factory.mktemp("deployed")
    data = write_data(folder / "data")
    output = folder / "made"
    arguments = ["deploy", str(checkpoint), "--device", "cpu", "-o", str(output), "--group-size", "32"]
    arguments += ["--vision", "fp", "--data", str(data), "--max-tiles", "1", "--context", "600"]
    done = internvl_edge(*arguments)
    assert done.returncode == 0, done.stderr
    return output, done.stdout, arguments


def test_each_stage_is_one_line_and_the_last_command_runs(deployed: tuple[Path, str, list[str]]) -> None:
    output, printed, _ = deployed
    lines = printed.splitlines()
    names = ["plan", "quantize", "export", "evaluate", "build"]
    assert [line.split(":")[0] for line in lines[:5]] == [f"[{n} of 5] {name}" for n, name in enumerate(names, 1)]
    assert "recipe cpu, context 600, dialect onnxruntime; needs about" in lines[0]
    assert re.search(r"KL divergence [\d.]+ nats, same most probable token .*, 32 questions", lines[3])
    assert "not needed on a CPU" in lines[4]
    assert re.fullmatch(rf"{re.escape(str(output))}: done in .*", lines[5])
    words = shlex.split(lines[6].removeprefix("Next: "))
    assert words[:6] == ["internvl-edge", "run", str(output / "bundle"), "--context", "600", "--image"]
    serving = ["internvl-edge", "serve", str(output / "bundle"), "--context", "600"]
    assert shlex.split(lines[7].removeprefix("Or over HTTP: ")) == serving
    Image.new("RGB", (56, 56)).save(output.parent / "photo.png")
    asked = [str(output.parent / "photo.png") if word == "PHOTO.jpg" else word for word in words[1:]]
    answered = internvl_edge(*asked, "--max-new-tokens", "2", "--engine", "onnxruntime", "--device", "cpu")
    assert answered.returncode == 0, answered.stderr


def test_a_second_start_repeats_nothing(deployed: tuple[Path, str, list[str]]) -> None:
    output, printed, arguments = deployed

    def stamps() -> dict[str, tuple[int, bytes]]:
        files = [path for path in output.rglob("*") if path.is_file() and path.name != "deployment.json"]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = stamps()
    done = internvl_edge(*arguments)
    assert done.returncode == 0, done.stderr
    assert stamps() == before
    lines = done.stdout.splitlines()
    assert all(line.endswith("(done before)") for line in lines[:4])
    assert [re.sub(r" \([^()]*\)$", "", line) for line in lines[:4]] == [
        re.sub(r" \([^()]*\)$", "", line) for line in printed.splitlines()[:4]
    ]
    assert lines[-1] == printed.splitlines()[-1]


def test_the_bundle_carries_its_figures(deployed: tuple[Path, str, list[str]]) -> None:
    manifest = Bundle.open(deployed[0] / "bundle").manifest
    assert quality_of(manifest).measured["comparison"].questions == 32
    assert (deployed[0] / "bundle.report" / "report.json").is_file()
    assert (deployed[0] / "checkpoint" / "README.md").read_text().startswith("---\n")
    record = read_record(deployed[0] / "checkpoint")
    assert record is not None
    assert record.recipe["decoder"] == "w4a16-awq"  # of the preset; the options replaced other fields


def test_json_is_one_object(checkpoint: Path, tmp_path: Path) -> None:
    done = internvl_edge("deploy", checkpoint, "--device", "orin-nano-8gb", "-o", tmp_path / "d", *FAST, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [stage["name"] for stage in facts["stages"]] == ["plan", "quantize", "export", "evaluate", "build"]
    assert facts["choice"]["context"] == 4096
    assert [words[0] for words in facts["on_device"]] == ["build", "run", "serve"]


def test_the_commands_for_a_board_are_printed(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "board"
    done = internvl_edge("deploy", checkpoint, "--device", "orin-nano-8gb", "-o", out, *FAST, "--context", "700")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "[5 of 5] build: left for the device: tensorrt cannot be imported" in lines[4]
    assert lines[-3].split() == ["internvl-edge", "build", "bundle", "--device", "orin-nano-8gb", "--context", "700"]
    assert shlex.split(lines[-2])[:3] == ["internvl-edge", "run", "bundle"]
    assert set(Bundle.open(out / "bundle").manifest.files) >= {"decoder.onnx", "vision.onnx"}
    assert not (out / "bundle" / "decoder.onnxruntime.onnx").exists()


# ---- what counts as done ----


def test_what_determines_a_stage_decides_whether_it_is_done(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    asked = request(checkpoint, out)
    assert kept(asked) == []
    assert kept(asked) == ["plan", "quantize", "export"]
    (out / "bundle" / "decoder.data").write_bytes(b"damaged")
    assert kept(asked) == ["plan", "quantize"]
    config = out / "checkpoint" / "config.json"
    whole = config.read_bytes()
    config.write_bytes(whole + b"\n")
    assert kept(asked) == ["plan"]  # what follows a stage that is done again is done again
    assert config.read_bytes() == whole


def test_other_choices_need_force(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    deploy(request(checkpoint, out))
    other = request(checkpoint, out, recipe=replace(RECIPE, group_size=64))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(EdgeError, match=r"was made with another recipe; repeat its options, .* --force"):
        deploy(other)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert kept(replace(other, force=True)) == []
    groups = {scheme.group_size for scheme in Bundle.open(out / "bundle").manifest.schemes("decoder.layers.").values()}
    assert groups == {64}
    assert kept(other) == ["plan", "quantize", "export"]
    with pytest.raises(EdgeError, match=r"is the deployment of tiny for cpu"):
        deploy(replace(other, device="rtx"))


def test_a_changed_checkpoint_is_another_one(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    asked = request(source, tmp_path / "made")
    deploy(asked)
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(EdgeError, match="was made with another checkpoint"):
        deploy(asked)
    assert kept(replace(asked, force=True)) == ["plan"]


def test_a_folder_of_somebody_else_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(EdgeError, match=r"exists and is no deployment: no deployment\.json in it"):
            deploy(request(checkpoint, tmp_path, force=force))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_was_killed_before_its_first_state_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / f"{STATE}.new").write_text('{"for')
    StateFile(tmp_path, "checkpoint", None, "cpu", force=False)
    assert [path.name for path in tmp_path.iterdir()] == [STATE], "what the killed process left is gone"
    (tmp_path / STATE).unlink()
    (tmp_path / f"{STATE}.mine").write_text("mine")
    with pytest.raises(EdgeError, match="is no deployment"):
        StateFile(tmp_path, "checkpoint", None, "cpu", force=False)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format_version": 2}', '{"format_version": 1, "stages": 3}', "\xff"]
)
def test_damaged_state_is_one_line(checkpoint: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "deployment.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(EdgeError, match=r"deployment\.json"):
        deploy(request(checkpoint, tmp_path))


def test_figures_that_the_user_measured_stay(checkpoint: Path, tmp_path: Path) -> None:
    asked = request(checkpoint, tmp_path / "made")
    bundle = deploy(asked).bundle
    data = write_data(tmp_path / "data")
    result = evaluator.evaluate(EvaluationSettings(bundle, checkpoint, data=data, samples=3, max_new_tokens=2))
    record_quality(bundle, result.quality)
    before = (bundle / "manifest.json").read_bytes()
    stages = said(replace(asked, evaluate=True))[1]
    assert stages[3].text.endswith("3 questions")
    assert (bundle / "manifest.json").read_bytes() == before


def test_unfinished_work_is_not_thrown_away_by_other_options(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    asked = request(checkpoint, tmp_path / "made")
    with monkeypatch.context() as patched:
        patched.setattr(stages_module, "quantize_checkpoint", stopped)
        with pytest.raises(KeyboardInterrupt):
            deploy(asked)
    with pytest.raises(EdgeError, match="was made with another recipe"):
        deploy(replace(asked, recipe=replace(RECIPE, group_size=64)))
    assert kept(asked) == ["plan"]


# ---- what is decided ----


def test_a_quantized_checkpoint_is_not_quantized_again(checkpoint: Path, tmp_path: Path) -> None:
    deploy(request(checkpoint, tmp_path / "first"))
    quantized = tmp_path / "first" / "checkpoint"
    done, stages = said(request(quantized, tmp_path / "second", recipe=None, evaluate=True))
    assert stages[1].text == "not needed, the checkpoint is quantized already"
    assert stages[3].text == "left out: the float checkpoint is not known"
    assert done.choice.recipe == "as it is"
    first = Bundle.open(tmp_path / "first" / "bundle").manifest
    assert Bundle.open(done.bundle).manifest.linears == first.linears
    with pytest.raises(EdgeError, match="is quantized already; leave out the options of the recipe"):
        deploy(request(quantized, tmp_path / "third"))


def test_nothing_that_fits_is_one_line_with_what_would(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory", lambda *fields: int(1.7 * 2**30))
    with pytest.raises(EdgeError, match=r"has .* for a model, and this one needs .*; what fits: ") as raised:
        deploy(request(checkpoint, tmp_path / "made"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "made" / "checkpoint").exists()


def test_what_was_decided_stays_decided(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start on a machine with less memory continues what the first one planned."""
    asked = request(checkpoint, tmp_path / "made")
    first = deploy(asked)
    monkeypatch.setattr(machine, "memory", lambda *fields: int(1.7 * 2**30))
    assert deploy(asked).choice == first.choice


def test_a_float_model_too_large_to_compare_with_is_left_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"MemTotal": 8 << 30, "MemAvailable": 1 << 20}
    monkeypatch.setattr(machine, "memory", lambda *fields: sizes[fields[0]])
    stages = said(request(checkpoint, tmp_path / "made", evaluate=True))[1]
    assert stages[3].text.startswith("left out: the float model needs ")
    assert "evaluate" in stages[3].text


def test_a_recipe_that_decides_layer_by_layer_is_deployed(checkpoint: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, layers=(("layers.0.*", "fp"),))
    done = deploy(request(checkpoint, tmp_path / "made", recipe=recipe))
    assert not Bundle.open(done.bundle).manifest.schemes("decoder.layers.0.")


def test_a_bundle_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    done = deploy(request(checkpoint, tmp_path / "made"))
    with pytest.raises(EdgeError, match="is a bundle already"):
        deploy(request(done.bundle, tmp_path / "again"))


@pytest.mark.parametrize(
    ("device", "fragment"), [("jetson", "is a family"), ("toaster", "is not known"), ("rtx-406", "did you mean")]
)
def test_a_device_that_is_none_is_one_line(checkpoint: Path, tmp_path: Path, device: str, fragment: str) -> None:
    assert_one_line(internvl_edge("deploy", checkpoint, "--device", device, "-o", tmp_path / "x"), fragment)


def test_engines_are_built_where_the_compiler_is_here(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `build` itself does is tested where it is; here it is called with the target and the planned context."""
    from internvl_edge.compiler import bundle_engines
    from internvl_edge.runtime.engines.tensorrt.record import EngineRecord, graph_inputs

    asked: list[tuple[Any, Any]] = []

    def build(opened: Bundle, target: Any, options: Any, **others: Any) -> tuple[EngineRecord, bool]:
        asked.append((target.name, options.capacity))
        files = {"decoder.engine": {"bytes": 5, "sha256": ""}}
        return EngineRecord(target.name, target.flavour, "1.7", target.sms, options, graph_inputs(opened), files), True

    monkeypatch.setattr(bundle_engines, "obstacle", lambda target: "")
    monkeypatch.setattr(bundle_engines, "build_engines", build)
    done = deploy(request(checkpoint, tmp_path / "made", "rtx", context=900))
    assert asked == [("rtx", 900)]
    assert done.on_device == ()
    assert "--context" not in done.run
    monkeypatch.setattr(bundle_engines, "build_engines", _failing)
    with pytest.raises(EngineError, match="needs more memory"):
        deploy(request(checkpoint, tmp_path / "made", "rtx", context=900))


def _failing(*arguments: Any, **options: Any) -> None:
    raise EngineError("the build needs more memory")


# ---- by hub id ----


def test_a_later_start_takes_the_commit_of_the_first(checkpoint: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    home = tmp_path / "home"
    kept_variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    command = ["deploy", "org/model", "--device", "cpu", "-o", str(tmp_path / "made"), *FAST]
    with serving(FakeHub("org/model", files, ("main", "v1"))) as hub:
        environment = kept_variables | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        done = internvl_edge(*command, environment=environment)
        assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "made" / "deployment.json").read_text())
    assert (state["checkpoint"], state["commit"]) == ("org/model", COMMIT)
    manifest = Bundle.open(tmp_path / "made" / "bundle").manifest
    assert manifest.hub is not None
    assert manifest.hub.commit == COMMIT
    again = internvl_edge(*command, environment=environment | {"HF_HUB_OFFLINE": "1"})  # without network
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("(done before)") == 3


# ---- engines ----


def test_negative_scales_are_refused_for_tensorrt_before_anything_is_made(checkpoint: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, symmetric=True, negative_scales=True)
    with pytest.raises(EdgeError, match=r"takes no negative scales; use --positive-scales"):
        deploy(request(checkpoint, tmp_path / "made", "rtx", recipe=recipe))
    assert not (tmp_path / "made").exists()
    deploy(request(checkpoint, tmp_path / "made", recipe=recipe))  # a CPU takes them


@pytest.mark.slow
def test_a_deployment_for_rtx_cards_ends_with_engines(tmp_path: Path) -> None:
    """TensorRT for RTX builds without a GPU, here for the shipped demo model."""
    pytest.importorskip("tensorrt_rtx")
    asked = request(CHECKPOINT, tmp_path / "made", "rtx", context=1024, recipe=replace(RECIPE, symmetric=True))
    done, stages = said(asked)
    assert done.on_device == ()
    folder = done.bundle / "engines" / "rtx"
    assert {"engine.json", "vision.engine", "decoder.engine"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "engine.json").read_text())["options"]["capacity"] == 1024
    assert not stages[4].kept
    assert kept(asked) == ["plan", "quantize", "export", "build"]
