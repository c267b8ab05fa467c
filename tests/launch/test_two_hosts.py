"""``generate`` under mpirun over two hosts made of network namespaces."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.jobs import ROOT, START_S, clean_environment, json_lines
from tests.helpers.netns import Hosts, NamespaceError, two_hosts
from tests.helpers.tiny import NEW, write_prompts
from tests.launch.conftest import Write

pytestmark = pytest.mark.netns

# Prints, from every rank, the bytes that left its host in the decode steps of one spanning request.
# A prompt with one new token is a prefill alone; what a longer answer adds to that is decode.
DECODE_BYTES = """
import json, os, sys
import ds_cp

def inter_host_bytes():
    entries = engine._worker.cp.ledger.schemes()
    return {name: entry.inter_host_bytes for name, entry in entries.items() if "tree" in name}

config, steps = sys.argv[1], int(sys.argv[2])
engine = ds_cp.init_inference(json.load(open(config))["model"], config)
counts = [inter_host_bytes()]
for new in (1, 1 + steps):
    params = ds_cp.SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    engine.generate([list(range(100, 200))], params)
    counts.append(inter_host_bytes())
names = counts[-1]
one, longer = ({n: b.get(n, 0) - a.get(n, 0) for n in names} for a, b in zip(counts, counts[1:]))
sent = {name: longer[name] - one[name] for name in names}
os.write(1, (json.dumps({"prefill": sum(one.values()), "decode": sent}) + chr(10)).encode())
engine.shutdown()
"""
STEPS = 6


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install ds_cp[mpi]")
    with ExitStack() as stack:
        try:
            found = stack.enter_context(two_hosts())
        except NamespaceError as err:
            pytest.skip(f"two hosts cannot be made here: {err}; run as root: pytest -m netns")
        yield found


def run(hosts: Hosts, argv: list[str], slots: tuple[int, int]) -> str:
    done = hosts.run_mpirun(
        [sys.executable, *argv],
        slots=slots,
        timeout_s=START_S,
        env=clean_environment(),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_generate_on_two_hosts_of_two_ranks(
    hosts: Hosts, config: Write, tmp_path: Path, expected: list[list[int]]
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    args = ["--config", config(), "--prompts-file", prompts, "--max-tokens", str(NEW), "--json"]
    output = run(hosts, ["launch/generate.py", *args], (2, 2))
    found = json_lines(output)
    assert [o["outputs"][0]["token_ids"] for o in found] == expected, output
    assert found[1]["metrics"]["modes"] == ["tree"], output  # three ranks over two hosts
    lines = output.splitlines()
    assert "2 hosts: nodea ranks 0-1, nodeb ranks 2-3" in lines, output
    assert "ring order 0 1 2 3: 2 of 4 steps cross a host border" in lines, output
    assert any(line.startswith("link between hosts: ") for line in lines), output


def test_decode_bytes_between_hosts_do_not_grow_with_the_ranks_per_host(
    hosts: Hosts, config: Write, tmp_path: Path
) -> None:
    file = config(
        context_parallel={"mode": "tree"},
        kv_cache={
            "tokens_per_rank": 128,
            "block_size": 16,
            "placement": "round_robin",
            "prefix_caching": False,  # the second prompt is the first one again
        },
    )
    script = tmp_path / "decode_bytes.py"
    script.write_text(DECODE_BYTES)
    sent = {}
    for slots in ((1, 1), (2, 2)):
        output = run(hosts, [str(script), file, str(STEPS)], slots)
        ranks = json_lines(output)
        assert len(ranks) == sum(slots), output
        assert sum(rank["prefill"] for rank in ranks) > 0, output
        sent[slots] = {
            name: sum(rank["decode"][name] for rank in ranks) / STEPS
            for name in ("tree_q", "tree_partials")
        }
    # Per layer and query: Q crosses once, and its partial (fp32, with the lse) comes back once.
    text = json.loads(
        (Path(json.loads(Path(file).read_text())["model"]) / "config.json").read_text()
    )
    layers, H = text["num_hidden_layers"], text["num_attention_heads"]
    D = text["hidden_size"] // H
    want = {"tree_q": layers * H * D * 4, "tree_partials": layers * H * (D * 4 + 4)}
    assert sent == {(1, 1): want, (2, 2): want}
