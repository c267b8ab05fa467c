"""The journal's numbers as metric families; none where there is no journal."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ds_cp.journal.stats import JournalStats


def journal_families(stats: JournalStats | None, name: str) -> Iterable[Metric]:
    """The families of one scrape, of the model with this name."""
    if stats is None:
        return
    counters: tuple[tuple[str, str, float], ...] = (
        ("journal_records", "Records written to the journal.", stats.records),
        ("journal_bytes", "Bytes written to the journal, rewrites apart.", stats.bytes),
        ("journal_syncs", "Times that the journal was synced to its disk.", stats.syncs),
        (
            "journal_sync_seconds",
            "Seconds in which the journal's thread wrote and synced.",
            stats.sync_seconds,
        ),
        (
            "journal_lost_records",
            "Records that were not written, for want of room or by a disk that failed: what they "
            "are about will not be resumed.",
            stats.lost,
        ),
        (
            "journal_resumed_requests",
            "Requests of the engine that went on after a restart.",
            stats.resumed,
        ),
    )
    for key, text, value in counters:
        counter = CounterMetricFamily(f"ds_cp:{key}", text, labels=("model_name",))
        counter.add_metric((name,), value)
        yield counter
    gauges: tuple[tuple[str, str, float], ...] = (
        ("journal_size_bytes", "Bytes of the journal's file.", stats.size),
        ("journal_working", "1 while the journal is written, 0 after its disk failed.",
         stats.working),
    )  # fmt: skip
    for key, text, value in gauges:
        gauge = GaugeMetricFamily(f"ds_cp:{key}", text, labels=("model_name",))
        gauge.add_metric((name,), value)
        yield gauge
