"""guidellm's sweep against the server: one request at a time, as many as it takes, and between.

guidellm has an environment of its own under .cache/environments; its tokenizer is the folder of the
served model, so that nothing asks a hub. Every request of every step must succeed.

    python -m benchmarks.sweep --ranks 4
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, RESULTS, command, commit, finish, machine, parser
from benchmarks.environments import environment
from benchmarks.server import serving

PACKAGES = ("guidellm==0.8.1",)
SERVED = "smollm2-135m-instruct"
PROMPT, ANSWER = 64, 16  # tokens of each request
MORE_S = 180.0  # seconds beside the steps themselves: guidellm's start, its last requests


def main(argv: Sequence[str]) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--ranks", type=int, default=4)
    arguments.add_argument("--steps", type=int, default=5, help="steps of the sweep, 2 or more")
    arguments.add_argument("--seconds", type=int, default=8, help="of each step")
    arguments.add_argument("--most", type=int, default=16, help="requests at once")
    arguments.add_argument("--out", type=Path, default=RESULTS / "sweep.json")
    args = arguments.parse_args(argv)
    facts = machine() | {"commit": commit(), "command": command("sweep", argv)}
    python = environment("guidellm", PACKAGES, install_s=1800)
    with serving(args.ranks) as (url, job):
        report = sweep(python, url, args)
        alive = job.process.poll() is None
    steps = [told(step) for step in report["benchmarks"]]
    good = alive and len(steps) == args.steps
    good = good and all(step["requests"] and not step["errored"] for step in steps)
    about = {"ranks": args.ranks, "model": SERVED, "guidellm": version(python)}
    about |= {"prompt_tokens": PROMPT, "output_tokens": ANSWER, "completed": good}
    finish(facts | about | {"steps": steps}, args.out)
    return 0 if good else 1


def sweep(python: Path, url: str, args: Any) -> dict[str, Any]:
    """guidellm's report."""
    with tempfile.TemporaryDirectory() as home:
        out = Path(home) / "report.json"
        keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        backend = {"kind": "openai_http", "target": url, "model": SERVED, "http2": False}
        data = {"kind": "synthetic_text", "prompt_tokens": PROMPT, "output_tokens": ANSWER}
        tokenizer = {"kind": "huggingface_auto", "model": str(Path(MODEL).absolute())}
        profile = {"kind": "sweep", "sweep_size": args.steps, "max_concurrency": args.most}
        subprocess.run(
            [
                *[str(python), "-m", "guidellm", "run", "--disable-console"],
                *["--backend", json.dumps(backend), "--profile", json.dumps(profile)],
                *["--constraint", json.dumps({"kind": "max_duration", "seconds": args.seconds})],
                *["--tokenizer", json.dumps(tokenizer), "--data", json.dumps(data)],
                *["--output", json.dumps({"kind": "json", "path": str(out)})],
            ],
            env=keep | {"HOME": home, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
            cwd=home,
            check=True,
            timeout=args.steps * args.seconds + MORE_S,
        )
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def told(step: Mapping[str, Any]) -> dict[str, Any]:
    """One step of the report in a few numbers."""
    metrics = step["metrics"]
    totals = metrics["request_totals"]

    def median(name: str) -> float:
        return round(float(metrics[name]["successful"]["median"]), 3)

    return {
        "strategy": step["config"]["strategy"]["type_"],
        "requests": totals["successful"],
        "incomplete": totals["incomplete"],
        "errored": totals["errored"],
        "requests_per_second": round(metrics["requests_per_second"]["successful"]["mean"], 3),
        "ttft_ms": median("time_to_first_token_ms"),
        "inter_token_latency_ms": median("inter_token_latency_ms"),
    }


def version(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('guidellm'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
