"""The Kubernetes manifest fits Kubernetes' own schema, its parts each other, and ds_cp's command
line and config."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_cp.cli.main import build_parser
from ds_cp.config import load_config
from tests.helpers.documents import ROOT, all_commands
from tests.unit.documents.test_commands import KEYED

FOLDER = ROOT / "configs" / "kubernetes"
VERSIONS = ("1.28", "1.37")  # the oldest with the pod's index as a label, the newest known


@cache
def objects() -> dict[tuple[str, str], dict[str, Any]]:
    """Every object by kind and name."""
    found = yaml.safe_load_all((FOLDER / "ds-cp.yaml").read_text("utf-8"))
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def pods() -> dict[str, Any]:
    spec: dict[str, Any] = objects()["StatefulSet", "ds-cp"]["spec"]
    return spec


def container() -> dict[str, Any]:
    [only] = pods()["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def settings() -> Any:
    return load_config(FOLDER / "config.json")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schema_of_kubernetes(version: str) -> None:
    validator = pytest.importorskip(
        "kubernetes_validate", reason="no schema of Kubernetes: pip install kubernetes-validate"
    )
    for each in objects().values():
        validator.validate(each, version, strict=True)


def test_labels_and_names_lead_to_each_other() -> None:
    labels = pods()["template"]["metadata"]["labels"]
    assert pods()["selector"]["matchLabels"].items() <= labels.items()
    for (kind, name), each in objects().items():
        if kind == "Service":
            own = {k: v for k, v in each["spec"]["selector"].items() if "/" not in k}
            assert own.items() <= labels.items(), name
        if kind == "NetworkPolicy":
            assert each["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    headless = objects()["Service", pods()["serviceName"]]["spec"]
    assert headless["clusterIP"] == "None" and headless["publishNotReadyAddresses"]
    pod = objects()["Service", "ds-cp"]["spec"]["selector"]["statefulset.kubernetes.io/pod-name"]
    assert pod == "ds-cp-0"
    volumes = {volume["name"] for volume in pods()["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == volumes


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


def test_pods_have_no_more_rights_than_they_need() -> None:
    pod = pods()["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    own = container()["securityContext"]
    assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"]
    assert own["capabilities"] == {"drop": ["ALL"]}


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
