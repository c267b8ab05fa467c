"""Whether the kernel has ended a process of this control group for want of memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")


class OomKills:
    """Reads how many processes of this process's control group, and so of its children's, were
    ended for memory. Nothing is known where the kernel does not say, as on other systems."""

    def __init__(self, groups: Path = GROUPS, mount: Path = MOUNT) -> None:
        self._file = _file(groups, mount)
        self._seen = self._count()

    def is_new(self) -> bool:
        """Whether there was one since the last call, or since the start."""
        before, self._seen = self._seen, self._count()
        return self._seen > before

    def _count(self) -> int:
        if self._file is not None:
            with contextlib.suppress(OSError, ValueError):
                for line in self._file.read_text("ascii").splitlines():
                    name, _, count = line.partition(" ")
                    if name == "oom_kill":
                        return int(count)
        return 0


def _file(groups: Path, mount: Path) -> Path | None:
    """Where the kernel counts, by version 2 of control groups or by version 1."""
    with contextlib.suppress(OSError, ValueError):
        for line in groups.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            root, name = mount, "memory.events"
            if kinds:
                root, name = mount / "memory", "memory.oom_control"
            if kinds and "memory" not in kinds.split(","):
                continue
            parts = [part for part in path.split("/") if part]
            # A container sees a group of the host as the root, so the path begins anywhere.
            for begin in range(len(parts) + 1):
                file = root.joinpath(*parts[begin:]) / name
                if file.is_file():
                    return file
    return None
