"""The table of devices, the user's own entries, and mistakes in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from internvl_edge.planning.devices import FLAVOURS, DeviceError, Devices, Target

MINE = """
[devices.my-board]
title = "My board"
compute_capability = "8.7"
memory_gib = 12
unified = true
bandwidth_gbs = 102.4
tflops = 12
int8_tops = 24
flavour = "tensorrt"
versions = ">=10.15"
"""


@pytest.fixture(autouse=True)
def no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "internvl-edge" / "devices.toml"


def test_shipped_devices_are_plausible() -> None:
    for device in Devices().all.values():
        assert device.flavour in FLAVOURS
        assert 0 < device.usable_memory < device.memory
        assert device.tflops * 1e12 > 50 * device.bandwidth_gbs * 1e9
        assert device.int8_tops / device.tflops == pytest.approx(
            2 if device.tflops * 3 > device.int8_tops else 4, rel=0.02
        )
        assert device.unified == (device.sm in (87, 110, 121))


def test_formats_follow_the_architecture() -> None:
    devices = Devices()
    assert devices.device("orin-nano-8gb").formats == ("fp16", "int8", "int4", "bf16")
    assert devices.device("rtx-3060").formats == ("fp16", "int8", "int4", "bf16")
    assert "fp8" in devices.device("rtx-4060").formats
    assert "fp4" not in devices.device("rtx-4060").formats
    assert devices.device("rtx-5090").formats[-1] == devices.device("thor").formats[-1] == "fp4"


def test_targets() -> None:
    devices = Devices()
    assert devices.target("rtx").sms == (86, 89, 120)
    assert devices.target("rtx").dtype == "bfloat16"
    orin = devices.device("orin-nano-8gb")
    target = Target("orin-nano-8gb", "Jetson Orin Nano 8GB", "tensorrt", ("8.7",), orin.usable_memory)
    assert devices.target("orin-nano-8gb") == target
    smallest = min(device.usable_memory for device in devices.all.values() if device.flavour == "tensorrt_rtx")
    assert devices.target("rtx").usable_memory == smallest
    assert replace(devices.target("rtx"), compute_capabilities=("7.5", "8.6")).dtype == "float16"


def test_what_a_board_reports_is_optional_and_checked(tmp_path: Path) -> None:
    table = tmp_path / "devices.toml"
    table.write_text(MINE + "reported_mib = 3900\n", encoding="utf-8")
    mine = next(name for name in Devices(table).all if name not in Devices().all)
    assert Devices(table).device(mine).reported_mib == 3900
    table.write_text(MINE + 'reported_mib = "much"\n', encoding="utf-8")
    with pytest.raises(DeviceError, match="reported_mib is 'much', expected a positive number"):
        Devices(table)


def test_own_devices_join_and_replace(tmp_path: Path, no_configuration: Path) -> None:
    extra = tmp_path / "extra.toml"
    extra.write_text(MINE)
    assert Devices(extra).device("my-board").memory == 12 << 30
    no_configuration.parent.mkdir(parents=True)
    no_configuration.write_text(MINE.replace("my-board", "rtx-3060"))
    assert Devices(extra).device("rtx-3060").title == "My board"
    assert "my-board" in Devices(extra).all


def test_near_names_are_offered() -> None:
    with pytest.raises(DeviceError, match="did you mean orin-nano"):
        Devices().device("orin-nano")
    with pytest.raises(DeviceError, match="not known"):
        Devices().target("toaster")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (("memory_gib = 12", ""), "my-board: memory_gib is missing"),
        (("memory_gib = 12", "memory_gib = 'much'"), "memory_gib is 'much', expected a positive number"),
        (("memory_gib = 12", "memory_gib = true"), "memory_gib is True"),
        (("memory_gib = 12", "memory_gib = -1"), "memory_gib is -1"),
        (("unified = true", "unified = 1"), "unified is 1, expected true or false"),
        (("unified = true", "unified = true\ncores = 3"), "cores is not known"),
        (('"8.7"', '"8,7"'), "compute_capability is '8,7'"),
        (('flavour = "tensorrt"', 'flavour = "openvino"'), "flavour is 'openvino'"),
        (("[devices.my-board]", "[device.my-board]"), "'device' is not known"),
        (("[devices.my-board]", "[devices.my-board"), "not valid TOML"),
        (("[devices.my-board]", "[groups.mine]"), "groups.mine has no usable 'compute_capabilities'"),
    ],
)
def test_mistakes_name_file_entry_and_field(tmp_path: Path, change: tuple[str, str], fragment: str) -> None:
    table = tmp_path / "mine.toml"
    table.write_text(MINE.replace(*change))
    with pytest.raises(DeviceError, match=r"mine\.toml") as error:
        Devices(table)
    assert fragment in str(error.value)


def test_missing_table(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="No such file"):
        Devices(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (("tflops = 12", "tflops = inf"), "tflops is inf"),
        (("tflops = 12", "tflops = nan"), "tflops is nan"),
        (("tflops = 12", "tflops = 1e300"), "tflops is 1e+300, expected a positive number"),
        (("tflops = 12", "tflops = 0"), "tflops is 0"),
        (("tflops = 12", "tflops = " + "9" * 400), "integer beyond all limits"),
        (("tflops = 12", "tflops = " + "9" * 5000), "not valid TOML"),
        (("tflops = 12", "tflops = [1]"), "tflops is [1]"),
        (("[devices.my-board]", '[devices."../../x"]'), "the name '../../x' is not of letters"),
        (("[devices.my-board]", '[devices.".."]'), "the name '..' is not of letters"),
        (("[devices.my-board]", '[devices.""]'), "the name '' is not of letters"),
        (("[devices.my-board]", '[devices."a\\nb"]'), "is not of letters"),
        (("[devices.my-board]", "[devices.my-board]\nname = 'x'"), "name is not known"),
        ((MINE, '[groups."a/b"]\ntitle = "x"\nflavour = "tensorrt"\ncompute_capabilities = ["8.7"]'), "name 'a/b'"),
        ((MINE, '[groups.a]\ntitle = 3\nflavour = "tensorrt"\ncompute_capabilities = ["8.7"]'), "usable 'title'"),
        ((MINE, '[groups.a]\ntitle = "x"\nflavour = "tensorrt"\ncompute_capabilities = "8.7"'), "usable 'compute"),
        (
            (MINE, '[groups.a]\ntitle = "x"\nflavour = "tensorrt"\ncompute_capabilities = [8]'),
            "capabilities like '8.6'",
        ),
        ((MINE, "devices = 3"), "devices is 3"),
        ((MINE, "groups = []"), "groups is []"),
        ((MINE, "devices.a = 3"), "a is no table"),
        ((MINE, "groups.a = 3"), "a is no table"),
        ((MINE, "a = " + "[" * 9000), "not valid TOML"),
    ],
)
def test_tables_hold_finite_numbers_and_plain_names(tmp_path: Path, change: tuple[str, str], fragment: str) -> None:
    table = tmp_path / "mine.toml"
    table.write_text(MINE.replace(*change))
    with pytest.raises(DeviceError, match=r"mine\.toml") as error:
        Devices(table)
    assert fragment in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 400


def test_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff")
    with pytest.raises(DeviceError, match="is not UTF-8"):
        Devices(tmp_path / "mine.toml")


def test_families_hold_the_users_devices_too_and_are_no_targets(tmp_path: Path) -> None:
    table = tmp_path / "more.toml"
    table.write_text(MINE.replace("my-board", "orin-mine") + '[families]\nmine = ["orin-m*"]\n')
    devices = Devices(table)
    assert devices.families["mine"] == ["orin-mine"]
    assert "orin-mine" in devices.families["orin"]
    assert [device.name for device in devices.family("mine")] == ["orin-mine"]
    with pytest.raises(DeviceError, match="orin is a family, and its devices need engines of their own; choose one of"):
        devices.target("orin")
    assert devices.target("rtx").sms == (86, 89, 120)  # a group of devices that share one file
    table.write_text("[families]\nmine = 3\n")
    with pytest.raises(DeviceError, match="families is no table of name ="):
        Devices(table)
