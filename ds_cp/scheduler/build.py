"""Rank 0's scheduler from the config and the facts of a start. No torch here."""

from __future__ import annotations

from dataclasses import replace

from ds_cp.config import Config
from ds_cp.cost import CostModel, LayerWindows, attention_share
from ds_cp.facts import Facts, LinkFacts
from ds_cp.scheduler.admission import Limits
from ds_cp.scheduler.forecast import Rates
from ds_cp.scheduler.host_moves import HostRules
from ds_cp.scheduler.mode_policy import ModePolicy, Seats
from ds_cp.scheduler.pacing import ChunkPacer, Tuning
from ds_cp.scheduler.scheduler import Scheduler
from ds_cp.topology.hosts import Grid, Topology

# Seconds in which blocks come back from one rank's host memory in one step, at most: beside
# decodes, which wait for them, and alone; and its rate where none was measured, in 1e9 bytes/s.
BESIDE_S, ALONE_S, HOST_GB_PER_S = 0.005, 0.2, 2.0
AUTO_BATCHED_TOKENS = 8192  # tokens of one rank in one step, where the config says auto


def grid_of(facts: Facts) -> Grid:
    """Ranks and hosts as cp x tp."""
    return Grid(Topology(facts.hosts), facts.cp_size, facts.tp_size)


def build_scheduler(config: Config, facts: Facts, paced: bool = True) -> Scheduler:
    """Rank 0's scheduler over the budgets that all ranks reported. ``paced``: clients wait for each
    token, so prefill is throttled while other requests decode."""
    batched = config.scheduler.max_num_batched_tokens
    threshold = config.context_parallel.local_threshold
    topology = grid_of(facts).cp_topology()
    return Scheduler(
        Limits(
            max_model_len=facts.max_model_len,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=AUTO_BATCHED_TOKENS if batched == "auto" else batched,
            max_queue=config.scheduler.max_queue,
            vocab_size=facts.vocab_size,
            eos_token_ids=facts.eos_token_ids,
            max_queue_wait_s=config.scheduler.max_queue_wait_s if paced else None,
        ),
        facts.blocks_per_rank,
        facts.block_size,
        config.kv_cache.placement,
        config.context_parallel.layout,
        ModePolicy(
            mode=config.context_parallel.mode,
            ring_pass=config.context_parallel.ring_pass,
            local_threshold=None if threshold == "auto" else threshold,
            num_hosts=topology.num_hosts,
            num_q_heads=facts.num_q_heads,
            num_kv_heads=facts.num_kv_heads,
            cost=cost_model(facts),
            windows=LayerWindows(facts.num_layers, facts.windows),
        ),
        topology.ring_order(),
        prefix_caching=config.kv_cache.prefix_caching,
        pacer=ChunkPacer(
            config.scheduler.decode_slowdown if paced else None,
            attention_share(
                facts.num_layers, facts.num_q_heads // facts.tp_size, facts.head_dim, facts.weights
            ),
            Tuning(),
            LayerWindows(facts.num_layers, facts.windows),
        ),
        seats=Seats(topology.hosts, max(1, facts.ranks_at_once // facts.tp_size)),
        rates=first_rates(facts),
        host=host_rules(facts),
    )


def host_rules(facts: Facts) -> HostRules:
    """How host memory is used; none of it where no rank has any."""
    block = facts.bytes_per_token * facts.block_size
    a_second = (facts.host_gb_per_s or HOST_GB_PER_S) * 1e9 / block
    return HostRules(
        facts.host_blocks_per_rank,
        max(1, int(BESIDE_S * a_second)),
        max(1, int(ALONE_S * a_second)),
        host_cost(facts),
        facts.max_model_len,
    )


def first_rates(facts: Facts) -> Rates:
    """What the cost model says of one rank, which needs no link."""
    if not facts.flops_per_s:
        return Rates()
    return Rates.of(cost_model(replace(facts, links=(LinkFacts("none", 0.0, 1.0),))))


def cost_model(facts: Facts) -> CostModel | None:
    """The measured rates, as the model that chooses spans. None on one rank, where there is
    nothing to choose, and on ranks other than 0, which measured no link and choose nothing."""
    if not facts.links or not all(link.gb_per_s for link in facts.links):
        return None
    return _model(
        facts,
        min(link.gb_per_s for link in facts.links) * 1e9,
        max(link.latency_us for link in facts.links) * 1e-6,
        any(link.in_background for link in facts.links),
    )


def host_cost(facts: Facts) -> CostModel | None:
    """The measured rates of one rank, as the model that says whether KV comes back from the host or
    is computed. None without host memory, or where its rate was not measured."""
    return _model(facts, float("inf"), 0.0, True) if facts.host_gb_per_s else None


def _model(facts: Facts, bytes_per_s: float, latency_s: float, in_background: bool) -> CostModel:
    most = max(map(facts.hosts.count, facts.hosts))
    readers = max(1, min(facts.ranks_at_once, most) // facts.tp_size)  # groups of a host at once
    alone = min(facts.alone_bytes_per_s, facts.bytes_per_s * readers)  # of a group: one rank or tp
    return CostModel(
        flops_per_s=facts.flops_per_s,
        bytes_per_s=bytes_per_s,
        latency_s=latency_s,
        num_layers=facts.num_layers,
        num_q_heads=facts.num_q_heads // facts.tp_size,
        num_kv_heads=facts.num_kv_heads // facts.tp_size,
        head_dim=facts.head_dim,
        weights=facts.layer_weights or facts.weights,
        element=4 if facts.dtype == "float32" else 2,
        windows=facts.windows,
        in_background=in_background,
        host_bytes_per_s=facts.host_gb_per_s * 1e9,
        memory_bytes_per_s=facts.bytes_per_s or float("inf"),
        alone_bytes_per_s=alone or None,
        readers=readers,
        layer_s=facts.layer_s,
        hop_s=max(0.0, facts.hop_s - latency_s),
        head=facts.head_weights,
        stored=facts.stored_weights,
    )
