"""Where a model comes from, checked without torch, so that a bad path fails at once.

A directory of safetensors, a GGUF file, or a hub id. Never a pickle, never remote code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ds_cp.errors import ModelError
from ds_cp.model.checkpoint import read_checkpoint

# OWNER/NAME, or NAME alone.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """``where``: the directory, the file, or the hub id."""

    kind: Literal["directory", "gguf", "hub"]
    where: str

    @property
    def name(self) -> str:
        """A short name to show: the last part of the path, or the hub id."""
        if self.kind == "hub":
            return self.where
        path = Path(self.where)
        return path.stem if self.kind == "gguf" else path.resolve().name


def find_model(model: str) -> ModelSource:
    """Resolve the config's ``model``: a directory, a GGUF file or a hub id.

    Raises ``ModelError``, which says what is missing or damaged and what would do. A hub id is not
    looked up here.
    """
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            read_checkpoint(path)
            return ModelSource("directory", str(path))
        if path.is_file():
            _check_gguf(path)
            return ModelSource("gguf", str(path))
    except OSError as err:  # not this user's to read, or a file system that fails
        raise ModelError(
            f"model {path} cannot be read: {err.strerror or err} ({err.filename or path})"
        ) from err
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


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"model {path} is not a GGUF file: give one, a directory of safetensors or a hub id"
        )
