"""docs/metrics.md, from what /metrics says of itself."""

from __future__ import annotations

from typing import cast

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.reference.tables import table
from ds_cp.api.metrics import ServerMetrics
from ds_cp.engine.interface import EngineInterface, EngineStats
from ds_cp.journal.stats import JournalStats
from ds_cp.outputs import Delta, EndedRequest
from ds_cp.plan import ATTENTION_SCHEMES

HEAD = """# Metrics

Written from the code by `python -m benchmarks.reference`. `GET /metrics` answers in Prometheus'
text format, or in OpenMetrics' where it is asked for. The suffixes are vLLM's, under `ds_cp:`;
every sample has the label `model_name`. `docs/grafana/ds_cp.json` is a dashboard over them.

`ds_cp:attention_bytes_total` has what all ranks sent in attention, by scheme, twice:
`source="counted"` from the ledgers of the ranks, `source="predicted"` by the formulas of
[formulas.md](formulas.md) (in windowed layers of a ring an upper bound). Where a model is split
by tensor parallelism, both are of the first rank of each group. A rank's own work is
`rank_step_seconds_total - rank_wait_seconds_total`; skew compares the busiest rank's with the
mean. Waits are those for exchanges: the sums and broadcasts of tensor parallelism count as work.
On NCCL a wait is that of the thread that launches, and the device waits on behind it: there a
rank's own work still holds what its device waited for others.
"""


class _SampleEngine:
    """An engine that has something of everything."""

    state = "ready"

    def stats(self) -> EngineStats:
        """One of each."""
        schemes = dict.fromkeys(ATTENTION_SCHEMES, 1)
        return EngineStats(
            kv_blocks_used=(1,), kv_blocks_cached=(1,), kv_blocks_total=(4,),
            host_blocks_used=(1,), host_blocks_total=(4,), host_blocks_failed=(0,),
            finished={"stop": 1}, mode_counts={"local": 1}, comm_bytes={"plan": 1},
            comm_exchanges={"plan": 1}, rank_steps=(1,), rank_seconds=(1.0,), rank_waits=(0.5,),
            attention_bytes=schemes, predicted_bytes=schemes, journal=JournalStats(),
        )  # fmt: skip


def sample_exposition() -> str:
    """The text of /metrics with at least one sample of every family."""
    metrics = ServerMetrics(cast(EngineInterface, _SampleEngine()), lambda: "model")
    metrics.first_token(0.1)
    metrics.next_token(0.1)
    metrics.finished(0.1)
    metrics.ignored_fields(1)
    metrics.answers.ended(Delta("a", finish_reason="stop"), constrained=True)
    metrics.answered("POST", "/v1/completions", 200)
    metrics.ended(EndedRequest(
        "a", 0, "", "stop", 1, 0, 2, 0, ("local",), (0,), 0.1, 0.1, 0.1, 0.1, 0.1, 0.1
    ))  # fmt: skip
    body, _ = metrics.exposition("text/plain")
    return body.decode()


def metrics_page() -> str:
    """The page."""
    rows = []
    for family in text_string_to_metric_families(sample_exposition()):
        if family.name.endswith("_created"):
            continue
        labels = {name for sample in family.samples for name in sample.labels}
        name = family.name + ("_total" if family.type == "counter" else "")
        shown = ", ".join(f"`{label}`" for label in sorted(labels - {"model_name", "le"}))
        rows.append((f"`{name}`", family.type, shown, family.documentation))
    head = table(("metric", "type", "labels", "meaning"), sorted(rows))
    return HEAD + "\n" + "\n".join(head) + "\n"
