"""Where a model comes from, checked without torch, so that a bad path fails at once.

A directory of safetensors, a GGUF file, or a hub id. Never a pickle, never remote code.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from ds_cp.errors import ModelError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
MAX_HEADER = 100 * 2**20  # what safetensors itself accepts


@dataclass(frozen=True)
class ModelSource:
    """``kind``: "directory", "gguf" or "hub"; ``where``: the directory, the file, or the hub id."""

    kind: str
    where: str

    @property
    def name(self) -> str:
        """A short name to show: the last part of the path, or the hub id."""
        if self.kind == "hub":
            return self.where
        path = Path(self.where)
        return path.stem if self.kind == "gguf" else path.resolve().name


def find_model(model: str) -> ModelSource:
    """Resolve the config's ``model``; ``ModelError`` says what is missing and what would do."""
    path = Path(model).expanduser()
    if path.is_dir():
        _check_directory(path)
        return ModelSource("directory", str(path))
    if path.is_file():
        _check_gguf(path)
        return ModelSource("gguf", str(path))
    looks_like_path = (
        path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
        or path.suffix in {".gguf", ".safetensors", ".bin", ".pt"}
    )  # fmt: skip
    if looks_like_path or not HUB_ID.fullmatch(model):
        raise ModelError(
            f"model {model!r} does not exist: give a directory with config.json and *.safetensors, "
            "a .gguf file, or a hub id like owner/name"
        )
    return ModelSource("hub", model)


def _check_directory(path: Path) -> None:
    config = path / "config.json"
    if not config.is_file():
        raise ModelError(
            f"model {path} has no config.json: it is not a Hugging Face model directory"
        )
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except (ValueError, OSError) as err:
        raise ModelError(f"model {path}: config.json cannot be read: {err}") from err
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            if odd := [n for n in listed if not isinstance(n, str) or Path(n).name != n]:
                raise ValueError(f"it names {odd[0]!r}, which is no file of this directory")
            files = sorted(set(listed))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as err:
            raise ModelError(f"model {path}: {index.name} cannot be read: {err!r}") from err
    else:
        files = sorted(p.name for p in path.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
        if pickles:
            raise ModelError(
                f"model {path} has only pickle weights ({pickles[0]}), which can run code when "
                "loaded: "
                "convert them to safetensors"
            )
        raise ModelError(f"model {path} has no *.safetensors file")
    for name in files:
        _check_safetensors(path / name)


def _check_safetensors(path: Path) -> None:
    """The header's own sizes against the file's: a download that broke off is named here."""
    if not path.is_file():
        raise ModelError(f"model file {path} is missing: fetch the model again")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ModelError(
                f"model file {path} is not safetensors, or is truncated ({size} bytes)"
            )
        try:
            header = json.loads(file.read(length))
            ends = [int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError) as err:
            raise ModelError(f"model file {path} has a damaged header: fetch it again") from err
    want = 8 + length + max(ends, default=0)
    if size < want:
        raise ModelError(f"model file {path} is truncated: {size} bytes of {want}; fetch it again")


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"model {path} is not a GGUF file; a directory of safetensors or a hub id would do "
            "as well"
        )
