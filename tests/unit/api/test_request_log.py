"""The line of an answer that has ended."""

from __future__ import annotations

import json

import pytest

from ds_cp.api.request_log import RequestLog
from ds_cp.outputs import EndedRequest

ENDED = EndedRequest(
    "chatcmpl-ab-0", 1, "client.id-7", "stop", 12, 4, 8, 2, ("ring", "tree"), (0, 2), 0.25, 1.5,
    1.25, 0.7, 0.1, 2.25,
)  # fmt: skip
REFUSED = EndedRequest(
    "cmpl-x-0", 0, "", "abort", 3, 0, 0, 0, (), (), None, None, None, None, None, 0.5
)


def test_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    log = RequestLog(lambda: 'm "x"', as_json=False)
    log(ENDED)
    log(REFUSED)
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        'ds_cp: request chatcmpl-ab-0 (client.id-7) of "m \\"x\\"": 12 (4 cached) + 8 tokens, '
        "queued 0.25 s, ttft 1.5 s, tpot 0.1 s, e2e 2.25 s; ring then tree on ranks 0, 2; stop"
    )
    assert second == (
        'ds_cp: request cmpl-x-0 of "m \\"x\\"": 3 + 0 tokens, e2e 0.5 s; no step on ranks none; '
        "abort"
    )


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    log = RequestLog(lambda: "m", as_json=True)
    log(ENDED)
    log(REFUSED)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("time") > 1e9
    assert first == {
        "level": "info", "event": "request", "id": "chatcmpl-ab-0", "index": 1,
        "request_id": "client.id-7", "model": "m", "prompt_tokens": 12, "cached_tokens": 4,
        "new_tokens": 8, "queue_s": 0.25, "ttft_s": 1.5, "tpot_s": 0.1, "e2e_s": 2.25,
        "modes": ["ring", "tree"], "ranks": [0, 2], "preemptions": 2, "finish_reason": "stop",
    }  # fmt: skip
    assert second["ttft_s"] is None and second["modes"] == []
