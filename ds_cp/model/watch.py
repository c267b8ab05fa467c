"""Files of a model that change while it is served are noticed and said. No torch here.

A file that is replaced leaves the old one in use, since ranks map it; one that is written in place
changes what is served under the requests, and one that is cut short ends the worker by SIGBUS.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ds_cp.errors import ModelError
from ds_cp.model.checkpoint import read_checkpoint, some
from ds_cp.model.private_folder import CONFIG, GENERATION, tokenizer_files
from ds_cp.model.source import ModelSource

WEIGHTS = (".safetensors", ".gguf")  # these are mapped, all others were read at the start
LOOK_S = 10.0  # seconds between two looks; a look is one stat call for each file


@dataclass(frozen=True)
class FileState:
    """Of a file, links followed: ``node`` is its device and inode, ``size`` in bytes."""

    node: tuple[int, int]
    size: int
    mtime_ns: int


States = Mapping[Path, FileState | None]  # None: there is no such file


def model_files(source: ModelSource) -> tuple[Path, ...]:
    """The files of ``source`` that are read, whether they are there or not. None of a hub id, whose
    snapshot never changes. Raises ``ModelError`` as ``find_model`` does."""
    if source.kind == "gguf":
        return (Path(source.where),)
    if source.kind == "hub":
        return ()
    folder = Path(source.where)
    found = read_checkpoint(folder)
    weights = (*((found.index,) if found.index else ()), *found.files)
    named = tuple(folder / name for name in (CONFIG, GENERATION, *weights))
    return named + tuple(tokenizer_files(folder))


def look_at(files: tuple[Path, ...]) -> States:
    """The state of each file now."""
    return {file: _state(file) for file in files}


def describe_change(before: States, now: States) -> str | None:
    """Which files changed and how, in one phrase; ``None`` when none did."""
    changed = [file for file, state in before.items() if now.get(file) != state]
    if not changed:
        return None
    return some(f"{file.name} ({_how(before[file], now.get(file))})" for file in changed)


class FilesWatch:
    """Looks at a model's files from time to time, and says once when they are no longer those of
    the start. ``say`` gets one line."""

    def __init__(self, source: ModelSource, say: Callable[[str], None]) -> None:
        self._where = source.where
        self._say = say
        self._before = look_at(model_files(source))

    def look(self) -> bool:
        """Look once; whether it was the look that found a change, and said it."""
        now = look_at(tuple(self._before))
        change = describe_change(self._before, now)
        if change is None:
            return False
        in_place = any(
            file.suffix in WEIGHTS and state is not None and (new := now[file]) is not None
            and new != state and new.node == state.node
            for file, state in self._before.items()
        )  # fmt: skip
        effect = (
            "answers may be wrong from now on; restart the server"
            if in_place
            else "what was loaded at the start is still served; restart the server to serve them"
        )
        self._say(f"files of model {self._where} changed while it is served: {change}: {effect}")
        return True

    def start(self, every_s: float = LOOK_S) -> None:
        """Look every ``every_s`` seconds until a change was said, in a thread of its own that ends
        with the process: a file system that hangs must not hold up the caller."""

        def run() -> None:
            pause = threading.Event()
            while not self.look():
                pause.wait(every_s)

        threading.Thread(target=run, name="ds_cp files", daemon=True).start()


def watch_model(source: ModelSource, say: Callable[[str], None]) -> FilesWatch | None:
    """A watch over the files as they are now; ``None`` of a hub id, which has none, and when they
    cannot be read, which the load says."""
    try:
        return FilesWatch(source, say) if model_files(source) else None
    except (ModelError, OSError):
        return None


def _state(file: Path) -> FileState | None:
    try:
        found = file.stat()
    except (OSError, ValueError):
        return None
    return FileState((found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns)


def _how(before: FileState | None, now: FileState | None) -> str:
    if now is None:
        return "removed"
    if before is None:
        return "new"
    how = "replaced" if now.node != before.node else "written in place"
    return how if now.size == before.size else f"{how}, {before.size} -> {now.size} bytes"
