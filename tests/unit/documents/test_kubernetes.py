"""The Kubernetes manifests fit Kubernetes' own schema, their parts each other, and ds_cp's command
line and config."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_cp.cli.main import build_parser
from ds_cp.config import load_config
from ds_cp.topology.environment import from_rank_variables
from tests.helpers.documents import ROOT, all_commands
from tests.unit.documents.test_commands import KEYED

FOLDER = ROOT / "configs" / "kubernetes"
VERSIONS = ("1.28", "1.37")  # the oldest with the pod's index as a label, the newest known


WORKLOADS = {"ds-cp.yaml": ("StatefulSet", "ds-cp"), "batch-job.yaml": ("Job", "ds-cp-batch")}
each_file = pytest.mark.parametrize("file", WORKLOADS)


@cache
def objects(file: str = "ds-cp.yaml") -> dict[tuple[str, str], dict[str, Any]]:
    """Every object by kind and name."""
    found = yaml.safe_load_all((FOLDER / file).read_text("utf-8"))
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def pods(file: str = "ds-cp.yaml") -> dict[str, Any]:
    spec: dict[str, Any] = objects(file)[WORKLOADS[file]]["spec"]
    return spec


def container(file: str = "ds-cp.yaml") -> dict[str, Any]:
    [only] = pods(file)["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def variables(file: str) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in container(file)["env"]}


def settings() -> Any:
    return load_config(FOLDER / "config.json")


@each_file
@pytest.mark.parametrize("version", VERSIONS)
def test_the_schema_of_kubernetes(version: str, file: str) -> None:
    validator = pytest.importorskip(
        "kubernetes_validate", reason="no schema of Kubernetes: pip install kubernetes-validate"
    )
    for each in objects(file).values():
        validator.validate(each, version, strict=True)


@each_file
def test_labels_and_names_lead_to_each_other(file: str) -> None:
    labels = pods(file)["template"]["metadata"]["labels"]
    for (kind, name), each in objects(file).items():
        if kind == "Service":
            own = {k: v for k, v in each["spec"]["selector"].items() if "/" not in k}
            assert own.items() <= labels.items(), name
        if kind == "NetworkPolicy":
            assert each["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    pod = pods(file)["template"]["spec"]
    names = pods(file).get("serviceName") or pod["subdomain"]
    headless = objects(file)["Service", names]["spec"]
    assert headless["clusterIP"] == "None" and headless["publishNotReadyAddresses"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container(file)["volumeMounts"]} == volumes


def test_the_server_is_in_the_first_pod() -> None:
    assert pods()["selector"]["matchLabels"] == pods()["template"]["metadata"]["labels"]
    pod = objects()["Service", "ds-cp"]["spec"]["selector"]["statefulset.kubernetes.io/pod-name"]
    assert pod == "ds-cp-0"


@each_file
def test_the_secret_gives_the_config_and_what_ranks_show_each_other(file: str) -> None:
    source = variables(file)["DS_CP_JOB_SECRET"]["valueFrom"]["secretKeyRef"]
    [config] = [v["secret"] for v in pods(file)["template"]["spec"]["volumes"] if "secret" in v]
    assert source == {"name": config["secretName"], "key": "job-secret"}
    assert [item["key"] for item in config["items"]] == ["config.json"]
    [command] = [c.text for c in all_commands() if c.text.startswith("kubectl create secret")]
    assert f"secret generic {config['secretName']} " in command
    assert "--from-file=config.json" in command and "--from-literal=job-secret=" in command


def test_the_ranks_of_an_indexed_job_find_each_other() -> None:
    """By what the manifest and the Job's controller give each pod."""
    file = "batch-job.yaml"
    spec, pod = pods(file), pods(file)["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2
    env = {name: each["value"] for name, each in variables(file).items() if "value" in each}
    places = [from_rank_variables({**env, "JOB_COMPLETION_INDEX": str(n)}) for n in range(2)]
    assert [place.rank for place in places] == [0, 1]
    for place in places:
        assert place.size == spec["completions"] and (place.local_rank, place.local_size) == (0, 1)
        assert place.store_host == f"ds-cp-batch-0.{pod['subdomain']}"
        assert place.store_port in [port["containerPort"] for port in container(file)["ports"]]
    assert container(file)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    program, dash, module, *words = container(file)["command"]
    assert (dash, module) == ("-m", "ds_cp.cli") and program == "python3"
    ours = build_parser().parse_args(words)
    mounts = {mount["mountPath"] for mount in container(file)["volumeMounts"]}
    assert {os.path.dirname(path) for path in (*words[1:3], ours.config)} <= mounts


def test_the_command_starts_a_rank_for_every_gpu_of_every_pod() -> None:
    from torch.distributed.run import get_args_parser

    program, *words = container()["command"]
    assert program == "torchrun"
    words = [word.replace("$(POD_INDEX)", "1") for word in words]
    args = get_args_parser().parse_args(words)
    assert int(args.nnodes) == pods()["replicas"]
    assert args.nproc_per_node == container()["resources"]["limits"]["nvidia.com/gpu"]
    assert args.node_rank == 1 and args.module and args.training_script == "ds_cp.cli"
    assert args.master_addr == f"ds-cp-0.{pods()['serviceName']}"
    assert args.master_port in [port["containerPort"] for port in container()["ports"]]
    names = {variable["name"] for variable in container()["env"]}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container()["command"]))) <= names
    ours = build_parser().parse_args(args.training_script_args)
    [mount] = [m for m in container()["volumeMounts"] if m["name"] == "config"]
    assert ours.config == f"{mount['mountPath']}/config.json"


def test_the_config_serves_other_machines_and_its_drain_fits() -> None:
    config = settings()
    assert config.server.host == "0.0.0.0" and config.server.api_keys == ("REPLACE-THIS-KEY",)
    assert config.server.port in [port["containerPort"] for port in container()["ports"]]
    [mount] = [m for m in container()["volumeMounts"] if m["name"] == "models"]
    assert config.model.startswith(mount["mountPath"] + "/")
    command = container()["command"]
    [shutdown] = [int(w.partition("=")[2]) for w in command if w.startswith("--shutdown")]
    grace = pods()["template"]["spec"]["terminationGracePeriodSeconds"]
    assert config.server.drain_timeout_s < shutdown < grace


@each_file
def test_pods_have_no_more_rights_than_they_need(file: str) -> None:
    pod = pods(file)["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    own = container(file)["securityContext"]
    assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert set(container(file)["resources"]["requests"]) == {"cpu", "memory"}


def test_only_the_job_reaches_its_ranks() -> None:
    [policy] = [each for (kind, _), each in objects().items() if kind == "NetworkPolicy"]
    ranks, clients = policy["spec"]["ingress"]
    assert [s["podSelector"]["matchLabels"] for s in ranks["from"]] == [{"app": "ds-cp"}]
    assert [port["port"] for port in clients["ports"]] == [settings().server.port]


def test_the_guide_makes_a_config_with_a_key_of_its_own(tmp_path: Path) -> None:
    [command] = [c for c in all_commands() if c.text.startswith(KEYED)]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    subprocess.run(["bash", "-c", command.text], cwd=tmp_path, check=True, timeout=60)
    [key] = load_config(tmp_path / "config.json").server.api_keys
    assert re.fullmatch(r"[0-9a-f]{48}", key)
