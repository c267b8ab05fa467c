"""The command line: one line of cause, exit codes, prompts, output, nothing heavy on the way."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ds_cp.cli import doctor as doctor_module
from ds_cp.cli import main as cli
from ds_cp.cli.doctor import loopback_round_trip_us
from ds_cp.log_stream import drain_streams
from ds_cp.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprob
from tests.helpers import flash_attn

ROOT = Path(__file__).resolve().parents[3]
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_CP_LAUNCHER", "OMPI_COMM_WORLD_RANK")


@pytest.fixture(autouse=True)
def one_rank(monkeypatch) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "HEAD_START_S", 0.0)


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A config whose model folder looks whole."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model": str(tmp_path / "model"), "server": {"port": 0}}))
    return str(file)


def refused(capfd, *argv: str) -> str:
    """Run and expect exit code 2 with exactly one line on stderr; that line."""
    assert cli.main(argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("ds_cp: error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


# --- errors


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "verb"),
        (["frob"], "frob"),
        (["serve"], "--config FILE"),
        (["serve", "--config", "none.json"], "No such file"),
        (["serve", "--confg", "x"], "--confg"),
        (["serve", "--model", "gpt2", "--port", "70000"], "server.port is 70000"),
        (["serve", "--model", "gpt2", "--port", "x"], "invalid int value: 'x'"),
        (["serve", "--model", "./missing"], "no model at ./missing"),
        (["serve", "--model", "gpt2", "--ranks", "0", "--port", "0"], "from 1 to 1024"),
        (["serve", "--model", "gpt2", "--host", "0.0.0.0"], "server.api_key is not set"),
        (["generate", "--model", "gpt2"], "--prompt"),
        (["generate", "--model", "gpt2", "--prompt", "a", "--prompt-file", "b"], "not allowed"),
        (["generate", "--model", "gpt2", "--prompt", ""], "--prompt is empty"),
        (
            ["generate", "--model", "gpt2", "--prompt", "a", "--max-tokens", "-1"],
            "max_tokens is -1",
        ),
        (["generate", "--model", "gpt2", "--prompt", "a", "--temperature", "nan"], "temperature"),
        (["generate", "--model", "gpt2", "--prompt-file", "none.txt"], "No such file"),
        (["batch", "in"], "OUT"),
        (["batch", "in", "out"], "--config FILE"),
        (["batch", "none.jsonl", "out", "--model", "gpt2"], "cannot read none.jsonl: No such file"),
        (["batch", "in", "out", "--model", "gpt2", "--concurrency", "0"], "from 1 to 4096"),
        (["config", "check", "none.json"], "none.json"),
        (["config", "explain"], "FILE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_and_code_2(capfd, argv: list[str], part: str) -> None:
    assert part in refused(capfd, *argv)


@pytest.mark.parametrize("name", ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_other_ranks_are_silent(capfd, monkeypatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert cli.main(["config", "check", "none.json"]) == 2
    assert capfd.readouterr() == ("", "")


def test_bug_is_code_1_with_a_last_line(capfd, monkeypatch) -> None:
    def broken(*_: Any) -> int:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("ds_cp.cli.config.config", broken)
    assert cli.main(["config", "schema"]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.endswith("internal error on rank 0, please report it: ZeroDivisionError: a b")


def test_interrupt_is_130_and_quiet(capfd, monkeypatch) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("ds_cp.cli.config.config", interrupted)
    assert cli.main(["config", "schema"]) == 130
    assert capfd.readouterr() == ("", "")


def test_port_in_use(capfd, config: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = refused(capfd, "serve", "--config", config, "--port", str(port))
    assert f"127.0.0.1 port {port} (Address already in use)" in line and "--port" in line


def test_foreign_address(capfd, config: str, tmp_path: Path) -> None:
    raw = json.loads(Path(config).read_text())
    raw["server"] |= {"host": "192.0.2.1", "api_key": "k"}
    Path(config).write_text(json.dumps(raw))
    assert "192.0.2.1" in refused(capfd, "serve", "--config", config)


def test_ranks_inside_a_launcher(capfd, config: str, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave --ranks out" in refused(capfd, "serve", "--config", config, "--ranks", "2")


def test_ranks_that_do_not_fit_the_config(capfd, config: str) -> None:
    raw = json.loads(Path(config).read_text())
    raw |= {"context_parallel": {"size": 3}}
    Path(config).write_text(json.dumps(raw))
    argv = ["generate", "--config", config, "--prompt", "a"]
    assert "3" in refused(capfd, *argv, "--ranks", "2")
    assert "3" in refused(capfd, *argv)  # one rank


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--model", "gpt2", "--prompt", ""],
        ["serve", "--model", "./missing"],
        ["serve", "--model", "gpt2", "--port", "-1"],
        ["batch", "none.jsonl", "out", "--model", "gpt2"],
        ["version"],
    ],
    ids=lambda argv: argv[0],
)
def test_nothing_heavy_before_the_answer(argv: list[str]) -> None:
    code = (
        "import sys; from ds_cp.cli.main import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'deepspeed', 'transformers', 'mpi4py'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("torch", [True, False])
@pytest.mark.parametrize("argv", [["version"], ["config", "check", "none.json"]])
def test_leaving_loses_no_output_and_no_exit_code(argv: list[str], torch: bool) -> None:
    """With torch loaded, or what looks like it, a process leaves without taking it down."""
    code = (
        "import atexit, sys; from ds_cp.cli import run; "
        f"sys.modules |= dict(torch=None) if {torch} else {{}}; "
        "atexit.register(print, 'taken down'); run(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if argv == ["version"] else 2)
    assert ("taken down" in done.stdout) is not torch
    assert "ds_cp" in (done.stdout if argv == ["version"] else done.stderr)
    with open("/dev/full", "w") as full:
        lost = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert lost.returncode != 0


# --- config, version, doctor


def test_config_check_prints_one_ok_line(capfd, config: str) -> None:
    assert cli.main(["config", "check", config]) == 0
    assert capfd.readouterr() == (f"{config}: OK\n", "")


def test_config_schema_is_the_shipped_file(capfd) -> None:
    assert cli.main(["config", "schema"]) == 0
    assert capfd.readouterr().out == (ROOT / "configs" / "ds_cp.schema.json").read_text()


def test_config_explain_has_unit_and_value(capfd, config: str) -> None:
    assert cli.main(["config", "explain", config]) == 0
    assert "  kv_cache.block_size = 64 tokens  # " in capfd.readouterr().out


def test_version_json(capfd) -> None:
    assert cli.main(["version", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    setup = (ROOT / "ds_cp" / "version.py").read_text()
    assert f'"{found["ds_cp"]}"' in setup
    assert found["python"].split(".")[:2] == [str(n) for n in sys.version_info[:2]]


def test_doctor_json(capfd) -> None:
    code = cli.main(["doctor", "--json"])
    report = json.loads(capfd.readouterr().out)
    found = {check["name"]: check for check in report["checks"]}
    import torch

    assert found["torch"]["found"].startswith(torch.__version__)
    assert report["ok"] == all(check["status"] != "fail" for check in report["checks"])
    assert code == (0 if report["ok"] else 1)
    assert all(check["fix"] for check in report["checks"] if check["status"] != "ok")
    assert {"python", "deepspeed", "transformers", "gloo", "mpirun", "loopback"} <= set(found)
    assert "native library" in found


def test_doctor_reports_what_is_broken(capfd, monkeypatch) -> None:
    monkeypatch.setattr("ds_cp.cli.doctor._TORCH", "raise ImportError('libfoo.so is missing')")
    monkeypatch.setattr(
        "ds_cp.cli.doctor.installed_version", lambda name: "0.19.6" if name == "deepspeed" else None
    )
    assert cli.main(["doctor"]) == 1
    out = capfd.readouterr().out
    assert "[FAIL] torch: ImportError: libfoo.so is missing\n       fix: pip install" in out
    assert "[FAIL] deepspeed: 0.19.6, older than 0.19.8" in out
    assert "[note] mpi4py: not installed\n       fix: " in out
    assert out.splitlines()[-1].startswith("not ready: 3 to fix")


def test_doctor_says_what_attention_on_cuda_has(monkeypatch) -> None:
    """Triton with its version, and which of flash-attn 2, 3 and 4 can be loaded."""
    answers = {doctor_module._TRITON: (True, "3.5.0"), doctor_module._FLASH: (True, "[[], []]")}
    monkeypatch.setattr(doctor_module, "_python_probe", answers.__getitem__)
    there = {"triton", "flash_attn"}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: object() if name in there else None
    )
    [triton] = doctor_module._triton({})
    assert (triton.name, triton.status, triton.found) == ("triton", "ok", "3.5.0")
    for told, status, found in (
        ('[["2", "4"], []]', "ok", "2, 4 can be loaded"),
        ('[["2"], ["3: it does not load: no symbol"]]', "note",
         "2 can be loaded; 3: it does not load: no symbol"),
        ("[[], []]", "note", "not installed"),
    ):  # fmt: skip
        answers[doctor_module._FLASH] = True, told
        [flash] = doctor_module._flash({})
        assert (flash.status, flash.found) == (status, found)
        assert "torch's flash operator or cuDNN" in flash.fix and "sdpa" not in flash.fix
    there.clear()
    assert doctor_module._triton({})[0].found == doctor_module._flash({})[0].found
    assert doctor_module._flash({})[0].found == "not installed"


def test_the_probe_of_flash_attn(capsys) -> None:
    with flash_attn.installed(flash_attn.package("flash_attn", flash_attn.fa2)):
        exec(doctor_module._FLASH, {})
    with flash_attn.installed(flash_attn.package("flash_attn")):
        exec(doctor_module._FLASH, {})
    right, wrong = capsys.readouterr().out.splitlines()
    assert right == '[["2"], []]'
    assert wrong == '[[], ["2: flash_attn has no flash_attn_func"]]'


def test_doctor_says_what_the_native_library_is(monkeypatch) -> None:
    """Built: for what; not built: why, and how to build it."""
    from ds_cp.native import Library, load

    [check] = doctor_module._native({})
    found = load()
    if isinstance(found, Library):
        assert check.status == "ok" and check.found.startswith(f"runs {found.isas[0]} here")
    else:
        assert (check.status, check.found) == ("note", found)
    program = "raise SystemExit('the native library is not built; run `python -m ds_cp.native`')"
    monkeypatch.setattr(doctor_module, "_NATIVE", program)
    [check] = doctor_module._native({})
    assert check.status == "note" and check.found.startswith("the native library is not built")
    assert "python -m ds_cp.native" in check.fix and "2.5 times slower" in check.fix


def test_loopback_round_trip_is_a_time() -> None:
    assert 1 < loopback_round_trip_us() < 1e5


# --- generate and serve, with the engine replaced


class FakeEngine:
    """Answers every prompt with its own text in capitals; prints noise where libraries do."""

    def __init__(self, driver: bool) -> None:
        self.is_driver = driver
        self.calls: list[tuple[list[Any], list[Any]]] = []
        self.closed = False

    def summary(self) -> list[str]:
        return ["1 host"]

    def generate(self, prompts: list[Any], params: list[Any], progress: bool) -> list[Any]:
        assert progress is False  # stderr is no terminal here
        print("noise from python")
        os.write(1, b"noise from C\n")
        ctypes.CDLL(None).puts(b"buffered noise")
        self.calls.append((prompts, params))
        return [
            RequestOutput(
                request_id=str(i),
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=(1, 2),
                outputs=(
                    CompletionOutput(
                        index=0,
                        text=str(prompt).upper(),
                        token_ids=(3,),
                        finish_reason="length",
                        logprobs=(TokenLogprob(3, -0.5, ((3, -0.5), (4, float("-inf")))),),
                    ),
                ),
                finished=True,
                metrics=RequestMetrics(arrival_time=1.0),
            )
            for i, prompt in enumerate(prompts)
        ]

    def shutdown(self) -> None:
        self.closed = True


@pytest.fixture
def engine(monkeypatch) -> FakeEngine:
    engine = FakeEngine(driver=True)
    module = types.ModuleType("ds_cp.engine.llm")
    module.init_inference = lambda model, config, *, job=None, env=None: engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ds_cp.engine.llm", module)
    return engine


def test_generate_prints_text_alone(capfd, config: str, engine: FakeEngine) -> None:
    assert cli.main(["generate", "--config", config, "--prompt", "é a"]) == 0
    out, err = capfd.readouterr()
    assert out == "É A\n"
    assert all(f"noise from {source}" in err for source in ("python", "C")) and "1 host" in err
    assert "buffered noise" in err
    (params,) = engine.calls[0][1]
    assert (params.temperature, params.max_tokens) == (0.0, 128)
    assert engine.closed


def test_generate_json_has_the_fields(capfd, config: str, engine: FakeEngine) -> None:
    argv = ["generate", "--config", config, "--prompt", "x", "--json", "--local_rank=0"]
    assert cli.main(argv) == 0
    (line,) = capfd.readouterr().out.splitlines()
    got = json.loads(line)
    assert got["prompt_token_ids"] == [1, 2] and got["finished"] is True
    (output,) = got["outputs"]
    assert output["text"] == "X" and output["token_ids"] == [3]
    assert output["finish_reason"] == "length"
    assert output["logprobs"] == [
        {"token_id": 3, "logprob": -0.5, "top": [[3, -0.5], [4, None]], "text_offset": 0},
    ]
    assert got["metrics"]["arrival_time"] == 1.0


def test_stdout_is_back_after_generate(capfd, config: str, engine: FakeEngine) -> None:
    cli.main(["generate", "--config", config, "--prompt", "x"])
    capfd.readouterr()
    os.write(1, b"by C, ")
    print("by Python")
    assert capfd.readouterr().out == "by C, by Python\n"


def test_engine_is_shut_down_after_an_error(capfd, config: str, engine: FakeEngine) -> None:
    from ds_cp.errors import CapacityError

    def refuse(*_: Any, **__: Any) -> list[Any]:
        raise CapacityError("need 9 tokens, have 4", need=9, have=4, largest=4)

    engine.generate = refuse  # type: ignore[method-assign]
    assert cli.main(["generate", "--config", config, "--prompt", "x"]) == 2
    assert engine.closed
    assert capfd.readouterr().err.endswith("ds_cp: error: need 9 tokens, have 4\n")


def test_sampling_options_reach_the_engine(config: str, engine: FakeEngine) -> None:
    options = (
        "--max-tokens 7 --min-tokens 2 --temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 "
        "--seed 3 --stop a --stop bc --stop-token-ids 4 5 --logprobs 2 --ignore-eos"
    )
    argv = ["generate", "--config", config, "--prompt", "x", *options.split()]
    assert cli.main(argv) == 0
    (params,) = engine.calls[0][1]
    assert (params.max_tokens, params.min_tokens, params.temperature) == (7, 2, 0.5)
    assert (params.top_p, params.top_k, params.min_p, params.seed) == (0.9, 5, 0.1, 3)
    assert (params.stop, params.stop_token_ids) == (("a", "bc"), (4, 5))
    assert (params.logprobs, params.ignore_eos) == (2, True)


def test_serve_hands_over_config_and_job(config: str, monkeypatch) -> None:
    seen = []
    module = types.ModuleType("ds_cp.serve.supervisor")
    module.serve = lambda config, job: seen.append((config, job)) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ds_cp.serve.supervisor", module)
    assert cli.main(["serve", "--config", config, "--local-rank", "0"]) == 7
    (handed, job), *_ = seen
    assert handed.server.port == 0 and (job.rank, job.world_size) == (0, 1)
    job.store_socket.close()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o604])
def test_a_key_that_others_can_read(capfd, config: str, monkeypatch, mode: int) -> None:
    module = types.ModuleType("ds_cp.serve.supervisor")
    module.serve = lambda config, job: job.store_socket.close() or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ds_cp.serve.supervisor", module)
    file = Path(config)
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"server": {"port": 0, "api_key": "hush"}}))
    file.chmod(mode)
    assert cli.main(["serve", "--config", config]) == 0
    drain_streams()
    said = capfd.readouterr().err
    assert said.count(f"chmod 600 {config}") == (mode != 0o600) and "hush" not in said


# --- prompts


def write(tmp_path: Path, data: str | bytes) -> str:
    file = tmp_path / "prompts"
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(file)


def test_prompt_file_is_taken_whole(tmp_path: Path, config: str, engine: FakeEngine) -> None:
    file = write(tmp_path, "Zeile 1\nzwei\u2028drei \n")
    assert cli.main(["generate", "--config", config, "--prompt-file", file]) == 0
    assert engine.calls[0][0] == ["Zeile 1\nzwei\u2028drei \n"]


def test_prompts_file(capfd, tmp_path: Path, config: str, engine: FakeEngine) -> None:
    lines = [
        '"one\u2028line"',
        "",
        "[5, 6]",
        '{"prompt": "three", "max_tokens": 3, "stop": "x", "logit_bias": {"7": -1.5}}',
        '{"prompt": [8], "temperature": 1.0, "seed": null, "ignore_eos": true}',
        '{"prompt": "five", "n": 2, "prompt_logprobs": 1, "presence_penalty": 0.5}',
    ]
    file = write(tmp_path, "\r\n".join(lines))
    argv = ["generate", "--config", config, "--prompts-file", file, "--json", "--max-tokens", "9"]
    assert cli.main(argv) == 0
    prompts, params = engine.calls[0]
    assert prompts == ["one\u2028line", [5, 6], "three", [8], "five"]
    assert [p.max_tokens for p in params] == [9, 9, 3, 9, 9]
    assert [p.temperature for p in params] == [0.0, 0.0, 0.0, 1.0, 0.0]
    assert params[2].stop == ("x",) and params[2].logit_bias == {7: -1.5}
    assert params[3].ignore_eos is True
    assert (params[4].n, params[4].prompt_logprobs, params[4].presence_penalty) == (2, 1, 0.5)
    assert len(capfd.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "not valid JSON at column 2"),
        ("[1, ", "not valid JSON"),
        ("7", "must be a string or a list of token ids, not 7"),
        ("[1, -2]", "token ids"),
        ("[true]", "token ids"),
        ('""', "the prompt is empty"),
        ("[]", "the prompt is empty"),
        ("{}", "the object has no prompt"),
        (
            '{"prompt": "a", "max_token": 1}',
            "unknown field max_token; the nearest valid one is max_t",
        ),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0"),
        ('{"prompt": "a", "max_tokens": "7"}', "max_tokens must be an integer"),
        ('{"prompt": "a", "stop": 5}', "stop must be"),
        ('{"prompt": "a", "stop": [5]}', "stop strings"),
        ('{"prompt": "a", "stop_token_ids": 5}', "stop_token_ids must be a list"),
        ('{"prompt": "a", "logit_bias": [1]}', "logit_bias must be an object"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias must be an object"),
        ('{"prompt": "a", "ignore_eos": 1}', "ignore_eos must be true or false"),
        ('{"prompt": "a", "n": 0}', "n is 0; it must be from 1 to 64"),
        ('{"prompt": "a", "repetition_penalty": 0}', "repetition_penalty is 0"),
        ('{"prompt": "a", "prompt": "b"}', "given twice"),
    ],
)
def test_broken_line_names_its_number(capfd, tmp_path, config, line: str, part: str) -> None:
    file = write(tmp_path, '"fine"\n\n' + line + "\n")
    message = refused(capfd, "generate", "--config", config, "--prompts-file", file)
    assert f"{file} line 3: " in message and part in message


@pytest.mark.parametrize(
    ("data", "option", "part"),
    [
        (b"", "--prompt-file", "is empty"),
        (b"", "--prompts-file", "holds no prompt"),
        (b"\n \n", "--prompts-file", "holds no prompt"),
        (b"ab\xff", "--prompt-file", "not UTF-8 text: wrong byte at 2"),
        (b"ab\0", "--prompt-file", "not text: byte 2 is zero"),
        (b"\x7fELF\x02\x01", "--prompts-file", "line 1"),
    ],
)
def test_broken_prompt_file(capfd, tmp_path, config, data: bytes, option: str, part: str) -> None:
    file = write(tmp_path, data)
    assert part in refused(capfd, "generate", "--config", config, option, file)


# --- launch scripts


@pytest.mark.parametrize("verb", ["serve", "generate", "batch"])
def test_launch_script_from_anywhere(tmp_path: Path, verb: str) -> None:
    """From a folder where ds_cp is not found by itself, and with a launcher's flag."""
    script = ROOT / "launch" / f"{verb}.py"
    argv = ["--local_rank=0", "--config", "none.json"]
    argv += {"generate": ["--prompt", "x"], "batch": ["in", "out"]}.get(verb, [])
    done = subprocess.run(
        [sys.executable, str(script), *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "ds_cp: error: cannot read config none.json: No such file or directory\n"
    )
