"""Which files of a model directory are the model, and what their headers say. No torch here.

A directory may hold several answers: shards with their index, a whole file, an adapter, optimizer
state, pickles. One rule decides: the index when there is one, else ``model.safetensors``. The files
beside it are not read, which a note says.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_cp.errors import ModelError
from ds_cp.text import parse_json, shorten

# File names of a model, and suffixes of files with weights.
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON = 64 * 2**20  # bytes of config.json and the like
MAX_HEADER = 100 * 2**20  # bytes of a header; safetensors itself accepts no more
PICKLES = frozenset({".bin", ".pt", ".pth"})
OTHER_WEIGHTS = PICKLES | {".safetensors", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx"}
SHARD = re.compile(r".+-\d+-of-\d+\.safetensors")
NAMED = 3  # how many names a message lists before it counts the rest


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header states it. ``dtype``: safetensors' name, as "F32"."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The model of a directory.

    ``config``: config.json. ``index``: the name of the index, or ``None`` for a whole file.
    ``files``: names of the safetensors files. ``tensors``: what is stored, by name, in the order of
    the files. ``absent``: names that the index lists and no file holds; converters leave out one of
    two tied weights and keep its entry. ``notes``: one line on what lies beside it unread, or none.
    """

    folder: Path
    config: Mapping[str, Any]
    index: str | None
    files: tuple[str, ...]
    tensors: Mapping[str, StoredTensor]
    absent: tuple[str, ...]
    notes: tuple[str, ...]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Decide which files of ``folder`` are the model and check their headers; reads no weights.

    Raises ``ModelError`` when a file is missing, truncated or damaged, when a shard holds what the
    index does not put there, and when the directory holds no safetensors model.
    """
    config = read_config(folder)
    index, whole = _file_names(folder, config)
    if index is not None:
        listed = read_index(folder / index)
        files = tuple(sorted(set(listed.values())))
    elif (folder / whole).is_file():
        listed, files = {}, (whole,)
    else:
        raise ModelError(f"model {folder} {_what_there_is(folder)}")
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise ModelError(_missing_shard(folder, name, index))
        for tensor, stored in _read_header(folder / name).items():
            if index is not None and listed.get(tensor) != name:
                where = listed.get(tensor, "no file")
                raise ModelError(
                    f"model {folder}: {name} holds {shorten(tensor)}, "
                    f"which {index} puts in {where}: "
                    "these shards and this index are not of one model; fetch it again"
                )
            tensors[tensor] = stored
    absent = tuple(tensor for tensor in listed if tensor not in tensors)
    return Checkpoint(folder, config, index, files, tensors, absent, _beside(folder, files, index))


def some(names: Iterable[str]) -> str:
    """The first names and how many more there are: "a, b, c and 4 more"."""
    listed = [shorten(name) for name in names]
    more = len(listed) - NAMED
    return ", ".join(listed[:NAMED]) + (f" and {more} more" if more > 0 else "")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is. ``ModelError`` when there is none or it cannot be read."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {folder} has no config.json: {_without_config(folder)}")
    return read_object(folder, "config.json")


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the model; ``ModelError`` when it is not one."""
    path = folder / name
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            raise ValueError(f"it has {size} bytes, more than {MAX_JSON}")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except (ValueError, OSError, RecursionError) as err:
        raise ModelError(f"model {folder}: {name} cannot be read: {err}") from err
    return found


def _without_config(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter; merge it into its base model and serve the result"
    if ggufs := sorted(p.name for p in folder.glob("*.gguf")):
        return f"it holds GGUF files ({some(ggufs)}); give the path of one"
    return "it is not a Hugging Face model directory"


def _file_names(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """The name of the index, if there is one, and of the whole file, if there is none."""
    named = config.get("transformers_weights")
    if named is None:
        return (INDEX if (folder / INDEX).is_file() else None), WHOLE
    if not isinstance(named, str) or Path(named).name != named:
        raise ModelError(
            f"model {folder}: config.json's transformers_weights is {shorten(repr(named))}, "
            "which is no file of this directory"
        )
    if not named.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(
            f"model {folder}: config.json's transformers_weights is {shorten(repr(named))}, "
            "which is not a safetensors file: convert it to safetensors"
        )
    return (named, WHOLE) if named.endswith(".json") else (None, named)


def read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, by the tensor's name. ``ModelError`` when it names anything but
    safetensors files of its own directory."""
    try:
        listed = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        for name in listed.values():
            if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
                raise ValueError(f"it names {name!r}, which is no file of this directory")
            if not name.endswith(".safetensors"):
                raise ValueError(f"it names {name!r}, which is not a safetensors file")
        if not listed:
            raise ValueError("it lists no tensor")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as err:
        raise ModelError(f"model {index.parent}: {index.name} cannot be read: {err!r}") from err
    return dict(listed)


def _missing_shard(folder: Path, name: str, index: str | None) -> str:
    listed = f" (listed by {index})" if index else ""
    text = f"model file {folder / name} is missing{listed}: fetch the model again"
    if index and (folder / WHOLE).is_file():
        text += f", or remove {index} if {WHOLE} is the model"
    return text


def _what_there_is(folder: Path) -> str:
    """Why a directory with a config.json and neither index nor whole file is no model."""
    stored = sorted(p.name for p in folder.glob("*.safetensors"))
    if shards := [name for name in stored if SHARD.fullmatch(name)]:
        return (
            f"has shards ({some(shards)}) but no {INDEX}, which says what belongs to the model: "
            "fetch the model again"
        )
    if stored and (folder / "adapter_config.json").is_file():
        return f"is an adapter ({stored[0]}); merge it into its base model and serve the result"
    if stored:
        return f"has no {WHOLE}, only {some(stored)}: rename the file that is the model"
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        return (
            f"has only pickle weights ({pickles[0]}), which can run code when loaded: "
            "convert them to safetensors"
        )
    return "has no *.safetensors file"


def _beside(folder: Path, files: tuple[str, ...], index: str | None) -> tuple[str, ...]:
    others = sorted(
        p.name
        for p in folder.iterdir()
        if p.suffix in OTHER_WEIGHTS and p.name not in files and p.is_file()
    )
    if not others:
        return ()
    model = f"the {len(files)} files that {index} lists" if index else files[0]
    return (f"the weights are {model}; other files beside them are not read: {some(others)}",)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds. A download that broke off is named here: the header's own
    sizes are checked against the file's."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ModelError(
                f"model file {path} is not safetensors, or is truncated ({size} bytes)"
            )
        try:
            header = parse_json(file.read(length).decode("utf-8"))
            header.pop("__metadata__", None)
            ends = [int(entry["data_offsets"][1]) for entry in header.values()]
            found = {
                name: StoredTensor(path.name, str(entry["dtype"]), tuple(map(int, entry["shape"])))
                for name, entry in header.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError) as err:
            raise ModelError(f"model file {path} has a damaged header: fetch it again") from err
    want = 8 + length + max(ends, default=0)
    if size < want:
        raise ModelError(f"model file {path} is truncated: {size} bytes of {want}; fetch it again")
    return found
