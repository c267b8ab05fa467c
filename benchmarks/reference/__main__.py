"""Write the pages; ``--check`` only says whether they are what the code gives (exit code 1 if
not)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.reference.configuration import configuration_page
from benchmarks.reference.http import http_page
from benchmarks.reference.metrics import metrics_page

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration_page,
    "http.md": http_page,
    "metrics.md": metrics_page,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference", description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    old = []
    for name, page in PAGES.items():
        file, text = DOCS / name, page()
        if not file.exists() or file.read_text("utf-8") != text:
            old.append(name)
            if not check:
                file.write_text(text, "utf-8")
    print(", ".join(old) + (" differ" if check else " written") if old else "all are current")
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
