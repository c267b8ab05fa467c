"""A real Slurm of two nodes: what srun and sbatch start, stop and lose."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.conftest import GREEDY, HOW, KV, KV_OF_TWO, begun, port_of
from tests.helpers import slurm as slurm_tools
from tests.helpers.jobs import ROOT, START_S, Job, busy, json_lines
from tests.helpers.netns import NamespaceError
from tests.helpers.slurm import DAEMONS, KILL_WAIT_S, Slurm, slurm_cluster
from tests.helpers.streams import Stream
from tests.helpers.tiny import NEW, write_prompts
from tests.helpers.two_hosts import HostPair
from tests.launch.conftest import Write

pytestmark = [pytest.mark.netns, pytest.mark.slow]

END_S = 30.0  # for a job to be gone from both nodes, drain included
STOPPING = "stopping; requests in flight get"


@pytest.fixture(scope="module")
def slurm(pair: HostPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if why := slurm_tools.missing():
        pytest.skip(f"{why}; {HOW}")
    try:
        with slurm_cluster(pair, tmp_path_factory.mktemp("slurm")) as found:
            yield found
    except NamespaceError as err:
        pytest.skip(f"{err}; {HOW}")


def srun(slurm: Slurm, folder: Path, nodes: int, per_node: int, words: list[str]) -> Job:
    """As the guide says it."""
    size = ["-N", str(nodes), f"--ntasks-per-node={per_node}", "--cpus-per-task=1"]
    argv = ["srun", *size, "--kill-on-bad-exit=1", sys.executable, *words]
    return slurm.start(argv, folder)


def ends(slurm: Slurm, job: Job, limit_s: float = END_S) -> None:
    """The job is over, on both nodes, and Slurm knows it."""
    job.until("the end of srun", lambda: job.process.poll() is not None, limit_s)
    slurm.until_idle(limit_s)
    slurm.pair.until_empty(limit_s, but=DAEMONS)


def job_id(slurm: Slurm) -> str:
    [found] = slurm.run(["squeue", "--noheader", "--format=%i"]).split()
    return found


@pytest.mark.parametrize("per_node", [2, 1])
def test_generate(
    per_node: int, slurm: Slurm, config: Write, folder: Path, expected: list[list[int]]
) -> None:
    file = config(kv_cache={"tokens_per_rank": 128 // per_node, "block_size": 16})
    prompts = write_prompts(folder / "prompts.jsonl")
    args = ["--config", file, "--prompts-file", prompts, "--max-tokens", str(NEW), "--json"]
    job = srun(slurm, folder, 2, per_node, ["launch/generate.py", *args])
    ends(slurm, job, START_S)
    assert job.process.returncode == 0, job.story()
    assert [o["outputs"][0]["token_ids"] for o in json_lines(job.out)] == expected, job.story()
    where = "nodea ranks 0-1, nodeb ranks 2-3" if per_node == 2 else "nodea rank 0, nodeb rank 1"
    assert f"2 hosts: {where}" in job.err, job.story()
    assert "Traceback" not in job.err and "error" not in job.err, job.story()


def test_scancel_with_term_lets_requests_finish(slurm: Slurm, config: Write, folder: Path) -> None:
    file = config(kv_cache=KV_OF_TWO, threads_per_rank=1)
    job = srun(slurm, folder, 2, 1, ["launch/serve.py", "--config", file])
    with slurm.pair.door("nodea", port_of(job)) as url:
        expected = Stream(url, GREEDY).end()
        stream = begun(job, Stream(url, GREEDY))
        slurm.run(["scancel", "--signal=TERM", job_id(slurm)])
        assert stream.end() == expected, job.story()
    ends(slurm, job)
    assert job.process.returncode == 0 and STOPPING in job.err, job.story()
    assert "ds_cp: error" not in job.err, job.story()


def test_a_killed_worker_is_replaced_on_one_node(slurm: Slurm, config: Write, folder: Path) -> None:
    """Then the job is cancelled, which leaves KillWait seconds to its requests."""
    tolerance = {"spare_after_s": None}
    file = config(kv_cache=KV_OF_TWO, fault_tolerance=tolerance,
                  threads_per_rank=1)  # fmt: skip
    job = srun(slurm, folder, 1, 2, ["launch/serve.py", "--config", file])
    with slurm.pair.door("nodea", port_of(job)) as url:
        expected = Stream(url, GREEDY).end()
        stream = begun(job, Stream(url, GREEDY))
        slurm.pair.matching("nodea", "serve.worker_process")[-1].kill()
        assert stream.end() == expected, job.story()
        assert "all ranks have met again (generation 1" in job.err, job.story()
        stream = begun(job, Stream(url, GREEDY))
        slurm.run(["scancel", job_id(slurm)])
        assert stream.end() == expected, job.story()
    ends(slurm, job, KILL_WAIT_S)
    assert STOPPING in job.err and "ds_cp: error" not in job.err, job.story()


def test_a_killed_task_is_named(slurm: Slurm, config: Write, folder: Path) -> None:
    """srun names the task, ds_cp the rank, and nothing is left on the other node."""
    file = config(kv_cache=KV_OF_TWO, comm={"timeout_s": 20}, threads_per_rank=1)
    job = srun(slurm, folder, 2, 1, ["launch/serve.py", "--config", file])
    with slurm.pair.door("nodea", port_of(job)) as url:
        stream = begun(job, Stream(url, GREEDY))
        [worker] = slurm.pair.matching("nodeb", "serve.worker_process")
        worker.parent().kill()
        job.until("its end", lambda: stream.is_over, END_S)
        assert stream.errors, "the client was not told"
    ends(slurm, job)
    assert job.process.returncode not in (0, None), job.story()
    assert re.search(r"srun: error: nodeb: task 1: Killed", job.err), job.story()
    assert "ds_cp: error" in job.err, job.story()


def test_sbatch_ends_before_its_time_is_up(
    slurm: Slurm, config: Write, folder: Path, expected: list[list[int]]
) -> None:
    """``launch/slurm.sbatch`` as it is, without GPUs, and with less time once it serves: all ranks
    get the signal that it asks for, and no error is in its log."""
    file = config(kv_cache=KV, threads_per_rank=1)
    log = folder / "sbatch.log"
    slurm.run(
        [
            *("env", f"DS_CP_PYTHON={sys.executable}", "sbatch", "--parsable"),
            *("--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0"),
            *(f"--output={log}", str(ROOT / "launch" / "slurm.sbatch"), file),
        ]
    )
    job = job_id(slurm)

    def until(pattern: str, limit_s: float) -> re.Match[str]:
        end = time.monotonic() + limit_s * busy()
        while True:
            text = log.read_text() if log.exists() else ""
            if found := re.search(pattern, text, re.MULTILINE):
                return found
            assert time.monotonic() < end, f"{pattern}: {text}\n{slurm.logs()}"
            time.sleep(0.2)

    port = until(r"^ds_cp ready: http://127\.0\.0\.1:(\d+)", START_S)[1]
    text = log.read_text()
    assert "rank 0 and the server are on nodea\n" in text
    assert "2 hosts: nodea ranks 0-1, nodeb ranks 2-3" in text
    with slurm.pair.door("nodea", int(port)) as url:
        assert Stream(url, GREEDY).end()
    slurm.run(["scontrol", "update", f"JobId={job}", "TimeLimit=3"])
    until(STOPPING, 120)
    slurm.until_idle(END_S)
    slurm.pair.until_empty(END_S, but=DAEMONS)
    assert slurm.state(job) == "COMPLETED", log.read_text()
    assert "ds_cp: error" not in log.read_text()
