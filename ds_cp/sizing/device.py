"""Device files: what one rank achieves, its memory and its links, as small strict JSON.

``ds-cp bench comm --out FILE`` measures one; a few are shipped in ``devices/``. Every number names
its source, so that a prediction can say what it stands on.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from ds_cp.config.fields import Section
from ds_cp.errors import ConfigError, ModelError, OutputError
from ds_cp.sizing.config_json import read_json_object
from ds_cp.text import closest

FOLDER = Path(__file__).parent / "devices"
MAX_BYTES = 64 << 10  # of a device file
_Rate = Annotated[float, Field(gt=0, le=1e6)]
_Text = Annotated[str, Field(min_length=1, max_length=400)]


class Rates(Section):
    """What a rank achieves in one dtype, in 1e12 operations a second."""

    linear_tflops: _Rate = Field(description="of linear layers over many tokens")
    attention_tflops: _Rate = Field(description="of causal attention, visible pairs counted")


class Memory(Section):
    """One rank's memory."""

    gib: Annotated[float, Field(gt=0, le=1 << 20)] = Field(description="of a rank, in GiB")
    reserved_gib: Annotated[float, Field(ge=0, le=1 << 20)] = Field(
        description="taken before a model is loaded, in GiB"
    )
    kv_share: Annotated[float, Field(gt=0, le=1)] = Field(
        description="share of what weights leave free that the server takes for KV"
    )
    gb_per_s: _Rate = Field(description="at which weights are read, in 1e9 bytes/s")
    kv_gb_per_s: _Rate | None = Field(
        None,
        description="at which attention of one row reads KV, in 1e9 bytes/s; default: gb_per_s",
    )
    host_gb_per_s: _Rate | None = Field(
        None,
        description="at which KV goes to host memory and comes back, each rank at once, in 1e9 "
        "bytes/s; default: not known",
    )


class Link(Section):
    """One class of link, for each rank while all of them send."""

    gb_per_s: _Rate = Field(description="in 1e9 bytes/s")
    latency_us: Annotated[float, Field(ge=0, le=1e7)] = Field(
        description="of an exchange of a few KiB, in microseconds"
    )
    in_background: bool = Field(True, description="whether bytes move while a rank computes")


class Links(Section):
    """Inside a host, and between hosts."""

    intra_host: Link
    inter_host: Link


class Device(Section):
    """A kind of rank. ``sources``: for every number, by its path, where it is from."""

    name: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[\w .,:()/+-]+$")]
    description: _Text
    rates: Annotated[dict[str, Rates], Field(min_length=1, max_length=3)] = Field(
        description="by dtype: bf16, fp16, fp32"
    )
    memory: Memory
    layer_us: Annotated[float, Field(ge=0, le=1e6)] = Field(
        description="microseconds that a layer of a forward call takes beside its work: launches"
    )
    step_us: Annotated[float, Field(ge=0, le=1e7)] = Field(
        0.0, description="the same of a forward call"
    )
    hop_us: Annotated[float, Field(ge=0, le=1e6)] = Field(
        0.0, description="the same of one hop of a ring in one layer"
    )
    links: Links
    sources: Annotated[dict[str, _Text], Field(max_length=64)]

    def rates_of(self, dtype: str) -> Rates:
        """The rates in one dtype. ``ConfigError`` names those that there are."""
        if dtype not in self.rates:
            raise ConfigError(
                f"device {self.name} has no rates for {dtype}, but for "
                f"{', '.join(sorted(self.rates))}: give --dtype, or a device file that has them"
            )
        return self.rates[dtype]


def device_names() -> list[str]:
    """Names of the devices that are shipped."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def read_device(which: str) -> Device:
    """A shipped device by its name, or a file. ``ConfigError`` says which field is wrong."""
    names = device_names()
    if which in names:
        return load_device(FOLDER / f"{which}.json")
    path = Path(which).expanduser()
    try:
        there = bool(which) and path.exists()
    except (OSError, ValueError):
        there = False
    if not there:
        near = closest(which, names)
        hint = f"did you mean {near}? " if near else ""
        raise ConfigError(
            f"--device {which[:200]!r} is no file and not one of {', '.join(names)}; {hint}"
            "ds-cp bench comm --out FILE measures one"
        )
    return load_device(path)


def load_device(path: Path) -> Device:
    """The device of a file; raises as ``read_device``."""
    try:
        found = read_json_object(path, MAX_BYTES, "one that ds-cp bench comm wrote")
    except ModelError as err:
        raise ConfigError(f"device file {err}") from None
    try:
        device = Device.model_validate(found)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        value = "" if isinstance(first["input"], dict) else f" is {str(first['input'])[:40]}:"
        said = " ".join(f"{where[:100]}{value} {first['msg']}".split())
        raise ConfigError(f"device file {path}: {said}") from None
    if unknown := sorted(set(device.rates) - {"bf16", "fp16", "fp32"}):
        raise ConfigError(
            f"device file {path}: rates of {unknown[0][:40]}; give bf16, fp16 or fp32"
        )
    numbers = _numbers(device)
    if missing := sorted(numbers - set(device.sources)):
        raise ConfigError(f"device file {path}: sources does not say where {missing[0]} is from")
    if spare := sorted(set(device.sources) - numbers):
        raise ConfigError(f"device file {path}: sources names {spare[0][:100]}, which is no number")
    return device


def _numbers(section: BaseModel, path: str = "") -> set[str]:
    """Paths of all numbers that a device file gives."""
    found: set[str] = set()
    for key in section.model_fields_set:
        value = getattr(section, key)
        here = f"{path}{key}"
        if isinstance(value, BaseModel):
            found |= _numbers(value, here + ".")
        elif key == "rates":
            for dtype, rates in value.items():
                found |= _numbers(rates, f"{here}.{dtype}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.add(here)
    return found


def check_writable(file: str) -> None:
    """Refuse, before anything is measured, a file that could not be written: ``OutputError``."""
    path = Path(file).expanduser()
    try:
        if (
            "\0" in file
            or path.is_dir()
            or not path.parent.is_dir()
            or not os.access(path.parent, os.W_OK)
        ):
            raise OutputError(f"--out {file[:200]!r} cannot be written: give a file in a directory")
    except (OSError, ValueError):
        raise OutputError(f"--out {file[:200]!r} is not a path; give a file") from None


def write_device(found: dict[str, Any], file: str) -> None:
    """Write a device file, whole or not at all. ``OutputError`` when it cannot be written."""
    path = Path(file).expanduser()
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
        ) as out:
            temporary = out.name
            out.write(json.dumps(found, indent=1) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as err:
        with suppress(OSError):
            os.unlink(temporary)
        raise OutputError(f"cannot write {file[:200]}: {err.strerror or err}") from None
