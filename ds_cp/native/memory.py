"""Memory in huge pages: what is streamed in every step is read up to twice as fast from it."""

from __future__ import annotations

import mmap


def huge_pages(size: int) -> mmap.mmap:
    """``size`` bytes of zeros, private to this process, in huge pages where the system has them and
    in ordinary ones otherwise; taken from the system as they are first written. Raises ``OSError``
    when there is no such room."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            pass
    return memory
