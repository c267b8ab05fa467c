"""Models, health, metrics, version, tokenize, and what the package imports."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from ds_cp.engine.interface import EngineHealth, EngineStats
from tests.helpers.fake_engine import FakeEngine
from tests.server.conftest import Running, error_of


def test_models(served: Running) -> None:
    client = served.client()
    models = client.models.list().data
    assert [model.id for model in models] == ["fake-model"]
    one = client.models.retrieve("fake-model").model_dump()
    assert one["max_model_len"] == 128 and one["created"] == 1_700_000_000


def test_served_name_with_slashes(launch: Any) -> None:
    server = launch(served_model_name="org/small")
    client = server.client()
    assert client.models.list().data[0].id == "org/small"
    assert server.get("/v1/models/org/small").json()["id"] == "org/small"
    assert client.completions.create(model="org/small", prompt=[5]).model == "org/small"
    assert server.post("/v1/completions", {"prompt": [5], "model": "fake-model"}).status_code == 404


def test_several_names_of_one_model(launch: Any) -> None:
    server = launch(served_model_name=("big", "org/alias"))
    assert [model.id for model in server.client().models.list()] == ["big", "org/alias"]
    for name in ("big", "org/alias"):
        card = server.get(f"/v1/models/{name}").json()
        assert (card["id"], card["max_model_len"], card["root"]) == (name, 128, "fake-model")
        body = {"model": name, "prompt": [5], "max_tokens": 1}
        assert server.post("/v1/completions", body).json()["model"] == name
        chat = {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        assert server.post("/v1/chat/completions", chat).json()["model"] == name
        stream = server.post("/v1/chat/completions", chat | {"stream": True}).text
        assert f'"model": "{name}"' in stream
    assert server.post("/v1/completions", {"prompt": [5], "max_tokens": 1}).json()["model"] == "big"
    error = error_of(server.post("/v1/completions", {"prompt": [5], "model": "fake-model"}), 404)
    assert error["code"] == "model_not_found" and "'big', 'org/alias'" in error["message"]


def test_load_and_facts(served: Running) -> None:
    served.engine.snapshot = EngineStats(
        num_requests_running=3,
        num_requests_waiting=2,
        kv_blocks_used=(6, 2),
        kv_blocks_total=(8, 24),
    )
    assert served.get("/load").json() == {
        "server_load": 5,
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.25,
    }
    facts = served.get("/server_info").json()
    assert facts["served_model_names"] == ["fake-model"] and facts["ranks"] == 2
    assert facts["max_model_len"] == 128 and facts["largest_request_tokens"] == 512


def test_health_and_ready_need_no_key(launch: Any) -> None:
    server = launch(api_key=("k" * 20,))
    for path in ("/health", "/ready"):
        assert server.get(path).json() == {"status": "ready"}
    for path in ("/load", "/server_info", "/v1/models"):
        assert server.get(path).status_code == 401
        for header in ({"Authorization": "Bearer " + "k" * 20}, {"x-api-key": "k" * 20}):
            assert server.get(path, headers=header).status_code == 200
        wrong = {"x-api-key": "wrong", "Authorization": "Bearer wrong"}
        assert server.get(path, headers=wrong).status_code == 401
        mixed = {"x-api-key": "wrong", "Authorization": "Bearer " + "k" * 20}
        assert server.get(path, headers=mixed).status_code == 200


class Starting:
    """An engine before its first answer: nothing but its state may be asked for, and who is to
    hear of requests."""

    state = "starting"
    health = EngineHealth("starting")

    def on_ended(self, listener: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of a starting engine was read")


def test_starting_then_ready_then_dead(launch: Any, tokenizer: Any) -> None:
    server = launch(Starting())
    reply = server.get("/health")
    assert reply.status_code == 503 and reply.json() == {"status": "starting"}
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", chat),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        reply = server.post(path, body)
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "engine_starting"
        assert reply.headers["retry-after"]
    for path in ("/ranks/0/drain", "/ranks/0/reopen", "/rebalance", "/reset_prefix_cache"):
        assert server.post(path).json()["error"]["code"] == "engine_starting"
    for path in ("/v1/models", "/ready", "/load", "/server_info"):
        assert server.get(path).status_code == 503
    assert server.get("/v1/models/x").status_code == 503
    for path in ("/metrics", "/version", "/openapi.json"):
        assert server.get(path).status_code == 200

    server = launch(FakeEngine(tokenizer))
    assert server.get("/health").json() == {"status": "ready"}
    server.engine.state = "stalled"  # what comes waits: the step may end
    reply = server.get("/health")
    assert reply.status_code == 503 and reply.json() == {"status": "stalled"}
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status_code == 200
    server.engine.state = "stopping"
    reply = server.get("/health")
    assert reply.status_code == 503 and reply.json() == {"status": "stopping"}
    reply = server.post("/v1/completions", {"prompt": "x"})
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "shutting_down"
    server.engine.state = "dead"
    reply = server.get("/health")
    assert reply.status_code == 503 and reply.json() == {"status": "dead"}
    reply = server.post("/v1/completions", {"prompt": "x"})
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "engine_dead"
    assert server.get("/metrics").status_code == 200


def samples_of(server: Running) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    reply = server.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def test_metrics(served: Running) -> None:
    served.engine.snapshot = EngineStats(
        num_requests_running=3,
        num_requests_waiting=2,
        kv_blocks_used=(6, 2),
        kv_blocks_cached=(1, 5),
        ranks_drained=(1,),
        prefix_cache_queries=70,
        prefix_cache_hits=64,
        blocks_moved=11,
        kv_blocks_total=(8, 24),
        prompt_tokens=100,
        generation_tokens=50,
        num_preemptions=1,
        steps=9,
        step_seconds=1.5,
        step_age_seconds=0.25,
        finished={"stop": 4, "length": 5},
        mode_counts={"local": 7, "ring": 2},
        comm_bytes={"ring_kv": 4096},
        comm_exchanges={"ring_kv": 12},
    )
    served.engine.delay_s = 0.02
    begun = time.monotonic()
    for stream in (False, True):
        served.post("/v1/completions", {"prompt": [5], "max_tokens": 4, "stream": stream})
    took = time.monotonic() - begun
    got = samples_of(served)

    def value(name: str, **labels: str) -> float:
        return got[f"ds_cp:{name}", tuple(sorted({"model_name": "fake-model", **labels}.items()))]

    assert value("num_requests_running") == 3
    assert value("num_requests_waiting") == 2
    assert value("kv_cache_usage_perc") == 0.25
    assert value("kv_blocks", rank="0", state="used") == 6
    assert value("kv_blocks", rank="1", state="cached") == 5
    assert value("kv_blocks", rank="1", state="free") == 17
    assert value("rank_drained", rank="0") == 0 and value("rank_drained", rank="1") == 1
    assert value("prefix_cache_queries_total") == 70
    assert value("prefix_cache_hits_total") == 64
    assert value("blocks_moved_total") == 11
    assert value("prompt_tokens_total") == 100
    assert value("generation_tokens_total") == 50
    assert value("num_preemptions_total") == 1
    assert value("engine_steps_total") == 9
    assert value("engine_step_seconds_total") == 1.5
    assert value("engine_step_age_seconds") == 0.25
    assert value("request_success_total", finished_reason="length") == 5
    assert value("mode_counts_total", mode="ring") == 2
    assert value("comm_bytes_total", scheme="ring_kv") == 4096
    assert value("comm_exchanges_total", scheme="ring_kv") == 12
    assert value("time_to_first_token_seconds_count") == 2
    assert value("inter_token_latency_seconds_count") == 6
    assert value("e2e_request_latency_seconds_count") == 2
    ttft = value("time_to_first_token_seconds_sum")
    itl = value("inter_token_latency_seconds_sum")
    e2e = value("e2e_request_latency_seconds_sum")
    assert ttft >= 2 * 0.02 and itl >= 6 * 0.02
    assert ttft + itl <= e2e + 0.001 and e2e <= took
    assert value("e2e_request_latency_seconds_bucket", le="+Inf") == 2


def test_latencies_of_several_answers(served: Running) -> None:
    """One first token and one end per engine request, gaps within each answer."""
    served.engine.delay_s = 0.03
    served.engine.short = {1: 2}
    body = {"prompt": [[5], [6]], "n": 3, "max_tokens": 4}
    assert served.post("/v1/completions", body).status_code == 200
    got = samples_of(served)

    def value(name: str) -> float:
        return got[f"ds_cp:{name}", (("model_name", "fake-model"),)]

    assert value("time_to_first_token_seconds_count") == 2
    assert value("e2e_request_latency_seconds_count") == 2
    assert value("inter_token_latency_seconds_count") == 2 * (3 + 1 + 3)
    assert value("inter_token_latency_seconds_sum") >= 14 * 0.03
    ends = value("e2e_request_latency_seconds_sum")
    first, gaps = (
        value(f"{name}_seconds_sum") for name in ("time_to_first_token", "inter_token_latency")
    )
    assert 2 * 4 * 0.03 <= ends < first + gaps  # of the longest answer alone, not of all
    served.engine.end = "abort"
    served.post("/v1/completions", body)
    got = samples_of(served)
    assert value("e2e_request_latency_seconds_count") == 2


def test_two_apps_do_not_share_metrics(launch: Any) -> None:
    first, second = launch(), launch()
    first.post("/v1/completions", {"prompt": [5]})
    key = ("ds_cp:e2e_request_latency_seconds_count", (("model_name", "fake-model"),))
    assert samples_of(first)[key] == 1
    assert key not in samples_of(second)


def test_tokenize_and_back(served: Running, tokenizer: Any) -> None:
    text = "the quick \u20ac fox<|end|>"
    reply = served.post("/tokenize", {"prompt": text}).json()
    assert reply["tokens"] == tokenizer(text)["input_ids"]
    assert reply["count"] == len(reply["tokens"]) and reply["max_model_len"] == 128
    back = served.post("/detokenize", {"tokens": reply["tokens"]}).json()
    assert back == {"prompt": text}
    chat = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}
    reply = served.post("/tokenize", chat).json()
    assert tokenizer.decode(reply["tokens"]) == "<|user|>hi<|end|>"


def test_version_and_openapi(served: Running) -> None:
    assert served.get("/version").json()["version"]
    schema = served.get("/openapi.json").json()
    body = schema["components"]["schemas"]["CompletionRequest"]
    assert "prompt" in body["required"] and body["additionalProperties"] is False
    assert {"type": "string"} in body["properties"]["prompt"]["anyOf"]
    paths = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}
    assert paths | {"/tokenize", "/detokenize", "/version", "/rebalance"} <= set(schema["paths"])
    responses = schema["paths"]["/v1/completions"]["post"]["responses"]
    assert "422" not in responses and "4XX" in responses


def test_serving_does_not_import_torch() -> None:
    code = (
        "import pkgutil, importlib, sys, ds_cp.api\n"
        "for m in pkgutil.iter_modules(ds_cp.api.__path__, 'ds_cp.api.'):\n"
        "    importlib.import_module(m.name)\n"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'mpi4py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
