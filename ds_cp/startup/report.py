"""The lines that say what start-up measured and decided. No torch here."""

from __future__ import annotations

from ds_cp.config import Config
from ds_cp.facts import Facts
from ds_cp.scheduler.build import cost_model, grid_of, host_cost

LOOK = 4000  # tokens of the example in the line on host memory


def summary(config: Config, facts: Facts) -> list[str]:
    """What start-up decided and why, a line each."""
    grid, cp = grid_of(facts), config.context_parallel
    tokens = [n * facts.block_size for n in facts.blocks_per_rank]
    even = len(set(tokens)) == 1
    per_rank = f"{len(tokens)} x {tokens[0]}" if even else " + ".join(map(str, tokens))
    mib = max(tokens) * facts.bytes_per_token / 2**20
    rule = {
        "auto": "local while a request fits on one rank, "
        "unless it is alone and more ranks are faster; spanning prefill by ring, decode by tree",
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
        f"model: {facts.num_layers} layers, "
        f"{facts.num_q_heads} query and {facts.num_kv_heads} KV heads, "
        f"{facts.dtype}; {_exactness(facts)}",
        f"attention: {facts.kernel} kernel; mode {cp.mode}: {rule}",
        *_rates(facts),
        *_crowded(facts),
        f"KV: {sum(tokens)} tokens = {per_rank} per rank (up to {mib:.0f} MiB), "
        f"blocks of {facts.block_size}, {config.kv_cache.placement} ({facts.kv_reason}); "
        f"one request: up to {min(sum(tokens) + 1, facts.max_model_len)} tokens "
        f"(model length {facts.max_model_len})",
        *_host_memory(facts),
        *facts.notes,
    ]


def _host_memory(facts: Facts) -> list[str]:
    """A line on what is kept beside the devices, none where no rank has room for any."""
    if not facts.host_blocks_per_rank:
        return []
    tokens = [n * facts.block_size for n in facts.host_blocks_per_rank]
    even = len(set(tokens)) == 1
    per_rank = f"{len(tokens)} x {tokens[0]}" if even else " + ".join(map(str, tokens))
    mib = max(tokens) * facts.bytes_per_token / 2**20
    cost, rate = host_cost(facts), ""
    if cost is not None:
        computed, back = cost.prefill_s(1, LOOK, 0), cost.host_s(LOOK)
        rate = (
            f"; {facts.host_gb_per_s:.2f} GB/s: {LOOK} tokens come back in {back:.3f} s, "
            f"one rank computes them in {computed:.3f} s"
        )
    return [
        f"host memory: {sum(tokens)} tokens more = {per_rank} per rank (up to {mib:.0f} MiB) of "
        f"prompts' beginnings and preempted requests{rate}"
    ]


def _exactness(facts: Facts) -> str:
    """How far logits are from transformers' own, beside how far two of its own kernels are."""
    own = f"; its own kernels: {facts.rounding:.0e}" if facts.dtype != "float32" else ""
    return f"logits agree with transformers to {facts.exactness:.0e}{own}"


def _crowded(facts: Facts) -> list[str]:
    """A line where ranks have to share cores, else none."""
    most = max(facts.hosts.count(host) for host in facts.hosts)
    if facts.ranks_at_once >= most:
        return []
    return [
        f"{most} ranks share a host with {'cores' if facts.device == 'cpu' else 'GPUs'} "
        f"for {facts.ranks_at_once} at once: "
        f"short requests keep to {facts.ranks_at_once} while these have room"
    ]


def _rates(facts: Facts) -> list[str]:
    """A line with the rates that the cost model uses; none where nothing was measured."""
    cost = cost_model(facts)
    if cost is None:
        return []
    hides = cost.tokens_that_hide_kv(facts.cp_size)
    hidden = f"hides under attention from chunks of {hides:.0f} tokens on"
    if not cost.in_background:
        hidden = "takes its time beside attention: a rank copies it itself"
    reads = f"{facts.bytes_per_s / 1e9:.1f} GB/s"
    if facts.alone_bytes_per_s > 1.1 * facts.bytes_per_s:
        reads += f" ({facts.alone_bytes_per_s / 1e9:.1f} alone)"
    beside = f"{facts.layer_s * 1e6:.0f} us a layer and {facts.hop_s * 1e6:.0f} a hop beside it"
    return [
        f"one rank computes {facts.flops_per_s / 1e9:.0f} GFLOP/s and reads weights at {reads}, "
        f"{beside}; "
        f"moving KV around {facts.cp_size} ranks {hidden}"
    ]
