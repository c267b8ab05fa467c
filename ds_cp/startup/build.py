"""From a joined world to a worker that can run plans, phase by phase (see ``agreement``).

What can fail on one rank alone is local to it and ends with an agreement: so a missing file on one
host is one line on every rank, not a hang.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_cp.attention import LayerSpec
from ds_cp.attention.kernels.choose import Choice
from ds_cp.comm.failure import failing
from ds_cp.comm.links import measure_links
from ds_cp.comm.wire import Group, World
from ds_cp.config import Config
from ds_cp.facts import Facts, LinkFacts
from ds_cp.kv.pool import bytes_per_token
from ds_cp.model.end_tokens import model_end_tokens
from ds_cp.model.linear import is_packed
from ds_cp.model.shard import RowSums
from ds_cp.model.source import ModelSource
from ds_cp.model.wiring import Decoder
from ds_cp.startup.agreement import gather_blocks, joint_phase, local_phase
from ds_cp.startup.exactness import Step, compare, served_logits
from ds_cp.startup.fingerprint import Fingerprint, agree_on_model
from ds_cp.startup.flops import achieved_flops
from ds_cp.startup.host_budget import decide_slots, open_slots
from ds_cp.startup.kernel_choice import choose_for_all
from ds_cp.startup.kv_budget import allocate_pool, decide_budget
from ds_cp.startup.layerwise import AttentionRecord
from ds_cp.startup.overhead import measure_overheads
from ds_cp.startup.preload import Loaded, Preloaded, Prepared, load, prepare
from ds_cp.startup.reading import reading_rates
from ds_cp.startup.resources import ranks_at_once
from ds_cp.startup.shapes import layer_windows, mean_shape, shape_notes
from ds_cp.startup.weights import count_weights
from ds_cp.topology.hosts import resolve_grid
from ds_cp.worker.decode_graph import cuda_graphs
from ds_cp.worker.tracing import trace_steps
from ds_cp.worker.worker import Worker


@dataclass(frozen=True)
class Served:
    """The model as this rank serves it: sharded, wired and compared with transformers.

    ``layers``: what each layer asks of attention, with this rank's head counts; ``max_model_len``:
    in tokens; ``exactness``, ``rounding``: largest relative logit difference of ours, and of
    transformers' own sdpa attention, to its eager attention; ``fingerprint``: as it was loaded.
    """

    decoder: Decoder
    layers: Sequence[LayerSpec]
    kernel: Choice
    max_model_len: int
    exactness: float
    rounding: float
    fingerprint: Fingerprint


def build_worker(
    world: World,
    config: Config,
    model: Decoder | ModelSource | Preloaded | None,
    threads: int,
    promised: bool = False,
) -> tuple[Worker, Facts]:
    """Load, shard, check and wire the model, and allocate this rank's KV. Collective.

    ``model``: ``None`` for the config's, looked up here, so that a rank that does not find it can
    say so; ``promised``: as in ``decide_budget``. Raises the typed errors of ``ds_cp.errors``, on
    every rank, with the rank and host of the first that failed.
    """
    with failing(world):
        return _build(world, config, model, threads, promised)


def _build(
    world: World,
    config: Config,
    model: Decoder | ModelSource | Preloaded | None,
    threads: int,
    promised: bool,
) -> tuple[Worker, Facts]:
    sizes = config.context_parallel.size, config.tensor_parallel.tp_size
    grid = local_phase(world, lambda: resolve_grid(world.topology, *sizes))
    cp = world.group("cp", grid.cp_groups())
    tp = world.group("tp", grid.tp_groups())

    notes: list[str] = []
    served = _serve(world, config, model, cp, tp, notes.append)
    decoder, layers = served.decoder, served.layers
    text = decoder.config.get_text_config()
    per_token, size = bytes_per_token(layers, decoder.dtype), config.kv_cache.block_size

    # All ranks of a host look at its free memory before any of them takes some.
    budget = local_phase(
        world,
        lambda: decide_budget(
            config, world, grid, cp.rank, per_token, served.max_model_len, promised
        ),
    )
    kernel = served.kernel.kernel
    pool = local_phase(
        world,
        lambda: allocate_pool(budget, layers, size, kernel.packed, decoder.dtype, world, cp.rank),
    )
    blocks = gather_blocks(world, pool.num_blocks)
    unclaimed = pool.nbytes if budget.lazy else 0
    mine = local_phase(
        world, lambda: decide_slots(config, world, pool, cp.rank, cp.size, unclaimed)
    )
    slots = gather_blocks(world, mine)
    store, host_rate = local_phase(world, lambda: open_slots(config, world, pool, mine, cp.rank))
    flops = local_phase(
        world, lambda: achieved_flops(text.hidden_size, decoder.dtype, world.device)
    )
    shared, alone = reading_rates(world, decoder)
    overheads = measure_overheads(world, cp, decoder.dtype)
    links = measure_links(world)
    weights = count_weights(decoder)
    shape = mean_shape(layers)
    facts = Facts(
        hosts=world.topology.hosts,
        cp_size=cp.size,
        tp_size=tp.size,
        device=str(world.device.type),
        dtype=str(decoder.dtype).removeprefix("torch."),
        kernel=kernel.name,
        max_model_len=served.max_model_len,
        vocab_size=text.vocab_size,
        eos_token_ids=model_end_tokens(decoder),
        num_q_heads=shape.num_q_heads * tp.size,
        num_kv_heads=shape.num_kv_heads * tp.size,
        block_size=size,
        blocks_per_rank=tuple(blocks[c * tp.size] for c in range(cp.size)),
        bytes_per_token=per_token,
        num_layers=len(layers),
        threads=threads,
        ranks_at_once=ranks_at_once(
            world.device.type, world.cores, threads, world.size, world.sharing
        ),
        exactness=served.exactness,
        links=tuple(LinkFacts(x.name, x.latency_us, x.gb_per_s, x.in_background) for x in links),
        flops_per_s=flops,
        weights=weights.active,
        head_dim=shape.head_dim,
        notes=(*world.notes, *notes, *shape_notes(layers, tp.size), *served.kernel.notes),
        rounding=served.rounding,
        windows=layer_windows(layers),
        kv_reason=budget.reason,
        packed=is_packed(decoder),
        layer_weights=weights.layers,
        stored_weights=weights.stored,
        head_weights=weights.head,
        bytes_per_s=shared,
        alone_bytes_per_s=alone,
        layer_s=overheads.layer_s,
        hop_s=overheads.hop_s,
        fingerprint=served.fingerprint,
        host_blocks_per_rank=tuple(slots[c * tp.size] for c in range(cp.size))
        if any(slots)
        else (),
        host_gb_per_s=host_rate,
    )
    worker = Worker(world, cp, tp, decoder, layers, pool, kernel, store)
    worker.fingerprint = served.fingerprint
    if world.device.type == "cuda" and tp.size == 1:  # sums between ranks are not captured
        longest = -(-served.max_model_len // size)
        rows = config.scheduler.max_num_seqs
        spans = cp.size > 1 and world.backend == "nccl"  # exchanges by way of the host are not
        worker.capture_decodes(rows, longest, cuda_graphs(world.device), spans)
    if config.trace.file is not None:
        trace_steps(worker, config.trace.file, config.trace.max_events)
    return worker, facts


def _serve(
    world: World,
    config: Config,
    model: Decoder | ModelSource | Preloaded | None,
    cp: Group,
    tp: Group,
    note: Callable[[str], None],
) -> Served:
    """Load, compare with the other ranks, shard, wire, pack, and compare with transformers.
    ``note`` gets a line on each part of the checkpoint that is not used, and one on packing."""
    sums = RowSums(tp)

    def loading() -> Loaded:
        return model.load() if isinstance(model, Preloaded) else load(config, model, world)

    def preparing(loaded: Loaded) -> Prepared:
        return prepare(loaded, config, world, sums)

    loaded = local_phase(world, loading)
    for line in loaded.notes:
        note(line)
    agree_on_model(world, loaded.fingerprint)
    prepared = local_phase(
        world,
        lambda: model.prepare(preparing) if isinstance(model, Preloaded) else preparing(loaded),
    )
    decoder, layers, reference = loaded.decoder, prepared.layers, prepared.reference
    kernel = choose_for_all(world, config, decoder.dtype, layers)
    # All ranks of a host looked at its free memory before any of them takes some.
    if line := local_phase(world, prepared.packing):
        note(line)
    if config.attention.deterministic and world.device.type == "cuda" and tp.size > 2:
        note(
            f"deterministic: sums over {tp.size} tensor-parallel ranks go in an order that what "
            "carries them may choose by the number of rows"
        )

    def serve(record: AttentionRecord | None) -> list[Step]:
        return served_logits(decoder, layers, kernel.kernel, cp, sums, record)

    steps = joint_phase(world, lambda: serve(None))
    # The same models have the same record on all ranks, so all of them replay or none.
    replayed = joint_phase(world, lambda: serve(reference.record)) if reference.record else []
    architecture = type(decoder).__name__
    error = local_phase(
        world, lambda: compare(architecture, decoder.dtype, reference, steps, replayed)
    )
    return Served(
        decoder, layers, kernel, loaded.max_model_len, error, reference.rounding,
        loaded.fingerprint,
    )  # fmt: skip
