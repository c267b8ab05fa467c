"""What a scraper gets for its ``Accept`` header."""

from __future__ import annotations

import random
import time

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from ds_cp.api.media_types import MAX_CHARS, Offer, choose
from ds_cp.api.metrics import ServerMetrics
from ds_cp.engine.interface import EngineStats

OFFERS = (Offer("text", "plain", "0.0.4"), Offer("application", "openmetrics-text", "1.0.0"))
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
PLAIN_1 = "text/plain; version=1.0.0; charset=utf-8; escaping=underscores"
OPEN = "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"
# What Prometheus 2.54 and 3.5 send.
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


class Engine:
    state = "ready"

    def stats(self) -> EngineStats:
        return EngineStats(
            kv_blocks_used=(1, 2),
            kv_blocks_total=(4, 4),
            finished={"stop": 1},
            mode_counts={"x": 1},
        )


@pytest.fixture(scope="module")
def metrics() -> ServerMetrics:
    found = ServerMetrics(Engine(), lambda: 'a"\\\n\u20ac')  # type: ignore[arg-type]
    found.first_token(0.1)
    return found


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", PLAIN),
        ("*/*", PLAIN),
        ("text/*", PLAIN),
        ("text/plain", PLAIN),
        ("TEXT/Plain; Version=0.0.4", PLAIN),
        ("text/plain; version=1.0.0", PLAIN_1),
        ('text/plain ; version="1.0.0"', PLAIN_1),
        ("text/plain;version=2", PLAIN),
        (BROWSER, PLAIN),
        (PROMETHEUS_2, OPEN),
        (PROMETHEUS_3, OPEN.replace("underscores", "allow-utf-8")),
        ("application/openmetrics-text", OPEN),
        ("application/openmetrics-text; charset=utf-8", OPEN),
        ("application/*", OPEN),
        ("application/openmetrics-text;escaping=none", OPEN),
        ("application/openmetrics-text; version=0.0.1", PLAIN),
        ("application/openmetrics-text; version=99", PLAIN),
        ("application/openmetrics-text; version=abc", PLAIN),
        ("application/openmetrics-text; version=", OPEN),
        ("application/openmetrics-text;version=99, application/openmetrics-text;q=0.1", OPEN),
        ("application/openmetrics-text;q=0.1, text/plain;q=0.9", PLAIN),
        ("application/openmetrics-text;q=0.9, text/plain;q=0.1", OPEN),
        ("application/openmetrics-text;q=0, */*", PLAIN),
        ("text/plain;q=0, */*;q=0.1", OPEN),
        ("text/plain;q=0, application/json", PLAIN),
        ("*/*;q=0", PLAIN),
        ("application/json", PLAIN),
        ("text/plain;q=2", PLAIN),
        ("text/plain;version=abc", PLAIN),
        (",;=\"', ;;q=,/,*/,text/", PLAIN),
        ('text/plain;version=1.0.0;escaping="x,application/openmetrics-text;version=z"', PLAIN_1),
        ("\xff\xfe", PLAIN),
    ],
)
def test_any_accept_gets_metrics(metrics: ServerMetrics, accept: str, content_type: str) -> None:
    text, kind = metrics.exposition(accept)
    assert kind == content_type
    parse = text_string_to_metric_families
    if kind.startswith("application"):
        parse = openmetrics.text_string_to_metric_families
    names = {family.name for family in parse(text.decode())}
    assert {"ds_cp:kv_blocks", "ds_cp:rank_drained", "ds_cp:rank_draining"} <= names


@pytest.mark.usefixtures("settled_heap")
def test_odd_headers_raise_nothing_and_take_no_time(metrics: ServerMetrics) -> None:
    rng = random.Random(5)
    parts = [
        *("text/", "plain", "*/*", "application/openmetrics-text", ";", ",", "=", "q", "version"),
        *("1.0.0", "0.5", '"', "\\", " ", "\t", "escaping", "dots", "\x00", "\xe9", "99"),
    ]
    for _ in range(300):
        header = "".join(rng.choices(parts, k=rng.randint(0, 30)))
        assert metrics.exposition(header)[1].startswith(("text/plain;", "application/openmetrics"))
    for part in (*parts, '"\\', ";a=", "a/b;", 'a/b;c="', "a/b,", '",', "*/*;q=0."):
        for chars in (MAX_CHARS, 32 * 1024):
            begun = time.process_time()
            choose(part * (chars // len(part)), OFFERS)
            assert time.process_time() - begun < 0.5, part
