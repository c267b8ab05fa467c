"""What a GGUF file's header says, and whether all of it reached the model. No torch here.

transformers maps the tensors of a GGUF file by name and drops those that it has no name for, so the
header is read here as well.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ds_cp.errors import ModelError

PART = re.compile(r".+-(\d{5})-of-(\d{5})")  # llama.cpp's name of one part of a split file
ALIGNMENT = 32  # bytes; tensors begin at multiples of it unless the header says another
STRING, ARRAY = 8, 9  # types of metadata values
WIDTH = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the others
F32 = 0  # type of a tensor of fp32
# Tensors of factors on rotary frequencies.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class GgufTensor:
    """``kind``: ggml's number of the tensor's type; ``start``: byte of the file where it begins."""

    elements: int
    kind: int
    start: int


def read_gguf(path: Path) -> dict[str, GgufTensor]:
    """The tensors of a GGUF file by name; reads no weights.

    Raises ``ModelError`` when the file is one part of several, damaged or truncated.
    """
    if part := PART.fullmatch(path.stem):
        raise ModelError(
            f"model {path} is part {int(part[1])} of {int(part[2])} of a split GGUF file: "
            "merge them with llama.cpp's llama-gguf-split, or serve the safetensors"
        )
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            tensors = _Reader(data).tensors()
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as err:
            raise ModelError(f"model {path} has a damaged GGUF header: fetch it again") from err
        size = len(data)
    for name, tensor in tensors.items():
        end = tensor.start + _bytes_of(tensor)
        if end > size:
            raise ModelError(
                f"model {path} is truncated: {name} ends at byte {end} of {size}; fetch it again"
            )
    return tensors


def check_gguf_consumed(path: Path, tensors: Mapping[str, GgufTensor], read: int) -> None:
    """Refuse a file when transformers left out a part of it.

    ``read``: elements of the loaded model, each tied weight once. Raises ``ModelError``.
    """
    for name in ROPE_FACTORS:
        if name in tensors and not _all_ones(path, tensors[name]):
            raise ModelError(
                f"model {path} scales its rotary frequencies by {name}, "
                "which this transformers does not read from GGUF: serve the model's safetensors"
            )
    stored = sum(t.elements for name, t in tensors.items() if name not in ROPE_FACTORS)
    if stored > read:
        raise ModelError(
            f"model {path} stores {stored} weights, of which transformers reads {read}: "
            "it has tensors that this transformers does not know; serve the model's safetensors"
        )


def _bytes_of(tensor: GgufTensor) -> int:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as err:
        raise ModelError(
            "a GGUF file needs the packages gguf and accelerate: pip install 'ds_cp[gguf]', "
            "or serve the model's safetensors"
        ) from err
    try:
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    except (ValueError, KeyError):
        return 0  # transformers refuses a type that it does not know
    return tensor.elements // block * width


def _all_ones(path: Path, tensor: GgufTensor) -> bool:
    if tensor.kind != F32:
        return False
    with path.open("rb") as file:
        file.seek(tensor.start)
        raw = file.read(4 * tensor.elements)
    return all(value == 1.0 for (value,) in struct.iter_unpack("<f", raw))


class _Reader:
    """Walks the header. A length that leads beyond the file's end is a ``struct.error``."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 4  # after the magic

    def tensors(self) -> dict[str, GgufTensor]:
        _, count, pairs = self._take("<IQQ")
        alignment = ALIGNMENT
        for _ in range(pairs):
            key = self._string()
            (kind,) = self._take("<I")
            if key == "general.alignment" and kind == 4:
                (alignment,) = self._take("<I")
            else:
                self._skip(kind)
        found: dict[str, tuple[int, int, int]] = {}
        for _ in range(count):
            name = self._string()
            (dims,) = self._take("<I")
            shape = self._take(f"<{dims}Q")
            kind, at = self._take("<IQ")
            found[name] = math.prod(shape), kind, at
        begin = -(-self._at // max(alignment, 1)) * max(alignment, 1)
        return {name: GgufTensor(n, kind, begin + at) for name, (n, kind, at) in found.items()}

    def _take(self, form: str) -> tuple[int, ...]:
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values

    def _string(self) -> str:
        (length,) = self._take("<Q")
        self._check(length)
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8")

    def _skip(self, kind: int) -> None:
        if kind == STRING:
            (length,) = self._take("<Q")
            self._check(length)
            self._at += length
        elif kind == ARRAY:
            element, count = self._take("<IQ")
            if element in WIDTH:
                self._check(WIDTH[element] * count)
                self._at += WIDTH[element] * count
            elif element == STRING:
                for _ in range(count):
                    self._skip(STRING)
            else:
                raise struct.error("an array of arrays")
        else:
            self._check(WIDTH[kind])
            self._at += WIDTH[kind]

    def _check(self, length: int) -> None:
        if length > len(self._data) - self._at:
            raise struct.error("beyond the file's end")
