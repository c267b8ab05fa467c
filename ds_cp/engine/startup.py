"""From a place in the job to a worker that can run plans.

Every phase that can fail on one rank alone ends with an agreement: all ranks report to rank 0,
which speaks for them, and all leave together. So a missing file on one host is one line, not a
hang.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import psutil
import torch

from ds_cp.attention import LayerSpec, get_kernel
from ds_cp.comm.control import Control
from ds_cp.comm.links import measure_links
from ds_cp.comm.wire import Rendezvous, World, join
from ds_cp.config import Config
from ds_cp.engine.process import choose_threads, ranks_at_once
from ds_cp.engine.rates import achieved_flops
from ds_cp.engine.startup_facts import Facts, LinkFacts
from ds_cp.engine.worker import Worker
from ds_cp.errors import (
    CommError,
    ConfigError,
    DsCpError,
    ModelError,
    TopologyError,
    UnsupportedModelError,
    UserError,
)
from ds_cp.kv.pool import KVPool, bytes_per_token
from ds_cp.model.loading import choose_dtype, load_config, load_model
from ds_cp.model.shard import shard_model
from ds_cp.model.source import ModelSource, find_model
from ds_cp.model.wiring import Decoder, check_exact, check_positions, probe_layers
from ds_cp.topology.hosts import Grid, resolve_grid
from ds_cp.topology.job import Job

T = TypeVar("T")
REPORT = 1024  # bytes of a rank's report to rank 0
MESSAGE = 800  # bytes of the message in it
KINDS: tuple[type[DsCpError], ...] = (
    CommError, ConfigError, ModelError, TopologyError, UnsupportedModelError,
)  # fmt: skip
AUTO_MEMORY_SHARE = 0.4  # of the host's free memory, divided by its ranks
AUTO_GPU_SHARE = 0.85  # of the device's free memory


class _Report(msgspec.Struct, array_like=True):
    exit_code: int  # 0: all is well
    message: str
    kv_blocks: int = 0
    kind: str = ""  # class of the error


def join_job(job: Job, config: Config) -> tuple[World, int]:
    """Take this process's seat: threads, device, rendezvous. Returns the seat
    and the CPU threads of this rank."""
    listen_fd = job.store_socket.fileno() if job.store_socket else None
    threads = choose_threads(config, job.local_world_size or 1)
    torch.set_num_threads(threads)
    device = choose_device(config, job.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = join(
        job.rank,
        job.world_size,
        Rendezvous(job.store_host, job.store_port, listen_fd),
        host=job.host,
        hosts=job.hosts,
        device=device,
        timeout_s=config.comm.timeout_s,
        digest=config.model_dump_json(exclude={"server"}),
    )
    return world, threads


def build_worker(
    world: World, config: Config, model: Decoder | ModelSource | None, threads: int
) -> tuple[Worker, Facts]:
    """Load, shard, check and wire the model, and allocate this rank's KV. Collective.

    ``model``: ``None`` for the config's, looked up here, so that a rank that does not find it can
    say so.
    """
    grid = resolve_grid(
        world.topology, config.context_parallel.size, config.tensor_parallel.tp_size
    )
    cp = world.group("cp", grid.cp_groups())
    tp = world.group("tp", grid.tp_groups())

    def load() -> tuple[Decoder, list[LayerSpec], Any, str, int, float]:
        source = find_model(config.model) if model is None else model
        decoder = _load(config, source, world.device)
        text = decoder.config.get_text_config()
        kernel_name, kernel = get_kernel(config.attention.backend, world.device, decoder.dtype)
        shard_model(decoder, tp)
        layers = probe_layers(decoder)
        _check_heads(text, layers, tp.size)
        length = _max_model_len(config, getattr(text, "max_position_embeddings", None))
        check_positions(decoder, length)
        error = check_exact(decoder, layers, kernel)
        return decoder, layers, kernel, kernel_name, length, error

    decoder, layers, kernel, kernel_name, length, error = _agreed(world, load)
    per_token = bytes_per_token(layers, decoder.dtype)

    def allocate() -> KVPool:
        tokens = _tokens_of_rank(config, world, grid, cp.rank, per_token, length)
        return KVPool(layers, tokens, decoder.dtype, world.device)

    size = config.kv_cache.block_size
    pool = _agreed(world, allocate)
    blocks = _gather_blocks(world, pool.num_slots // size)
    text = decoder.config.get_text_config()
    flops = achieved_flops(text.hidden_size, decoder.dtype, world.device)
    facts = Facts(
        hosts=world.topology.hosts,
        cp_size=cp.size,
        tp_size=tp.size,
        device=str(world.device.type),
        dtype=str(decoder.dtype).removeprefix("torch."),
        kernel=kernel_name,
        max_model_len=length,
        vocab_size=text.vocab_size,
        eos_token_ids=_eos_ids(decoder),
        num_q_heads=layers[0].num_q_heads * tp.size,
        num_kv_heads=layers[0].num_kv_heads * tp.size,
        block_size=size,
        blocks_per_rank=tuple(blocks[c * tp.size] for c in range(cp.size)),
        bytes_per_token=per_token,
        num_layers=len(layers),
        threads=threads,
        ranks_at_once=ranks_at_once(world.device.type, threads, world.size),
        exactness=error,
        links=tuple(LinkFacts(x.name, x.latency_us, x.gb_per_s) for x in measure_links(world)),
        flops_per_s=flops,
        weights=sum(p.numel() for p in decoder.parameters()),
        head_dim=layers[0].head_dim,
    )
    return Worker(world, cp, tp, decoder, layers, pool, kernel, size), facts


def choose_device(config: Config, local_rank: int) -> torch.device:
    """This rank's device. "auto" takes CUDA when there is a device for it; NCCL needs one per
    rank."""
    backend = config.comm.backend
    if backend == "gloo" or (backend == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"comm.backend {backend} needs one CUDA device per rank, but local rank "
            f"{local_rank} has none "
            f"of {torch.cuda.device_count()}: start fewer ranks, or set comm.backend to gloo"
        )
    return torch.device("cuda", local_rank)


def _agreed(world: World, work: Callable[[], T]) -> T:
    """Do ``work`` here; raise on every rank if it failed on any, with the first one's reason."""
    mine, result = _Report(0, ""), None
    failure: DsCpError | None = None
    try:
        result = work()
    except DsCpError as err:
        failure, mine = err, _Report(err.exit_code, str(err), kind=type(err).__name__)
    except MemoryError:
        failure = UserError("not enough memory; lower kv_cache or use fewer ranks a host")
        mine = _Report(2, str(failure))
    except Exception as err:  # our own fault: say it on every rank rather than hang the others
        traceback.print_exc()
        failure = DsCpError(f"{type(err).__name__}: {err} (this is a fault of ds_cp)")
        mine = _Report(1, str(failure))
    reports = exchange_reports(world, mine)
    for rank, report in enumerate(reports):
        if report.exit_code:
            if failure is not None and rank == world.rank:
                raise failure
            host = world.topology.hosts[rank]
            other = UserError if report.exit_code == 2 else DsCpError
            kind = next((k for k in KINDS if k.__name__ == report.kind), other)
            where = f"rank {rank} on {host}: " if rank else ""
            raise kind(f"{where}{report.message}")
    assert result is not None
    return result


def exchange_reports(world: World, mine: _Report) -> list[_Report]:
    """Every rank's report, on every rank."""
    short = mine.message.encode()[:MESSAGE].decode(errors="ignore")
    raw = msgspec.msgpack.encode(msgspec.structs.replace(mine, message=short))
    frame = torch.zeros(REPORT, dtype=torch.uint8)
    frame[: len(raw) + 2] = torch.frombuffer(
        bytearray(len(raw).to_bytes(2, "little") + raw), dtype=torch.uint8
    )
    frames = [torch.empty_like(frame) for _ in range(world.size)]
    frames[0] = frame
    others = [(r, frames[r]) for r in range(1, world.size)]
    control = Control(world)
    control.collect(frame, others if world.rank == 0 else [])
    everything = torch.cat(frames).numpy().tobytes() if world.rank == 0 else None
    data = control.broadcast(everything)
    reports = []
    for at in range(0, world.size * REPORT, REPORT):
        length = int.from_bytes(data[at : at + 2], "little")
        reports.append(msgspec.msgpack.decode(data[at + 2 : at + 2 + length], type=_Report))
    return reports


def _gather_blocks(world: World, mine: int) -> list[int]:
    return [report.kv_blocks for report in exchange_reports(world, _Report(0, "", mine))]


def _load(config: Config, model: Decoder | ModelSource, device: torch.device) -> Decoder:
    if isinstance(model, Decoder):
        return model.eval()
    found = load_config(model)
    dtype = choose_dtype(config.dtype, getattr(found, "dtype", None), device)
    return load_model(model, dtype, device)


def _max_model_len(config: Config, limit: int | None) -> int:
    if config.max_model_len == "auto":
        if limit is None:
            raise ConfigError(
                "the model's config.json has no max_position_embeddings, so max_model_len cannot "
                "be auto: set it to the number of tokens that the model was made for"
            )
        return limit
    if limit is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but the model was made for {limit} "
            "positions; "
            f"set it to at most {limit} or to auto"
        )
    return config.max_model_len


def _check_heads(text: Any, layers: list[LayerSpec], tp_size: int) -> None:
    """Sharding that silently left a model whole would double every head: look at what came out."""
    want = text.num_attention_heads
    got = layers[0].num_q_heads * tp_size
    if tp_size > 1 and got != want:
        raise ConfigError(
            f"tensor_parallel.tp_size {tp_size}: {layers[0].num_q_heads} local query heads do "
            "not make the "
            f"model's {want}; set tp_size to 1"
        )


def _tokens_of_rank(
    config: Config, world: World, grid: Grid, cp_rank: int, per_token: int, max_model_len: int
) -> int:
    """Token slots of this rank: whole blocks, within the budget."""
    kv, size = config.kv_cache, config.kv_cache.block_size
    local = world.topology.local_size(world.rank)
    if kv.tokens_per_rank != "auto":
        tokens = _one(kv.tokens_per_rank, "tokens_per_rank", cp_rank, grid.cp_size)
    elif kv.memory_per_rank != "auto":
        tokens = _one(kv.memory_per_rank, "memory_per_rank", cp_rank, grid.cp_size) // per_token
    else:
        wanted = -(-max_model_len // size) * size
        tokens = min(wanted, _free_bytes(world.device, local) // per_token)
    if tokens < size:
        raise ConfigError(
            f"kv_cache gives cp rank {cp_rank} room for {tokens} tokens ({per_token} bytes "
            "each), less than "
            f"one block of {size}: raise the budget or lower kv_cache.block_size"
        )
    need, free = tokens // size * size * per_token, _free_bytes(world.device, local, share=1.0)
    if need > free:
        raise ConfigError(
            f"kv_cache asks for {need} bytes on cp rank {cp_rank}, but {free} are free for each "
            "of the "
            f"host's {local} ranks: lower kv_cache, or use fewer ranks a host"
        )
    return tokens // size * size


def _one(budget: int | tuple[int, ...], name: str, cp_rank: int, cp_size: int) -> int:
    if isinstance(budget, int):
        return budget
    if len(budget) != cp_size:
        raise ConfigError(
            f"kv_cache.{name} lists {len(budget)} budgets, but the job has {cp_size} "
            "context-parallel ranks: "
            "give one per rank, or one number for all"
        )
    return budget[cp_rank]


def _free_bytes(device: torch.device, local_ranks: int, share: float | None = None) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * (share or AUTO_GPU_SHARE))
    return int(psutil.virtual_memory().available * (share or AUTO_MEMORY_SHARE) / local_ranks)


def _eos_ids(model: Decoder) -> tuple[int, ...]:
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = model.config.get_text_config().eos_token_id
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)
