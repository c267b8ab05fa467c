"""Device files: those that are shipped, a strict schema, and files that are none."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ds_cp.comm.links import LinkSpeed
from ds_cp.errors import ConfigError, OutputError
from ds_cp.sizing.device import check_writable, device_names, read_device, write_device
from ds_cp.startup.device_file import device_of
from ds_cp.startup.rates import Rates

LINKS = (
    LinkSpeed("within a host, shared memory", 4.0, 14.0, False), LinkSpeed("between hosts", 30, 1)
)  # fmt: skip
RATES = Rates(2e11, 1e11, 2e10, 1e10, 2e-4, 3e-4, 10 << 30, LINKS, 3e9)


@pytest.fixture
def plain() -> dict[str, Any]:
    """The object of a good device file."""
    return device_of(RATES, "mine", "a machine", "cpu", "bf16", 2)


def test_shipped_devices_are_whole() -> None:
    assert device_names() == ["a100", "b200", "cpu", "h100", "h200"]
    devices = {name: read_device(name) for name in device_names()}
    for name, device in devices.items():
        assert device.name == name and "bf16" in device.rates
        assert all(len(source) > 10 for source in device.sources.values())
    speed = [devices[n].rates["bf16"].linear_tflops for n in ("cpu", "a100", "h100", "b200")]
    assert speed == sorted(speed)
    assert devices["h200"].memory.gib > devices["h100"].memory.gib


def test_what_was_measured_is_a_device_file(plain: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    check_writable(str(file))
    write_device(plain, str(file))
    device = read_device(str(file))
    assert device.rates["bf16"].linear_tflops == 0.2 and device.memory.gb_per_s == 20
    assert device.memory.kv_gb_per_s == 10 and device.memory.host_gb_per_s == 3
    assert device.memory.gib == 10 and device.layer_us == 200 and device.step_us == 300
    assert device.links.inter_host.gb_per_s == 1 and device.links.inter_host.in_background
    assert not device.links.intra_host.in_background
    assert [p.name for p in tmp_path.iterdir()] == ["mine.json"]


def test_a_link_that_was_not_there_is_said_to_be_as_the_other() -> None:
    alone = Rates(2e11, 1e11, 2e10, 1e10, 2e-4, 3e-4, 10 << 30, LINKS[:1])
    found = device_of(alone, "m", "a", "cuda", "bf16", 2)
    assert found["links"]["inter_host"] == found["links"]["intra_host"]
    assert "not measured" in found["sources"]["links.inter_host.gb_per_s"]
    assert found["memory"]["kv_share"] == 0.85 and "host_gb_per_s" not in found["memory"]


def refused(plain: dict[str, Any], path: str, value: Any, file: Path) -> str:
    """The error of a device file in which ``path`` is ``value``."""
    changed = copy.deepcopy(plain)
    *way, last = path.split(".")
    at = changed
    for key in way:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    file.write_text(json.dumps(changed))
    with pytest.raises(ConfigError) as caught:
        read_device(str(file))
    message = str(caught.value)
    assert "\n" not in message and "device file" in message and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", ""), ("name", "x" * 61), ("name", "a\nb"), ("description", 5),
        ("memory.gib", 0), ("memory.gib", "80"), ("memory.gib", 1e30), ("memory.kv_share", 1.5),
        ("memory.gb_per_s", -1), ("layer_us", -1), ("layer_us", True), ("links.intra_host", None),
        ("links.inter_host.gb_per_s", 0), ("links.inter_host.in_background", "yes"),
        ("rates", {}), ("rates", []), ("rates.bf16.linear_tflops", 0), ("surprise", 1),
        ("rates.int8", {"linear_tflops": 1.0, "attention_tflops": 1.0}),
        ("sources.layer_us", None), ("sources.nothing", "x"), ("sources.layer_us", ""),
    ],
)  # fmt: skip
def test_each_field_has_a_type_and_bounds(
    plain: dict[str, Any], path: str, value: Any, tmp_path: Path
) -> None:
    message = refused(plain, path, value, tmp_path / "d.json")
    assert path.rpartition(".")[2] in message


def test_no_number_is_infinite(plain: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    file.write_text(json.dumps(plain).replace("20.0", "Infinity"))
    with pytest.raises(ConfigError, match="Infinity is not a JSON number"):
        read_device(str(file))


@pytest.mark.parametrize(
    ("which", "part"),
    [
        ("h10", "did you mean h100?"), ("", "is no file"), ("none.json", "is no file"),
        ("a\0b", "is no file"), ("x" * 5000, "is no file"), ("/", "is not a file"),
    ],
)  # fmt: skip
def test_names_that_are_none(which: str, part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(part)) as caught:
        read_device(which)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_dtype_without_rates_is_named(plain: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    file.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="has no rates for fp32, but for bf16"):
        read_device(str(file)).rates_of("fp32")


@pytest.mark.parametrize("file", ["", "no/such/dir/x.json", "/", "a\0b"])
def test_files_that_cannot_be_written(file: str, plain: dict[str, Any]) -> None:
    if file == "":
        file = "."
    with pytest.raises(OutputError, match="--out"):
        check_writable(file)
