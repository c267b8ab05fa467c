"""``--json``: JSON alone on stdout, an object a line, in ASCII."""

from __future__ import annotations

import io
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ds_cp.cli import main as cli
from ds_cp.serve.announce import print_ready, ready_as_json
from tests.helpers.terminal import variables

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: Any) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_CP_LAUNCHER", *variables()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "HEAD_START_S", 0.0)


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    raw = {"model": str(tmp_path / "model"), "server": {"port": 0, "api_key": "sécret"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return str(tmp_path / "config.json")


def objects(capfd: Any, *argv: str) -> list[dict[str, Any]]:
    assert cli.main([*argv, "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and out.isascii() and out.endswith("\n")
    return [json.loads(line) for line in out.splitlines()]


def test_config(capfd: Any, config: str) -> None:
    raw = json.loads(Path(config).read_text())
    raw["server"]["api_key"] = "ascii-secret"
    Path(config).write_text(json.dumps(raw))
    [schema] = objects(capfd, "config", "schema")
    assert schema == json.loads((ROOT / "configs" / "ds_cp.schema.json").read_text())
    found = objects(capfd, "config", "check", config, config)
    assert found == [{"file": config, "ok": True}] * 2
    [explained] = objects(capfd, "config", "explain", config)
    assert explained["config"]["kv_cache"]["block_size"] == 64
    assert explained["config"]["server"]["api_key"] == "(hidden)"
    assert "ascii-secret" not in json.dumps(explained)


def test_a_failure_is_on_stderr(capfd: Any) -> None:
    for argv in (
        "config check none.json",
        "plan --model none --device cpu --context 1K",
        "top --url ?",
        "bench kv --blocks 0",
    ):
        assert cli.main([*argv.split(), "--json"]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("ds_cp: error: ")


def test_serve_says_that_it_is_ready(capfd: Any, config: str, monkeypatch: Any) -> None:
    """The object alone is on stdout, whatever else is printed."""

    def serve(config: Any, job: Any, announce: Any) -> int:
        print("noise of a library")
        os.write(1, b"noise of C\n")
        announce(["a line", "ä"], "http://127.0.0.1:1 and http://[::1]:1")
        print("more noise")
        job.store_socket.close()
        return 0

    module = types.ModuleType("ds_cp.serve.supervisor")
    module.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ds_cp.serve.supervisor", module)
    monkeypatch.setattr("ds_cp.cli.serve.take_over", lambda *names: None)
    raw = json.loads(Path(config).read_text())
    del raw["server"]["api_key"]
    Path(config).write_text(json.dumps(raw))
    assert cli.main(["serve", "--config", config, "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {
        "ready": True, "urls": ["http://127.0.0.1:1", "http://[::1]:1"], "summary": ["a line", "ä"],
    }  # fmt: skip
    assert out.count("\n") == 1 and "noise of a library" in err and "noise of C" in err


def test_ready_for_people(capsys: Any) -> None:
    print_ready(["one", "two"], "http://x")
    assert capsys.readouterr().out == "one\ntwo\nds_cp ready: http://x\n"


def test_a_server_goes_on_where_its_object_cannot_be_written() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    ready_as_json(Full())(["a"], "http://x")
