"""lm_eval's scores by HTTP against those of its own ``hf`` backend on the same model.

Small tasks that lie beside this file: likelihoods of choices and of passages, answers in words, and
replies of a chat of several turns. lm_eval has an environment of its own under .cache/environments;
nothing asks a hub. The scores must agree to 1e-6, and every answer in words must be the same.

    python -m benchmarks.evaluation --ranks 4
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

PACKAGES = ("lm-eval[api]==0.4.13", "torch==2.13.0", "transformers==5.23.0", "accelerate")
SCRIPT = Path(__file__).with_name("score.py")
SERVED = "smollm2-135m-instruct"
SCORE_S = 900.0  # seconds for all scores, on a busy machine
CLOSE = 1e-6  # how near scores must be
PAIRS = (("local-completions", "hf"), ("local-chat-completions", "hf, chat"))


def main(argv: Sequence[str]) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--ranks", type=int, default=4)
    arguments.add_argument("--out", type=Path, default=RESULTS / "evaluation.json")
    args = arguments.parse_args(argv)
    facts = machine() | {"commit": commit(), "command": command("evaluation", argv)}
    python = environment("lm-eval", PACKAGES, install_s=1800)
    with serving(args.ranks, dtype="fp32", model=MODEL) as (url, _):
        found = score(python, url)
    rows = [
        row
        for served, own in PAIRS
        for row in compared(found["backends"][served], found["backends"][own], served)
    ]
    bad = [row for row in rows if not row["same"]]
    facts |= {"ranks": args.ranks, "model": SERVED, "versions": found["versions"]}
    finish(facts | {"bad": len(bad), "rows": rows}, args.out)
    return 1 if bad else 0


def score(python: Path, url: str) -> dict[str, Any]:
    """What the script prints."""
    with tempfile.TemporaryDirectory() as home:
        keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        offline = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
        done = subprocess.run(
            [str(python), str(SCRIPT), str(Path(MODEL).absolute()), SERVED, url],
            env=keep | offline | {"HOME": home, "OPENAI_API_KEY": "none"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=SCORE_S,
        )
    if done.returncode:
        raise RuntimeError(f"lm_eval ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(
    served: Mapping[str, Any], own: Mapping[str, Any], backend: str
) -> list[dict[str, Any]]:
    """A row for each task: both scores, and how far single answers are apart."""
    rows = []
    for task, mine in served.items():
        theirs = own[task]
        scores = {name: [value, theirs["metrics"][name]] for name, value in mine["metrics"].items()}
        pairs = list(zip(mine["samples"], theirs["samples"], strict=True))
        far = [apart(a["answers"], b["answers"]) for a, b in pairs]
        same = all(abs(a - b) <= CLOSE for a, b in scores.values()) and bool(scores)
        words = [value for value in far if value is None]
        rows.append(
            {
                "backend": backend,
                "task": task,
                "samples": len(pairs),
                "scores": scores,
                "same": same and not words,
                "different_answers": len(words),
                "first_answers": [a["answers"][0] for a, _ in pairs[:4]],
                "largest_difference": max((value for value in far if value), default=0.0),
            }
        )
    return rows


def apart(a: Any, b: Any) -> float | None:
    """The largest difference of numbers in two answers; None where anything else differs."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        inner = [apart(x, y) for x, y in zip(a, b, strict=True)]
        known = [value for value in inner if value is not None]
        return max(known, default=0.0) if len(known) == len(inner) else None
    if isinstance(a, bool) or isinstance(b, bool) or isinstance(a, str) or isinstance(b, str):
        return 0.0 if str(a) == str(b) else number(a, b)
    return abs(float(a) - float(b))


def number(a: Any, b: Any) -> float | None:
    """The difference of what lm_eval keeps as text."""
    try:
        return abs(float(a) - float(b))
    except (TypeError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
