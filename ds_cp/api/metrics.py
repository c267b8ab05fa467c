"""The metrics of /metrics: vLLM's suffixes under ``ds_cp:``, so that its dashboards can be used."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from ds_cp.api.answer_metrics import AnswerMetrics
from ds_cp.api.journal_metrics import journal_families
from ds_cp.api.media_types import Offer, choose
from ds_cp.engine.interface import EngineInterface, EngineStats
from ds_cp.outputs import EndedRequest

# Bucket bounds in seconds; the upper ones are for prompts that take many minutes.
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TTFT_BUCKETS = (*_TTFT, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_ITL_BUCKETS = (*_ITL, 20.0, 40.0, 80.0)
_E2E = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0)
_E2E_BUCKETS = (*_E2E, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_TPOT_BUCKETS = _ITL_BUCKETS
# Bucket bounds in tokens.
_TOKENS = tuple(float(step * 10**power) for power in range(7) for step in (1, 2, 5))

# The formats that can be sent, the one for everybody first, with what prometheus_client calls them.
_FORMATS = {
    Offer("text", "plain", "0.0.4"): "",
    Offer("application", "openmetrics-text", "1.0.0"): "application/openmetrics-text;version=1.0.0",
    Offer("text", "plain", "1.0.0"): "text/plain;version=1.0.0",
}

# Ways to write names that older parsers do not take; ours are the same in each.
_ESCAPINGS = ("allow-utf-8", "underscores", "dots", "values")


Answers = Counts[tuple[str, str, int]]  # HTTP answers by method, route and status


class ServerMetrics:
    """One registry per application: the engine's numbers, read at scrape time, and the latencies
    that the routes observe.

    ``model_name`` is called at each scrape and observation, because the name may come from an
    engine that is still starting.
    """

    def __init__(self, engine: EngineInterface, model_name: Callable[[], str]) -> None:
        self._name = model_name
        self._registry = CollectorRegistry()
        self._answers: Answers = Counts()  # they begin before there is an engine that has a name
        self._registry.register(EngineCollector(engine, model_name, self._answers))
        self.answers = AnswerMetrics(self._registry, model_name)
        self._ttft = self._histogram(
            "time_to_first_token",
            "From the arrival of a request to its first token.",
            _TTFT_BUCKETS,
        )
        self._itl = self._histogram(
            "inter_token_latency",
            "Between the tokens of one answer.",
            _ITL_BUCKETS,
        )
        self._e2e = self._histogram(
            "e2e_request_latency", "From the arrival of a request to its last token.", _E2E_BUCKETS
        )
        self._of_ended = [  # each with what it takes of a request that has ended
            (self._histogram(name, text, _E2E_BUCKETS if b is None else b), of)
            for name, text, b, of in _ENDED_SECONDS
        ]
        self._tokens = [
            (self._histogram(name, text, _TOKENS, unit=""), of) for name, text, of in _ENDED_TOKENS
        ]
        self._ignored = Counter(
            "ds_cp:ignored_fields",
            "Fields of requests that were ignored because no part of the protocol knows them.",
            labelnames=("model_name",),
            registry=self._registry,
        )

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], unit: str = "_seconds"
    ) -> Histogram:
        return Histogram(
            f"ds_cp:{name}{unit}",
            text,
            labelnames=("model_name",),
            buckets=buckets,
            registry=self._registry,
        )

    def first_token(self, seconds: float) -> None:
        """A request got its first token, ``seconds`` after it arrived."""
        self._ttft.labels(self._name()).observe(seconds)

    def next_token(self, seconds: float) -> None:
        """A request got more tokens, ``seconds`` after the ones before."""
        self._itl.labels(self._name()).observe(seconds)

    def finished(self, seconds: float) -> None:
        """A request got its last token, ``seconds`` after it arrived."""
        self._e2e.labels(self._name()).observe(seconds)

    def ended(self, request: EndedRequest) -> None:
        """An answer has ended; those that were aborted or failed tell nothing of the times."""
        if request.finish_reason not in ("stop", "length"):
            return
        name = self._name()
        for histogram, of in self._of_ended:
            seconds = of(request)
            if seconds is not None:
                histogram.labels(name).observe(seconds)
        for histogram, count in self._tokens:
            histogram.labels(name).observe(count(request))

    def answered(self, method: str, handler: str, status: int) -> None:
        """An HTTP answer has begun. ``handler``: the path of its route."""
        self._answers[method, handler, status] += 1

    def ignored_fields(self, count: int) -> None:
        """A request had ``count`` unknown fields that were ignored."""
        self._ignored.labels(self._name()).inc(count)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The scrape's body and its content type, as the ``Accept`` header asks; plain text when it
        asks for something else.

        prometheus_client's own choice takes any version number, and raises for what is not one.
        """
        offer, parameters = choose(accept, tuple(_FORMATS))
        asked = _FORMATS[offer]
        if parameters.get("escaping") in _ESCAPINGS:
            asked += f";escaping={parameters['escaping']}"
        encode, content_type = choose_encoder(asked)
        return encode(self._registry), content_type


def _inference_s(request: EndedRequest) -> float | None:
    if request.prefill_s is None or request.decode_s is None:
        return None
    return request.prefill_s + request.decode_s


_Seconds = Callable[[EndedRequest], float | None]
# Histograms of requests that ended: name, text, bucket bounds (None: those of whole requests), what
# they take.
_ENDED_SECONDS: tuple[tuple[str, str, tuple[float, ...] | None, _Seconds], ...] = (
    ("request_queue_time", "From the arrival of an answer's request to its first step.",
     None, lambda r: r.queue_s),
    ("request_prefill_time", "From the first step of an answer to its first token.",
     None, lambda r: r.prefill_s),
    ("request_decode_time", "From the first token of an answer to its last one.",
     None, lambda r: r.decode_s),
    ("request_inference_time", "From the first step of an answer to its last token.",
     None, _inference_s),
    ("request_time_per_output_token", "Mean time between the tokens of one answer.",
     _TPOT_BUCKETS, lambda r: r.tpot_s),
)  # fmt: skip
_ENDED_TOKENS: tuple[tuple[str, str, Callable[[EndedRequest], int]], ...] = (
    ("request_prompt_tokens", "Prompt tokens of an answer.", lambda r: r.prompt_tokens),
    ("request_generation_tokens", "Tokens of an answer.", lambda r: r.new_tokens),
)


class EngineCollector:
    """Turns ``EngineStats``, and the HTTP ``answers`` so far, into metric families at every scrape;
    nothing while starting."""

    def __init__(
        self, engine: EngineInterface, model_name: Callable[[], str], answers: Answers
    ) -> None:
        self._engine = engine
        self._answers = answers
        self._name = model_name

    def describe(self) -> Iterable[Metric]:
        """No families in advance: registering must not read an engine that is still starting."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The families of one scrape."""
        if self._engine.state == "starting":
            return
        stats, name = self._engine.stats(), self._name()
        yield from _gauges(stats, name)
        yield from _counters(stats, name)
        yield from _rank_counters(stats, name)
        yield from journal_families(stats.journal, name)
        yield _http_answers(self._answers, name)


def _http_answers(answers: Answers, name: str) -> Metric:
    family = CounterMetricFamily(
        "ds_cp:http_requests",
        "HTTP answers by method, route and status; /health, /ready and /metrics are left out.",
        labels=("model_name", "method", "handler", "status"),
    )
    for (method, handler, status), count in sorted(answers.items()):
        family.add_metric((name, method, handler, str(status)), count)
    return family


def _gauges(stats: EngineStats, name: str) -> Iterable[Metric]:
    used, total = sum(stats.kv_blocks_used), sum(stats.kv_blocks_total)
    for key, text, value in (
        ("num_requests_running", "Requests in the running batch.", stats.num_requests_running),
        ("num_requests_waiting", "Requests waiting to be scheduled.", stats.num_requests_waiting),
        (
            "queue_wait_seconds",
            "Predicted wait of a request that came now until it begins.",
            stats.queue_wait_seconds,
        ),
        ("engine_step_age_seconds", "Age of the step that runs now.", stats.step_age_seconds),
        ("kv_cache_usage_perc", "KV blocks in use, 1 means all.", used / total if total else 0.0),
        (
            "engine_step_skew_ratio",
            "Own work of the busiest rank over the mean, in the newest step of several ranks.",
            stats.skew,
        ),
    ):
        family = GaugeMetricFamily(f"ds_cp:{key}", text, labels=("model_name",))
        family.add_metric((name,), value)
        yield family
    blocks = GaugeMetricFamily(
        "ds_cp:kv_blocks", "KV blocks by rank and state.", labels=("model_name", "rank", "state")
    )
    kept = stats.kv_blocks_cached or (0,) * len(stats.kv_blocks_total)
    counts = zip(stats.kv_blocks_used, kept, stats.kv_blocks_total, strict=True)
    for rank, (busy, cached, every) in enumerate(counts):
        blocks.add_metric((name, str(rank), "used"), busy)
        blocks.add_metric((name, str(rank), "cached"), cached)
        blocks.add_metric((name, str(rank), "free"), every - busy - cached)
    yield blocks
    slots = GaugeMetricFamily(
        "ds_cp:host_blocks",
        "Blocks that host memory holds, by rank and state; none without host memory.",
        labels=("model_name", "rank", "state"),
    )
    both = zip(stats.host_blocks_used, stats.host_blocks_total, strict=True)
    for rank, (busy, every) in enumerate(both):
        slots.add_metric((name, str(rank), "used"), busy)
        slots.add_metric((name, str(rank), "free"), every - busy)
    yield slots
    for state, text in (
        ("drained", "1 when a rank takes no new KV and is empty."),
        ("draining", "1 when a rank takes no new KV and is not empty yet."),
        ("away", "1 when the job goes on without a rank, whose supervisor is gone."),
    ):
        family = GaugeMetricFamily(f"ds_cp:rank_{state}", text, labels=("model_name", "rank"))
        for rank in range(len(stats.kv_blocks_total)):
            family.add_metric((name, str(rank)), stats.rank_state(rank) == state)
        yield family


def _counters(stats: EngineStats, name: str) -> Iterable[Metric]:
    for key, text, value in (
        ("prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens),
        ("generation_tokens", "Tokens generated.", stats.generation_tokens),
        ("num_preemptions", "Requests put back to be recomputed.", stats.num_preemptions),
        (
            "num_interruptions",
            "Times that the ranks met again, after a worker had died or stood still.",
            stats.num_interruptions,
        ),
        (
            "num_requests_refused",
            "Requests for which there was no place in the queue, or too long a wait.",
            stats.num_refused,
        ),
        (
            "num_strangers",
            "Connections to the port on which ranks of several hosts meet that were dropped: they "
            "did not know the job's secret.",
            stats.num_strangers,
        ),
        ("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_cache_queries),
        ("prefix_cache_hits", "Prompt tokens found in the cache.", stats.prefix_cache_hits),
        (
            "prefix_cache_host_hits",
            "Of the prompt tokens found, those found in host memory.",
            stats.prefix_cache_host_hits,
        ),
        ("blocks_moved", "KV blocks moved between ranks.", stats.blocks_moved),
        ("host_blocks_spilled", "KV blocks copied to host memory.", stats.host_blocks_spilled),
        ("host_blocks_restored", "KV blocks back from host memory.", stats.host_blocks_restored),
        ("engine_steps", "Steps of the engine.", stats.steps),
        ("engine_step_seconds", "Seconds spent in steps.", stats.step_seconds),
        (
            "engine_step_skew_seconds",
            "Seconds that the busiest rank worked beyond the mean, over all steps.",
            stats.skew_seconds,
        ),
        ("prefill_tokens", "Prompt tokens computed, without cached ones.", stats.prefill_tokens),
        ("grammar_requests", "Answers under a grammar.", stats.grammar_requests),
        (
            "grammar_failures",
            "Answers that ended since their grammar allowed no token or passed its bounds.",
            stats.grammar_failures,
        ),
    ):
        family = CounterMetricFamily(f"ds_cp:{key}", text, labels=("model_name",))
        family.add_metric((name,), value)
        yield family
    for key, text, label, values in (
        ("request_success", "Finished requests by reason.", "finished_reason", stats.finished),
        ("mode_counts", "Scheduled items by attention mode.", "mode", stats.mode_counts),
        ("comm_bytes", "Bytes sent by rank 0 by scheme.", "scheme", stats.comm_bytes),
        ("comm_exchanges", "Exchanges of rank 0 by scheme.", "scheme", stats.comm_exchanges),
    ):
        family = CounterMetricFamily(f"ds_cp:{key}", text, labels=("model_name", label))
        for item, count in sorted(values.items()):
            family.add_metric((name, item), count)
        yield family


def _rank_counters(stats: EngineStats, name: str) -> Iterable[Metric]:
    """By rank, and the bytes of all ranks by scheme: counted, and as the formulas have them."""
    values: tuple[float, ...]
    for key, text, values in (
        ("rank_steps", "Steps in which a rank had work.", stats.rank_steps),
        ("rank_step_seconds", "Seconds of the steps in which a rank had work.", stats.rank_seconds),
        ("rank_wait_seconds", "Of these, waiting for other ranks.", stats.rank_waits),
        (
            "host_blocks_failed",
            "KV blocks that a rank's host memory could not copy; after one it is used no more.",
            stats.host_blocks_failed,
        ),
    ):
        family = CounterMetricFamily(f"ds_cp:{key}", text, labels=("model_name", "rank"))
        for rank, value in enumerate(values):
            family.add_metric((name, str(rank)), value)
        yield family
    family = CounterMetricFamily(
        "ds_cp:attention_bytes",
        "Bytes that attention sent, on all ranks, by scheme: counted, and predicted by formula.",
        labels=("model_name", "scheme", "source"),
    )
    for source, found in (("counted", stats.attention_bytes), ("predicted", stats.predicted_bytes)):
        for scheme, count in sorted(found.items()):
            family.add_metric((name, scheme, source), count)
    yield family
