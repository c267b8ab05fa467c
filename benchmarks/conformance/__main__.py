"""What is checked with software of others and takes longer than tests may, one after another.

Clients and tools in environments of their own, the page in a browser, generated requests, schemas,
a needle in a haystack. A part whose environment cannot be made is skipped and says why; the table
at the end has a line for each, and the exit code is 1 where one failed.

    python -m benchmarks.conformance --only clients fuzz
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import parser
from benchmarks.conformance.parts import parts
from benchmarks.conformance.run import exit_code, interruptible, run_all, table


def main(argv: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = parts(folder)
        names = [part.name for part in known]
        arguments = parser(__doc__)
        arguments.add_argument("--only", nargs="+", choices=names, default=names)
        arguments.add_argument("--skip", nargs="+", choices=names, default=[])
        arguments.add_argument("--limit-min", type=float, default=25, help="of all parts together")
        args = arguments.parse_args(argv)
        chosen = [part for part in known if part.name in args.only and part.name not in args.skip]
        if not chosen:
            arguments.error("no part is left")
        interruptible()
        found = run_all(chosen, 60 * args.limit_min, folder)
    print(table(found))
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
