"""The config: what is accepted, what every mistake is answered with, and the published schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ds_cp.cli.job import check_min_ranks
from ds_cp.config import Server, config_schema, explain, is_loopback, load_config, looks_like_path
from ds_cp.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SCHEMA = CONFIGS / "ds_cp.schema.json"
FILES = sorted(path for path in CONFIGS.glob("*.json") if path != SCHEMA)

# The keys of the contract and of this test alone: a key added or renamed has to be added here.
DEFAULTS = {
    "dtype": "auto",
    "device": "auto",
    "max_model_len": "auto",
    "threads_per_rank": "auto",
    "linear_layers": "auto",
    "context_parallel.size": "auto",
    "context_parallel.mode": "auto",
    "context_parallel.ring_pass": "auto",
    "context_parallel.layout": "zigzag",
    "context_parallel.local_threshold": "auto",
    "tensor_parallel.tp_size": 1,
    "kv_cache.block_size": 64,
    "kv_cache.memory_per_rank": "auto",
    "kv_cache.tokens_per_rank": "auto",
    "kv_cache.placement": "fill_then_spill",
    "kv_cache.prefix_caching": True,
    "kv_cache.host_memory_per_rank": 0,
    "kv_cache.host_folder": None,
    "scheduler.max_num_seqs": 64,
    "scheduler.max_num_batched_tokens": "auto",
    "scheduler.decode_slowdown": 2.0,
    "scheduler.max_queue": 256,
    "scheduler.max_queue_wait_s": 600.0,
    "attention.backend": "auto",
    "attention.deterministic": False,
    "comm.backend": "auto",
    "comm.port": "auto",
    "comm.secret_file": None,
    "comm.shared_memory": True,
    "comm.timeout_s": 300,
    "comm.interface": "auto",
    "comm.hosts": "auto",
    "server.host": "127.0.0.1",
    "server.port": 8000,
    "server.api_key": None,
    "server.allowed_hosts": (),
    "server.cors_origins": (),
    "server.served_model_name": None,
    "server.unknown_fields": "warn",
    "server.log_format": "text",
    "server.tool_parser": "auto",
    "server.reasoning_parser": "auto",
    "server.chat_template_kwargs": {},
    "server.max_body_bytes": 8 * 1024 * 1024,
    "server.max_connections": "auto",
    "server.max_buffered_bytes": "auto",
    "server.max_stored_responses": 1000,
    "server.max_stored_response_bytes": 256 * 1024 * 1024,
    "server.drain_timeout_s": 25,
    "server.stall_s": 60,
    "server.header_timeout_s": 10,
    "server.body_timeout_s": 10,
    "server.write_timeout_s": 60,
    "server.tokenize_timeout_s": 30,
    "server.keep_alive_s": 5,
    "fault_tolerance.max_restarts": 3,
    "fault_tolerance.min_ranks": None,
    "fault_tolerance.hang_s": 30,
    "fault_tolerance.host_timeout_s": 1.2,
    "fault_tolerance.spare_after_s": None,
    "fault_tolerance.spare_model": False,
    "fault_tolerance.journal_dir": None,
    "fault_tolerance.journal_max_bytes": 1 << 30,
    "trace.file": None,
    "trace.max_events": 100_000,
}


def nested(path: str, value: Any) -> dict[str, Any]:
    """``{"model": "m", "a": {"b": value}}`` for the path ``a.b``."""
    section, _, key = path.rpartition(".")
    return {"model": "m", section: {key: value}} if section else {"model": "m"} | {key: value}


def at(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = getattr(config, key)
    return config


def refusal(source: Any, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    return message


# --- what is accepted


def test_defaults_are_the_contract() -> None:
    config = load_config({"model": "m"})
    assert {path: at(config, path) for path in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shipped_config_loads_and_meets_the_schema(path: Path) -> None:
    raw = json.loads(path.read_text())
    load_config(path)
    jsonschema.validate(raw, json.loads(SCHEMA.read_text()))
    assert raw["$schema"] == "./ds_cp.schema.json"


def test_quickstart_is_four_times_one_rank() -> None:
    config = load_config(CONFIGS / "quickstart.json")
    assert config.model.endswith(".cache/smollm2-135m-instruct")
    assert config.kv_cache.tokens_per_rank == 2048
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8000)


def test_shipped_schema_is_the_current_one() -> None:
    assert json.loads(SCHEMA.read_text()) == config_schema(), "make it: ds-cp config schema"


def test_schema_is_valid_and_describes_every_key() -> None:
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert field.get("description"), name


def test_config_is_frozen() -> None:
    config = load_config({"model": "m"})
    for part, key in ((config, "model"), (config.kv_cache, "block_size")):
        with pytest.raises(ValidationError):
            setattr(part, key, 1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("auto", "auto"),
        ("512MiB", 536870912),
        ("2GiB", 2147483648),
        ("1.5GB", 1500000000),
        ("64 kB", 64000),
        ("1B", 1),
        (12345, 12345),
        (["1MiB", 7, "2kB"], (1048576, 7, 2000)),
    ],
)
def test_memory_per_rank(value: Any, expected: Any) -> None:
    got = load_config(nested("kv_cache.memory_per_rank", value)).kv_cache.memory_per_rank
    assert got == expected


def test_tokens_per_rank_one_per_rank() -> None:
    config = load_config(nested("kv_cache.tokens_per_rank", [64, 4096]))
    assert config.kv_cache.tokens_per_rank == (64, 4096)


@pytest.mark.parametrize(("given_", "keys"), [(None, ()), ("k", ("k",)), (["a", "b"], ("a", "b"))])
def test_api_keys(given_: Any, keys: tuple[str, ...]) -> None:
    assert load_config(nested("server.api_key", given_)).server.api_keys == keys


def test_keys_are_not_shown() -> None:
    assert "hush" not in repr(Server(api_key=("hush",)))


def test_overrides_replace_and_are_checked() -> None:
    raw = {"model": "m", "server": {"port": 1, "drain_timeout_s": 2}}
    config = load_config(raw, {"server.port": 0, "model": "other/name", "dtype": "bf16"})
    assert (config.server.port, config.server.drain_timeout_s) == (0, 2)
    assert (config.model, config.dtype) == ("other/name", "bf16")
    assert raw == {"model": "m", "server": {"port": 1, "drain_timeout_s": 2}}
    assert "server.port is -1" in refusal(raw, {"server.port": -1})


# --- model paths


def test_model_path_working_directory_first(tmp_path: Path, monkeypatch) -> None:
    cwd, folder = tmp_path / "cwd", tmp_path / "configs"
    for place in (cwd / "both", folder / "both", folder / "beside"):
        place.mkdir(parents=True)
    monkeypatch.chdir(cwd)
    file = folder / "c.json"
    found = {}
    for name in ("both", "beside", "org/model", "./missing"):
        file.write_text(json.dumps({"model": name}))
        found[name] = load_config(file).model
    assert found == {
        "both": str(cwd / "both"),
        "beside": str(folder / "beside"),
        "org/model": "org/model",
        "./missing": "./missing",
    }


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("gpt2", False),
        ("Qwen/Qwen3-8B", False),
        ("./x", True),
        ("/x/y", True),
        (".cache/x", True),
        ("a/b/c", True),
        ("dir/m.gguf", True),
        ("~/m", True),
    ],
)
def test_looks_like_path(model: str, expected: bool) -> None:
    assert looks_like_path(model) is expected


# --- what is refused


@pytest.mark.parametrize(
    ("raw", "path", "near"),
    [
        ({"modle": "m"}, "modle", "model"),
        ({"model": "m", "kv_cache": {"blocksize": 1}}, "kv_cache.blocksize", "kv_cache.block_size"),
        ({"model": "m", "block_size": 1}, "block_size", "kv_cache.block_size"),
        ({"model": "m", "server": {"mode": 1}}, "server.mode", "context_parallel.mode"),
        ({"model": "m", "tp_size": 2}, "tp_size", "tensor_parallel.tp_size"),
        ({"model": "m", "comm": {"timeout": 9}}, "comm.timeout", "comm.timeout_s"),
        ({"model": "m", "schema_": "x"}, "schema_", "$schema"),
        ({"model": "m", "Dtype": "fp32"}, "Dtype", "dtype"),
    ],
)
def test_unknown_key_names_itself_and_the_nearest(raw: Any, path: str, near: str) -> None:
    assert refusal(raw).endswith(f"unknown key {path}; the nearest valid one is {near}")


def test_keys_of_later_are_not_accepted_yet() -> None:
    assert "unknown key kv_cache.dtype" in refusal(nested("kv_cache.dtype", "fp8"))
    assert '"flex"; it must be "auto", "cpu", "cuda"' in refusal(
        nested("attention.backend", "flex")
    )
    for backend in ("cuda", "flash_attn"):
        both = {"attention": {"backend": backend, "deterministic": True}}
        assert "set attention.backend to triton or to auto" in refusal({"model": "m", **both})
    both = {"attention": {"backend": "sdpa", "deterministic": True}}
    text = refusal({"model": "m", "device": "cuda", **both})
    assert "set attention.backend to triton or to auto" in text
    assert load_config({"model": "m", "device": "cpu", **both}).attention.deterministic


def test_ranks_that_may_go() -> None:
    assert load_config({"model": "m", "fault_tolerance": {"min_ranks": 2}})
    for section, why in (
        ({"fault_tolerance": {"min_ranks": 2, "max_restarts": 0}}, "max_restarts 0"),
        ({"fault_tolerance": {"min_ranks": 2}, "tensor_parallel": {"tp_size": 2}}, "tp_size 2"),
    ):
        said = refusal({"model": "m", **section})
        assert f"fault_tolerance.min_ranks is 2, but with {why} the first loss ends the job" in said


def test_more_ranks_than_there_are() -> None:
    config = load_config({"model": "m", "fault_tolerance": {"min_ranks": 5}})
    with pytest.raises(ConfigError, match="min_ranks is 5, but the job has 4 ranks"):
        check_min_ranks(config, 4)
    check_min_ranks(config, 5)


BOUNDS = {
    "max_model_len": (1, None),
    "threads_per_rank": (1, 1024),
    "context_parallel.size": (1, 1024),
    "context_parallel.local_threshold": (0, None),
    "tensor_parallel.tp_size": (1, 64),
    "kv_cache.block_size": (1, 4096),
    "scheduler.max_num_seqs": (1, 4096),
    "scheduler.max_num_batched_tokens": (2, None),
    "scheduler.max_queue": (1, None),
    "server.port": (0, 65535),
    "comm.timeout_s": (5, 86400),
    "server.drain_timeout_s": (0, 3600),
    "server.header_timeout_s": (0.1, 3600),
    "server.stall_s": (0.1, 3600),
    "server.body_timeout_s": (0.1, 3600),
    "server.write_timeout_s": (0.1, 3600),
    "server.tokenize_timeout_s": (0.1, 3600),
    "server.keep_alive_s": (0.1, 3600),
    "server.max_body_bytes": (1024, 1 << 30),
    "server.max_connections": (1, 65536),
    "server.max_buffered_bytes": (16 << 20, None),
}


@pytest.mark.parametrize("path", BOUNDS)
def test_bounds_of_numbers(path: str) -> None:
    low, high = BOUNDS[path]
    assert at(load_config(nested(path, low)), path) == low
    wrong: list[Any] = [low - 1, 10**30, True, "7", None, [], {}, float("nan"), float("inf")]
    if high is not None:
        assert at(load_config(nested(path, high)), path) == high
        wrong.append(high + 1)
    if not path.endswith("_s"):
        wrong.append(low + 0.5)
    for value in wrong:
        message = refusal(nested(path, value))
        assert re.search(rf"{re.escape(path)} is .*; it must be .* from {low} to \d+", message)


def test_bounds_of_the_slowdown() -> None:
    path = "scheduler.decode_slowdown"
    for good in (1.001, 1.5, 3, 1000):
        assert at(load_config(nested(path, good)), path) == good
    for bad in (1, 1.0, 0.5, -2, 1000.1, True, "2", None, [], {}, float("nan"), float("inf")):
        message = refusal(nested(path, bad))
        assert f"{path} is " in message, message
        assert message.endswith("; it must be a number above 1.0, at most 1000.0 (times)")


@pytest.mark.parametrize("bad", ["true", "auto", 1, 0, None, [], {}])
@pytest.mark.parametrize("path", ["kv_cache.prefix_caching", "comm.shared_memory"])
def test_a_switch_is_true_or_false(path: str, bad: Any) -> None:
    assert at(load_config(nested(path, False)), path) is False
    said = refusal(nested(path, bad))
    assert said == f"the config: {path} is {json.dumps(bad)}; it must be true or false"


@pytest.mark.parametrize(
    "path",
    [
        "dtype",
        "context_parallel.mode",
        "context_parallel.ring_pass",
        "context_parallel.layout",
        "kv_cache.placement",
        "attention.backend",
        "comm.backend",
        "comm.hosts",
        "device",
    ],
)
def test_wrong_choice_lists_the_choices(path: str) -> None:
    for value in ("rign", 1, None, ["auto"]):
        message = refusal(nested(path, value))
        assert f"{path} is {json.dumps(value)}; it must be " in message
        assert json.dumps(DEFAULTS[path]) in message


@pytest.mark.parametrize(
    ("path", "name", "near"),
    [("server.tool_parser", "hermes", "hermez"), ("server.reasoning_parser", "think", "thinks")],
)
def test_a_parser_is_one_that_there_is(path: str, name: str, near: str) -> None:
    for value in (name, "auto", "none"):
        assert at(load_config(nested(path, value)), path) == value
    message = refusal(nested(path, near))
    assert f'{path}: no parser is called "{near}"; did you mean "{name}"?' in message
    assert path in refusal(nested(path, 5)) and path in refusal(nested(path, None))


def test_values_of_the_chat_template() -> None:
    path = "server.chat_template_kwargs"
    given = {"enable_thinking": False, "effort": "low", "budget": 5, "share": 0.5}
    assert at(load_config(nested(path, given)), path) == given
    for bad in ([], "x", 1, {"": 1}, {"a": None}, {"a": [1]}, {str(i): 1 for i in range(65)}):
        assert path in refusal(nested(path, bad))


@pytest.mark.parametrize(
    "value", ["12XB", "512", "", "-1MiB", "1.5B", "0MiB", 0, -5, True, 1.5, [], ["1MiB", 0], None]
)
def test_wrong_memory(value: Any) -> None:
    message = refusal(nested("kv_cache.memory_per_rank", value))
    assert "kv_cache.memory_per_rank is " in message and "512MiB" in message


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({}, ["model is missing"]),
        ({"model": ""}, ['model is ""', "1 to 4096 characters"]),
        ({"model": "m", "kv_cache": 3}, ["kv_cache is 3; it must be an object"]),
        (
            nested("kv_cache.memory_per_rank", "1MiB")
            | {"kv_cache": {"memory_per_rank": "1MiB", "tokens_per_rank": 64}},
            ["memory_per_rank", "tokens_per_rank", "both set"],
        ),
        (
            {"model": "m", "kv_cache": {"tokens_per_rank": [64, 63]}},
            ["tokens_per_rank is 63", "block of 64"],
        ),
        (
            {
                "model": "m",
                "context_parallel": {"size": 3},
                "kv_cache": {"tokens_per_rank": [64, 64]},
            },
            ["lists 2 ranks", "size is 3"],
        ),
        (nested("server.host", "0.0.0.0"), ["server.host", "0.0.0.0", "server.api_key is not set"]),
        (nested("server.host", "::"), ["server.api_key is not set"]),
        (nested("server.host", ""), ['server.host is ""']),
        ({"model": "m", 7: 1}, ["a key is not text"]),
    ],
)
def test_other_mistakes(raw: Any, parts: list[str]) -> None:
    message = refusal(raw)
    assert all(part in message for part in parts), message


def test_open_host_with_a_key_is_fine() -> None:
    raw = {"model": "m", "server": {"host": "0.0.0.0", "api_key": "k"}}
    assert load_config(raw).server.host == "0.0.0.0"


@pytest.mark.parametrize("value", ["two words", "naïve-secret", 5, [], ["good-secret", ""]])
def test_api_key_is_never_shown(value: Any) -> None:
    message = refusal(nested("server.api_key", value))
    assert "server.api_key" in message
    assert "secret" not in message and "words" not in message


def test_api_key_is_not_in_repr_or_explain() -> None:
    config = load_config(nested("server.api_key", "s3cret"))
    assert "s3cret" not in repr(config) + str(config) + "\n".join(explain(config))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# --- files


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"{", ["not valid JSON at line 1, column 2"]),
        (b'{"model": "m",\n  "dtype": }', ["line 2, column 12"]),
        (b"", ["not valid JSON at line 1, column 1"]),
        (b"[1]", ["must hold a JSON object, not [1]"]),
        (b'{"model": "m", "model": "n"}', ['key "model" is given twice']),
        (b'{"model": "m", "comm": {"a": 1, "a": 2}}', ['key "a" is given twice']),
        (b'{"model": NaN}', ["NaN is not a JSON number"]),
        (b'{"model": "\xff"}', ["not UTF-8 text (byte 11)"]),
        (b"[" * 100_000, ["nested too deeply"]),
        (b'{"max_model_len": ' + b"1" * 5000 + b"}", ["config"]),
        (b" " * (1 << 20) + b"{}", ["larger than 1048576 bytes"]),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_broken_file(tmp_path: Path, data: bytes, parts: list[str]) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(data)
    message = refusal(file)
    assert str(file) in message
    assert all(part in message for part in parts), message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.json")
    assert "directory" in refusal(tmp_path).lower()


def test_byte_order_mark_is_fine(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"model": "m"}', encoding="utf-8-sig")
    assert load_config(file).model == "m"


# --- explain, and any value


def test_explain_lists_every_key_once_and_marks_changes() -> None:
    lines = explain(load_config(nested("kv_cache.block_size", 16)))
    keys = [line[2:].split(" = ")[0] for line in lines]
    assert sorted(keys) == sorted(["model", *DEFAULTS])
    changed = [key for key, line in zip(keys, lines, strict=True) if line.startswith("*")]
    assert changed == ["model", "kv_cache.block_size"]
    assert any("kv_cache.block_size = 16 tokens  # " in line for line in lines)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from([*DEFAULTS, "model", *{path.split(".")[0] for path in DEFAULTS}]), json_values
)
def test_any_value_is_accepted_or_refused_in_one_line(path: str, value: Any) -> None:
    try:
        load_config(nested(path, value))
    except ConfigError as err:
        assert "\n" not in str(err) and str(err).isprintable()
