"""Fetch what the browser tests need, then run them.

``python -m tests.browser [options of pytest]``
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.browser.tools import chromium, fetch, missing


def main(arguments: list[str]) -> int:
    """The exit code of pytest; 0 with a line that says why where there is no browser."""
    if chromium() is not None:
        fetch()
    if why := missing():
        print(f"the browser tests were not run: {why}", file=sys.stderr)
        return 0
    here = str(Path(__file__).parent)
    return subprocess.run([sys.executable, "-m", "pytest", "-q", here, *arguments]).returncode


sys.exit(main(sys.argv[1:]))
