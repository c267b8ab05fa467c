"""What is known against the locked packages, and what bandit says of the code (`make audit`).

pip-audit asks PyPI's JSON pages, which some mirrors do not have: a package that could not be asked
about counts as not audited, never as clean. Exit code 0: nothing found, everything looked at; 1:
something was found; 3: nothing was found, and not everything could be looked at.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LOCKS = ("build.txt", "packages.txt", "torch.txt", "model.txt")
CODE = ("ds_cp", "launch", "locks")
# Rules of bandit that say nothing here, each with the reason.
NOT_ASKED = {
    "B101": "assert is for our own bugs; what a user can cause raises a typed error",
    "B105": "words such as next_token and pass_set are no passwords",
    "B311": "random numbers of benchmarks and measurements guard nothing",
    "B404": "starting processes is what a launcher does",
    "B603": "programs are started from lists, without a shell, and no client chooses one",
}
# Findings that were looked at: rule and file, with the reason why it is as it should be.
ARGUED = {
    ("B104", "ds_cp/topology/net.py"): "a table that turns the wildcard into loopback",
    ("B108", "ds_cp/cli/doctor.py"): "looks at the size of /dev/shm, writes nothing",
    ("B615", "ds_cp/model/hub.py"): "the user names a model; only safetensors and JSON of it are "
    "read, and nothing is run",
    ("B615", "ds_cp/model/loading.py"): "a folder of our own with checked files, not a hub's name",
}


def read_packages(reports: Iterable[dict[str, Any]]) -> tuple[list[str], list[str], int]:
    """Of pip-audit's reports: a line for each vulnerability, the names that could not be audited,
    and the number of packages."""
    found, skipped, count = [], [], 0
    for report in reports:
        for package in report["dependencies"]:
            count += 1
            if "skip_reason" in package:
                skipped.append(package["name"])
            for flaw in package.get("vulns", ()):
                fixed = ", ".join(flaw["fix_versions"]) or "no version yet"
                name = f"{package['name']} {package['version']}"
                known = " ".join([flaw["id"], *flaw.get("aliases", ())])
                found.append(f"{name}: {known}; fixed in {fixed}")
    return found, skipped, count


def read_code(report: dict[str, Any]) -> list[str]:
    """Of bandit's report: a line for each finding that nobody has argued."""
    return [
        f"{one['filename']}:{one['line_number']}: {one['test_id']} {one['issue_text']}"
        for one in report["results"]
        if (one["test_id"], one["filename"].removeprefix("./")) not in ARGUED
    ]


def ask(*words: str) -> dict[str, Any]:
    """The JSON that a tool prints."""
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise SystemExit(f"{words[0]} failed: {said[-1][:300]}") from None
    return found


def main() -> int:
    """Print what was found; the exit code."""
    flags = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    reports = [ask("pip_audit", *flags, "-r", str(HERE / name)) for name in LOCKS]
    found, skipped, count = read_packages(reports)
    doubtful = read_code(ask("bandit", "-q", "-r", *CODE, "-f", "json", "-s", ",".join(NOT_ASKED)))
    for line in (*found, *doubtful):
        print(line)
    print(f"{count} packages: {len(found)} known vulnerabilities, {len(skipped)} not audited")
    print(f"{len(doubtful)} findings in the code")
    if skipped:
        print(f"the index answers no questions about {skipped[0]} and {len(skipped) - 1} others")
    return 1 if found or doubtful else 3 if skipped else 0


if __name__ == "__main__":
    raise SystemExit(main())
