"""/metrics over real sockets: what ended requests tell, ranks and bytes; and the dashboard against
it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from ds_cp.api.request_log import json_of
from ds_cp.engine.interface import EngineStats
from ds_cp.journal.stats import JournalStats
from ds_cp.outputs import EndedRequest
from ds_cp.plan import ATTENTION_SCHEMES
from tests.server.conftest import Running
from tests.unit.test_reference_pages import expression_problems, expressions, samples

SNAPSHOT = EngineStats(
    kv_blocks_used=(6, 2),
    kv_blocks_cached=(1, 5),
    kv_blocks_total=(8, 24),
    prefill_tokens=80,
    finished={"stop": 4},
    mode_counts={"local": 7, "ring": 2},
    comm_bytes={"plan": 4096},
    comm_exchanges={"plan": 12},
    rank_steps=(9, 4),
    rank_seconds=(1.5, 1.25),
    rank_waits=(0.5, 0.125),
    skew_seconds=0.75,
    skew=1.5,
    attention_bytes=dict.fromkeys(ATTENTION_SCHEMES, 640),
    predicted_bytes=dict.fromkeys(ATTENTION_SCHEMES, 600),
    grammar_requests=3,
    grammar_failures=1,
)


def values(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model_name"))):
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }  # fmt: skip


def test_ended_requests_ranks_and_bytes(served: Running) -> None:
    served.engine.snapshot = SNAPSHOT
    body = {"prompt": [[5, 6, 7], [6]], "n": 2, "max_tokens": 4}
    assert served.post("/v1/completions", body).status_code == 200
    served.engine.end = "abort"
    served.post("/v1/completions", {"prompt": [5], "max_tokens": 1})
    got = values(served.get("/metrics").text)

    def value(name: str, **labels: str) -> float:
        return got[f"ds_cp:{name}", tuple(sorted(labels.items()))]

    for name in ("queue_time", "prefill_time", "decode_time", "time_per_output_token"):
        assert value(f"request_{name}_seconds_count") == 4, name
        assert value(f"request_{name}_seconds_sum") == 2.0, name
    assert value("request_inference_time_seconds_sum") == 4.0
    assert value("request_prompt_tokens_sum") == 2 * (3 + 1)
    assert value("request_generation_tokens_sum") == 16
    assert value("request_generation_tokens_bucket", le="2.0") == 0
    assert value("request_generation_tokens_bucket", le="5.0") == 4
    assert value("rank_steps_total", rank="1") == 4
    assert value("rank_step_seconds_total", rank="0") == 1.5
    assert value("rank_wait_seconds_total", rank="1") == 0.125
    assert value("engine_step_skew_seconds_total") == 0.75
    assert value("engine_step_skew_ratio") == 1.5
    assert value("attention_bytes_total", scheme="tree_q", source="counted") == 640
    assert value("attention_bytes_total", scheme="ship_kv", source="predicted") == 600
    assert value("grammar_requests_total") == 3 and value("grammar_failures_total") == 1
    assert value("prefill_tokens_total") == 80


def test_the_dashboard_finds_all_it_asks_for(served: Running) -> None:
    """Right from the first answer on; of host memory and a journal, where there are any."""
    served.engine.snapshot = replace(
        SNAPSHOT,
        host_blocks_used=(1, 0), host_blocks_total=(4, 4), host_blocks_failed=(0, 0),
        journal=JournalStats(),
    )  # fmt: skip
    served.post("/v1/completions", {"prompt": [5], "max_tokens": 3})
    exposed = samples(served.get("/metrics").text)
    problems = {
        expr: wrong for _, expr, _ in expressions() if (wrong := expression_problems(expr, exposed))
    }
    assert problems == {}


def test_an_ended_request_has_the_id_of_its_http_request(served: Running) -> None:
    ended: list[EndedRequest] = []
    served.engine.on_ended(ended.append)
    secret = "a prompt that no log may have"
    for path, body in (
        ("/v1/completions", {"prompt": secret}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": secret}]}),
    ):
        body |= {"max_tokens": 2}
        reply = served.post(path, body, headers={"X-Request-Id": "client.7"})
        answer: Any = reply.json()
        assert ended[-1].http_id == reply.headers["x-request-id"] == "client.7"
        assert ended[-1].request_id.startswith(answer["id"])
        line = json_of(ended[-1], answer["model"])
        assert line["model"] == "fake-model"
        assert secret not in str(line) and answer["choices"][0].get("text", "\0") not in str(line)
