"""A pod of an Indexed Job of Kubernetes is a rank."""

from __future__ import annotations

import pytest

from ds_cp.errors import LaunchError, TopologyError
from ds_cp.topology import detect, net, peek_rank
from tests.unit.topology.test_job import detected, free_port, torchrun_env


def pod_env(index: int, **more: str) -> dict[str, str]:
    """Of a pod of an Indexed Job, with what configs/kubernetes gives it."""
    return {
        "JOB_COMPLETION_INDEX": str(index),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": LOCAL[0].ip if LOCAL else "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    } | more


LOCAL = [a for a in net.local_addresses() if not a.is_loopback]
needs_address = pytest.mark.skipif(not LOCAL, reason="this machine has no address but loopback")


@needs_address
def test_a_pod_of_an_indexed_job_is_a_rank() -> None:
    env = pod_env(1)
    with detected(env) as job:
        assert (job.rank, job.world_size, job.local_rank, job.local_world_size) == (1, 2, 0, 1)
        assert job.launcher == "kubernetes" and not job.one_host and job.hosts is None
        assert (job.store_host, job.store_port) == (env["MASTER_ADDR"], int(env["MASTER_PORT"]))
    assert peek_rank(env) == 1


def test_pods_that_are_apart_are_jobs_of_one_rank() -> None:
    """Without WORLD_SIZE, and torchrun's ranks in such a pod have numbers of their own."""
    with detected({"JOB_COMPLETION_INDEX": "3"}) as job:
        assert (job.rank, job.world_size, job.launcher) == (0, 1, "python")
    assert peek_rank({"JOB_COMPLETION_INDEX": "3"}) == 0
    with detected(torchrun_env(1, 2, 2, JOB_COMPLETION_INDEX="0")) as job:
        assert (job.rank, job.launcher) == (1, "torchrun")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"JOB_COMPLETION_INDEX": "2"}, "kubernetes gave rank 2 of 2"),
        ({"JOB_COMPLETION_INDEX": "one"}, "JOB_COMPLETION_INDEX must be a whole number"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "localhost"}, "which every host takes for itself"),
    ],
)
def test_a_pod_without_sense(more: dict[str, str], words: str) -> None:
    with pytest.raises(TopologyError, match=words):
        detect(pod_env(0) | more)


@needs_address
def test_a_pod_waits_for_the_name_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes knows it once that pod has an address; other launchers' names are known."""
    asked = []
    resolve = net.resolve

    def late(name: str) -> tuple[str, ...]:
        asked.append(name)
        if len(asked) < 3:
            raise LaunchError("unknown")
        return resolve(LOCAL[0].ip)

    monkeypatch.setattr(net, "resolve", late)
    monkeypatch.setattr(net, "NAME_POLL_S", 0.0)
    with detected(pod_env(1, MASTER_ADDR="ds-cp-0.ds-cp-ranks")) as job:
        assert job.store_host == "ds-cp-0.ds-cp-ranks" and len(asked) >= 3
    monkeypatch.setattr(net, "resolve", resolve)
    with pytest.raises(LaunchError, match="cannot be resolved"):
        detect(pod_env(1, MASTER_ADDR="no.such.host.invalid"), timeout_s=0.0)
