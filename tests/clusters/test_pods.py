"""The pods of configs/kubernetes, each on a host of its own, started as a kubelet would: with their
manifest's command, environment and probe, a file system that cannot be written but for its mounts,
and no capability. (The user is root all the same: the tests' Python may be in its home.)"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from tests.clusters.conftest import GREEDY, HOW, KV_OF_TWO, begun
from tests.helpers.jobs import BIN, ROOT, START_S, Job, clean_environment
from tests.helpers.netns import NamespaceError
from tests.helpers.streams import Stream
from tests.helpers.tiny import LONG, NEW, PROMPTS
from tests.helpers.two_hosts import HostPair, host_pair
from tests.launch.conftest import Write

pytestmark = [pytest.mark.netns, pytest.mark.slow]

FOLDER = ROOT / "configs" / "kubernetes"
END_S = 45.0  # for both pods to be empty, drain included
# $1: the folder that is mounted into the pod; what follows it runs.
_POD = """
set -e
mount --make-rprivate /
mount --bind "$1" /mnt
mount -t tmpfs tmpfs /tmp
mkdir -p "$1"
mount --bind /mnt "$1"
mount -t tmpfs tmpfs /dev/shm
mount -o remount,bind,ro /
shift
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs -- "$@"
"""


@pytest.fixture(scope="module")
def pods() -> Iterator[HostPair]:
    """A host for each of two pods, where the names of the StatefulSet's service are known."""
    with ExitStack() as stack:
        try:
            found = stack.enter_context(host_pair(("ds-cp-0", "ds-cp-1")))
        except NamespaceError as err:
            pytest.skip(f"two hosts cannot be made here: {err}; {HOW}")
        for at in (0, 1):
            know(found, at, "ds-cp-0.ds-cp-ranks", 0)
        yield found


def know(pods: HostPair, at: int, name: str, of: int) -> None:
    """From now on pod ``at`` knows pod ``of`` by this name."""
    with pods.hosts.hosts_files[at].open("a") as file:
        file.write(f"{pods.hosts.addresses[of]} {name}\n")


def container(file: str, kind: str) -> dict[str, Any]:
    objects = yaml.safe_load_all((FOLDER / file).read_text("utf-8"))
    [found] = [each for each in objects if each["kind"] == kind]
    [only] = found["spec"]["template"]["spec"]["containers"]
    return dict(only)


def environment(spec: dict[str, Any], index: int) -> dict[str, str]:
    """What the kubelet sets."""
    found = {}
    for each in spec["env"]:
        source = each.get("valueFrom", {})
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"].endswith("['apps.kubernetes.io/pod-index']")
            found[each["name"]] = str(index)
        elif "secretKeyRef" in source:
            found[each["name"]] = "5f0c" * 16
        else:
            found[each["name"]] = each["value"]
    return found


def start(
    pods: HostPair, index: int, spec: dict[str, Any], env: dict[str, str], paths: dict[str, str]
) -> Job:
    """Start a pod. ``paths``: beginnings of arguments, and what they are here."""
    folder = Path(paths["/etc/ds-cp"])
    words = [re.sub(r"\$\((\w+)\)", lambda m: env[m[1]], word) for word in spec["command"]]
    programs = {"torchrun": str(BIN / "torchrun"), "python3": sys.executable}
    words[0] = programs[words[0]]
    for there, here in paths.items():
        words = [word.replace(there, here) for word in words]
    argv = ["unshare", "--mount", "sh", "-c", _POD, "pod", str(folder), *words]
    return pods.start(pods.hosts.names[index], argv, folder, env | {"TMPDIR": "/tmp"})


def configure(config: Write, tmp_path: Path, **sections: Any) -> Path:
    """The folder that is mounted as the secret: the manifests' config, for the tiny model."""
    whole = json.loads((FOLDER / "config.json").read_text())
    tiny = json.loads(Path(config()).read_text())
    whole |= {"model": tiny["model"], "dtype": "fp32", "threads_per_rank": 1} | sections
    Path(config()).write_text(json.dumps(whole))
    return tmp_path


def test_the_stateful_set_serves_and_drains(
    pods: HostPair, config: Write, tmp_path: Path, tiny: Path
) -> None:
    """Two pods of one rank each; it is ready when its probe says so, and both pods are deleted."""
    folder = with_model(configure(config, tmp_path, kv_cache=KV_OF_TWO), tiny)
    spec = container("ds-cp.yaml", "StatefulSet")
    probe = spec["readinessProbe"]["exec"]["command"]
    paths = {"/etc/ds-cp": str(folder), "--nproc-per-node=4": "--nproc-per-node=1"}
    envs = [environment(spec, index) for index in (0, 1)]

    def probed(index: int) -> bool:
        argv = [sys.executable, *probe[1:]]
        done = pods.hosts.run(pods.hosts.names[index], argv, env=clean_environment() | envs[index])
        return done.returncode == 0

    jobs = [start(pods, index, spec, envs[index], paths) for index in (0, 1)]
    assert not probed(0) and probed(1)
    jobs[0].ready()
    assert probed(0), jobs[0].story()
    address = pods.hosts.addresses[0]
    key = json.loads((folder / "config.json").read_text())["server"]["api_key"]
    with pods.door("ds-cp-0", 8000, address) as url:
        body = GREEDY | {"model": "qwen3-8b"}
        expected = Stream(url, body, key=key).end()
        stream = begun(jobs[0], Stream(url, body, key=key))
        for name in pods.hosts.names:
            pods.signal(name, "torchrun", signal.SIGTERM)
        assert stream.end() == expected, jobs[0].story()
    pods.until_empty(END_S)
    assert "stopping; requests in flight get up to 60 s" in jobs[0].err, jobs[0].story()
    assert all("ds_cp: error" not in job.err for job in jobs), jobs[1].story()


def test_the_indexed_job_answers_its_file(
    pods: HostPair, config: Write, tmp_path: Path, tiny: Path, expected: list[list[int]]
) -> None:
    """The second pod is up before the name of the first is known. One prompt needs both."""
    assert len(LONG) > 128  # tokens of one rank
    kv = KV_OF_TWO | {"tokens_per_rank": 128}
    folder = with_model(configure(config, tmp_path, kv_cache=kv), tiny)
    lines = [
        {
            "custom_id": str(at),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "qwen3-8b", "prompt": p, "max_tokens": NEW, "temperature": 0},
        }
        for at, p in enumerate(PROMPTS)
    ]
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = container("batch-job.yaml", "Job")
    paths = {"/etc/ds-cp": str(folder), "/batches": str(folder)}
    jobs = []
    for index in (1, 0):
        env = environment(spec, index) | {"JOB_COMPLETION_INDEX": str(index)}
        jobs.append(start(pods, index, spec, env, paths))
        if index == 1:
            jobs[0].until("its start", lambda: pods.matching("ds-cp-1", "ds_cp.cli"), 30)
            for at in (0, 1):
                know(pods, at, "ds-cp-batch-0.ds-cp-batch", 0)
    for job in jobs:
        job.until("its end", lambda job=job: job.process.poll() is not None, START_S)
    story = jobs[0].story() + jobs[1].story()
    assert [job.process.returncode for job in jobs] == [0, 0], story
    assert "batch: 3 answered, 0 refused, 0 broken" in jobs[1].err, story
    pods.until_empty(END_S)
    answers = {}
    for line in (folder / "answers.jsonl").read_text().splitlines():
        answer = json.loads(line)
        answers[int(answer["custom_id"])] = answer["response"]["body"]["choices"][0]["text"]
    spell = AutoTokenizer.from_pretrained(tiny)
    assert answers == {
        at: spell.decode(tokens, skip_special_tokens=True) for at, tokens in enumerate(expected)
    }, story


def with_model(folder: Path, tiny: Path) -> Path:
    """Copy the model into what is mounted."""
    model = folder / "models"
    subprocess.run(["cp", "-r", str(tiny), str(model)], check=True, timeout=60)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": str(model)}))
    return folder
