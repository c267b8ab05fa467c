"""What a client sees of a worker's death: kills of random workers, each while one stream runs a
rank, and one whose prompt spans ranks.

The last line is JSON: seconds (median, 99th percentile, worst) until the death was known, until all
ranks had met again, and the longest pause of the streams since; ``prefill_s`` is what the spanning
prompt takes, most of which is computed again.

    python -m benchmarks.faults.pauses --ranks 4 --model DIRECTORY
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import common
from benchmarks.faults.life import longest_pause
from tests.helpers.jobs import Job, command
from tests.helpers.streams import Stream
from tests.helpers.tiny import make_tiny_model

MET = re.compile(r"all ranks have met again \(generation \d+, ([\d.]+) s\)")
LIMIT_S = 180.0


def measure(job: Job, ranks: int, kills: int, span: int, rng: random.Random) -> dict[str, Any]:
    """With a server that starts."""
    began = time.monotonic()
    url = job.ready()
    ready = time.monotonic() - began
    locals_ = [{"prompt": f"Number {rank}", "max_tokens": 400, "temperature": 0}
               for rank in range(ranks)]  # fmt: skip
    known, local, spanning, prefill = [], [], [], []
    for number in range(kills):
        prompt = [10 + (n + number) % 200 for n in range(span)]  # no prefix of the last one
        asked = time.monotonic()
        streams = [Stream(url, {"prompt": prompt, "max_tokens": 100, "temperature": 0})]
        job.until("the span", lambda: streams[0].count > 0 or streams[0].is_over, LIMIT_S)  # noqa: B023
        assert not streams[0].errors, streams[0].errors
        prefill.append(streams[0].times[0] - asked)
        streams += [Stream(url, body) for body in locals_]
        job.until("tokens", lambda: all(one.count > 2 for one in streams), LIMIT_S)  # noqa: B023
        assert not any(one.is_over for one in streams), "a stream was over before the fault"
        workers = job.matching("serve.worker_process", rng.randrange(ranks))
        at = time.monotonic()
        min(workers, key=psutil.Process.create_time).kill()
        while job.err.count("; another worker takes its place") <= number:
            time.sleep(0.001)
        known.append(time.monotonic() - at)
        streams[0].end()
        spanning.append(longest_pause(streams[0], at))
        local += [longest_pause(stream, at) for stream in streams[1:]]
        for stream in streams[1:]:
            stream.leave()
        job.until("their end", lambda: all(one.is_over for one in streams), LIMIT_S)  # noqa: B023
    return {
        **common.machine(),
        "commit": common.commit(),
        "command": common.command("faults.pauses", sys.argv[1:]),
        "ready_s": round(ready, 2),
        "known_s": quantiles(known),
        "met_again_s": quantiles([float(seconds) for seconds in MET.findall(job.err)]),
        "local_pause_s": quantiles(local),
        "spanning_pause_s": quantiles(spanning),
        "prefill_s": quantiles(prefill),
    }


def quantiles(values: list[float]) -> list[float]:
    """Median, 99th percentile and worst."""
    values = sorted(values)
    return [round(values[int(share * (len(values) - 1))], 3) for share in (0.5, 0.99, 1.0)]


def main() -> int:
    """Measure, and print."""
    parser = common.parser(__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument(
        "--span",
        type=int,
        help="tokens of the prompt that spans; default: 4,000, 400 without --model",
    )
    parser.add_argument("--tokens", type=int, default=2048, help="KV tokens of a rank")
    parser.add_argument("--model", help="a folder; default: the tiny model, for shorter spans")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args: argparse.Namespace = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "config.json"
        config = {
            "model": args.model or str(make_tiny_model(folder / "model")),
            "kv_cache": {"tokens_per_rank": args.tokens, "block_size": 16},
            "server": {"port": 0, "served_model_name": "tiny"},
        }
        file.write_text(json.dumps(config))
        job = Job(command("ds-cp", "serve", args.ranks, ["--config", str(file)]), folder)
        try:
            result = measure(
                job,
                args.ranks,
                args.kills,
                args.span or (4000 if args.model else 400),
                random.Random(args.seed),
            )
        finally:
            job.close()
    common.finish(result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
