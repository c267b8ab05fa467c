"""What follows from the facts of a start: rank 0's scheduler, and the lines that say what was
decided. No torch here."""

from __future__ import annotations

from ds_cp.config import Config
from ds_cp.cost import CostModel, attention_share
from ds_cp.engine.admission import Limits
from ds_cp.engine.pacing import ChunkPacer
from ds_cp.engine.policy import ModePolicy, Seats
from ds_cp.engine.scheduler import Scheduler
from ds_cp.engine.startup_facts import Facts
from ds_cp.topology.hosts import Grid, Topology

AUTO_BATCHED_TOKENS = 8192


def _grid(facts: Facts) -> Grid:
    return Grid(Topology(facts.hosts), facts.cp_size, facts.tp_size)


def build_scheduler(config: Config, facts: Facts, paced: bool = True) -> Scheduler:
    """Rank 0's scheduler over the budgets that all ranks reported. ``paced``: somebody waits for
    the next token of a stream, so prompts may not delay it much."""
    batched = config.scheduler.max_num_batched_tokens
    threshold = config.context_parallel.local_threshold
    topology = _grid(facts).cp_topology()
    return Scheduler(
        Limits(
            max_model_len=facts.max_model_len,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=AUTO_BATCHED_TOKENS if batched == "auto" else batched,
            max_queue=config.scheduler.max_queue,
            vocab_size=facts.vocab_size,
            eos_token_ids=facts.eos_token_ids,
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
        ),
        topology.ring_order(),
        prefix_caching=config.kv_cache.prefix_caching,
        pacer=ChunkPacer(
            config.scheduler.decode_slowdown if paced else None,
            attention_share(
                facts.num_layers, facts.num_q_heads // facts.tp_size, facts.head_dim, facts.weights
            ),
        ),
        seats=Seats(topology.hosts, max(1, facts.ranks_at_once // facts.tp_size)),
    )


def cost_model(facts: Facts) -> CostModel | None:
    """What was measured, as the model that chooses spans; None on one rank, where nothing is to be
    chosen, and on ranks that measured no link, which choose nothing."""
    if not facts.links or not all(link.gb_per_s for link in facts.links):
        return None
    return CostModel(
        flops_per_s=facts.flops_per_s,
        bytes_per_s=min(link.gb_per_s for link in facts.links) * 1e9,
        latency_s=max(link.latency_us for link in facts.links) * 1e-6,
        num_layers=facts.num_layers,
        num_q_heads=facts.num_q_heads // facts.tp_size,
        num_kv_heads=facts.num_kv_heads // facts.tp_size,
        head_dim=facts.head_dim,
        weights=facts.weights,
        element=4 if facts.dtype == "float32" else 2,
    )


def summary(config: Config, facts: Facts) -> list[str]:
    """What start-up decided and why, a line each."""
    grid, cp = _grid(facts), config.context_parallel
    tokens = [n * facts.block_size for n in facts.blocks_per_rank]
    even = len(set(tokens)) == 1
    per_rank = f"{len(tokens)} x {tokens[0]}" if even else " + ".join(map(str, tokens))
    mib = max(tokens) * facts.bytes_per_token / 2**20
    rule = {
        "auto": "local while a request fits on one rank, unless it is alone and more ranks are "
        "faster; spanning prefill by ring, decode by tree",
        "local": "every request on one rank",
    }.get(cp.mode, f"{cp.mode} for every request")
    return [
        *grid.topology.describe(),
        f"ranks: {grid.topology.size} = cp {grid.cp_size} x tp {grid.tp_size}, "
        f"{facts.threads} CPU thread{'s' * (facts.threads != 1)} each",
        *(
            f"link {link.name}: {link.latency_us:.0f} us, {link.gb_per_s:.2f} GB/s"
            for link in facts.links
        ),
        f"model: {facts.num_layers} layers, {facts.num_q_heads} query and {facts.num_kv_heads} "
        "KV heads, "
        f"{facts.dtype}; logits agree with transformers to {facts.exactness:.0e}",
        f"attention: {facts.kernel} kernel; mode {cp.mode}: {rule}",
        *_rates(facts),
        *_crowded(facts),
        f"KV: {sum(tokens)} tokens = {per_rank} per rank (up to {mib:.0f} MiB), blocks of "
        f"{facts.block_size}, {config.kv_cache.placement}; one request: up to "
        f"{min(sum(tokens) + 1, facts.max_model_len)} tokens (model length {facts.max_model_len})",
    ]


def _crowded(facts: Facts) -> list[str]:
    """Said where ranks have to share cores."""
    most = max(facts.hosts.count(host) for host in facts.hosts)
    if facts.ranks_at_once >= most:
        return []
    return [
        f"{most} ranks share a host with cores for {facts.ranks_at_once} at once: short requests "
        f"keep to {facts.ranks_at_once} while these have room"
    ]


def _rates(facts: Facts) -> list[str]:
    """What the cost model goes by."""
    cost = cost_model(facts)
    if cost is None:
        return []
    hides = cost.tokens_that_hide_kv(facts.cp_size)
    return [
        f"one rank computes {facts.flops_per_s / 1e9:.0f} GFLOP/s; moving KV around "
        f"{facts.cp_size} ranks hides under attention from chunks of {hides:.0f} tokens on"
    ]
