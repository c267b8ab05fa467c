"""Load the native library: a ``Library``, or the reason why there is none."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ds_cp.native.build import HERE, LIBRARY, SOURCES, stamp

REMEDY = "run `python -m ds_cp.native`"


@dataclass(frozen=True, eq=False)
class Library:
    """The loaded library. ``isas``: the variants in it that this processor can take, the best
    first."""

    path: Path
    isas: tuple[str, ...]
    handle: ctypes.CDLL

    def function(self, name: str, argtypes: Sequence[Any], restype: Any = None) -> Any:
        """The C function ``name``; ctypes lets go of the GIL while it runs. Each call makes an
        object of its own, so the types of one user are not another's. Raises ``AttributeError``
        when there is none."""
        found = ctypes.CFUNCTYPE(restype, *argtypes)
        return found((name, self.handle))


@cache
def load(folder: Path = HERE, sources: Path = SOURCES) -> Library | str:
    """The library in ``folder``, if it was made from ``sources`` and runs here; else why not, as
    the end of a sentence."""
    path = folder / LIBRARY
    if not path.is_file():
        return f"the native library is not built; {REMEDY}"
    if reason := _broken(path):
        return f"the native library is broken ({reason}); {REMEDY}"
    try:
        handle = ctypes.CDLL(str(path))
        has = _text(handle, "ds_cp_stamp")
        isas = tuple(_text(handle, "ds_cp_isas").split())
        wanted = stamp(sources)
    except (OSError, AttributeError) as err:
        return f"the native library cannot be loaded ({err}); {REMEDY}"
    if has != wanted:
        return f"the native library was built from other sources; {REMEDY}"
    return Library(path, isas, handle)


def _text(handle: ctypes.CDLL, name: str) -> str:
    function = ctypes.CFUNCTYPE(ctypes.c_char_p)((name, handle))
    return (function() or b"").decode()


def _broken(path: Path) -> str:
    """Why the file is not a whole ELF file; "" when it is. The loader trusts a header, and a file
    that was cut short ends the process later, where nothing can be caught."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            size = path.stat().st_size
    except OSError as err:
        return str(err.strerror)
    if len(head) < 64 or head[:4] != b"\x7fELF":
        return "not a library"
    if head[4] == 2:  # 64 bits: the table of sections is the end of the file
        order = "<" if head[5] == 1 else ">"
        (table,) = struct.unpack_from(order + "Q", head, 40)
        each, count = struct.unpack_from(order + "HH", head, 58)
        if table + each * count > size:
            return "cut short"
    return ""
