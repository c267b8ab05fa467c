"""Build the native library by hand: ``python -m ds_cp.native``; ``CXX`` names the compiler."""

from __future__ import annotations

import os
import sys
import time

from ds_cp.native.build import BuildError, build
from ds_cp.native.library import Library, load


def main() -> int:
    """Build, load, say what happened; the exit code: 0 when there is a library that runs here."""
    begin = time.monotonic()
    try:
        built = build(compiler=os.environ.get("CXX") or None)
    except BuildError as err:
        print(f"not built: {err}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - begin
    print(f"built {built.path} with {built.compiler} in {seconds:.1f} s: {', '.join(built.isas)}")
    if built.left_out:
        print(f"left out, since the compiler does not know them: {', '.join(built.left_out)}")
    found = load()
    if not isinstance(found, Library):
        print(f"but {found}", file=sys.stderr)
        return 1
    print(f"this processor takes {found.isas[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
