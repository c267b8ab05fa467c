"""Native code: plain C++ with a C ABI, built by whatever compiler is at hand, called by ctypes.

``src`` holds the sources, ``build`` compiles them (at install, or ``python -m ds_cp.native``),
``library`` loads the result. Without a compiler, or on a processor that none of the variants suits,
there is a reason instead of a library, and torch's operators do the work.
"""

from __future__ import annotations

from ds_cp.native.library import Library, load

__all__ = ["Library", "load"]
