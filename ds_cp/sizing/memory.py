"""Bytes of one rank: weights, KV, activations, and what is free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ds_cp.sizing.device import Device
from ds_cp.sizing.job import BLOCK, CHUNK, Job, counts
from ds_cp.sizing.model import ModelShape

GIB = 1 << 30
ALIGN = 64  # bytes to which a layer's stretch of a block is padded, as in ``ds_cp.attention.pages``


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the rank that holds most. ``total``: the rank's memory; ``reserved``: taken before a
    model is loaded; ``kv``: of the context's blocks there; ``activations``: of its largest forward
    call; ``kv_room``: what the server takes for KV there, its share of what weights leave free."""

    total: int
    reserved: int
    weights: int
    kv: int
    activations: int
    kv_room: int

    @property
    def free(self) -> int:
        """What is left, negative where it is too little."""
        return self.total - self.reserved - self.weights - self.kv - self.activations

    @property
    def fits(self) -> bool:
        """Whether the KV has room, and the activations beside all of that room."""
        beside = self.total - self.reserved - self.weights - self.kv_room
        return self.kv <= self.kv_room and self.activations <= beside


def block_bytes(model: ModelShape, element: int, tp: int) -> int:
    """Bytes of one block of ``BLOCK`` tokens over all layers on one of ``tp`` ranks."""
    found = 0
    for layer in model.layers:
        raw = layer.num_kv_heads // tp * (layer.head_dim + layer.v_dim) * BLOCK * element
        found += -(-raw // ALIGN) * ALIGN
    return found


def activation_bytes(model: ModelShape, job: Job) -> int:
    """Bytes that are live at once in a forward call of t = min(``CHUNK``, context / N) tokens:

        t e (2 hidden + max(H D + G (D + V) + H V, 3 width))   the stream, its norm, the wider part
        + t H (V + 1) 4                                        the running partial, fp32
        + 2 (S / N) G (D + V) e, of the largest layer          shards in a ring: in hand, arriving
        + vocab (e + 4)                                        logits of the last token

    A count of the largest tensors; an allocator's rounding and a kernel's own buffers are not in.
    """
    rows = min(CHUNK, -(-job.context // job.cp))
    e, tp = job.element, job.tp
    inner = partial = shard = 0
    for layer in model.layers:
        heads, kv_heads = layer.num_q_heads // tp, layer.num_kv_heads // tp
        kv = kv_heads * (layer.head_dim + layer.v_dim)
        inner = max(inner, heads * (layer.head_dim + layer.v_dim) + kv)
        partial = max(partial, heads * (layer.v_dim + 1) * 4)
        shard = max(shard, kv * e)
    wide = max(inner, 3 * -(-model.widest // tp))
    ring = 2 * -(-job.context // job.cp) * shard if job.cp > 1 else 0
    return rows * (e * (2 * model.hidden + wide) + partial) + ring + model.vocab * (e + 4)


def memory_of(model: ModelShape, device: Device, job: Job) -> RankMemory:
    """The memory of the rank that holds most, with the context's blocks dealt out evenly."""
    total = int(device.memory.gib * GIB)
    reserved = int(device.memory.reserved_gib * GIB)
    weights = model.of_rank(job.tp) * job.element
    left = max(0, total - reserved - weights)
    blocks = math.ceil(math.ceil(job.context / BLOCK) / job.cp)
    return RankMemory(
        total=total,
        reserved=reserved,
        weights=weights,
        kv=blocks * block_bytes(model, job.element, job.tp),
        activations=activation_bytes(model, job),
        kv_room=int(left * device.memory.kv_share),
    )


@dataclass(frozen=True)
class HostRoom:
    """What the hosts' memory keeps beside the devices: ``tokens`` of all ranks; ``back_s``: seconds
    in which the KV of the job's context comes back, a part to each rank; None where the device's
    rate is not known."""

    tokens: int
    back_s: float | None


def host_room(model: ModelShape, device: Device, job: Job) -> HostRoom:
    """Of the job's ``host_memory``, in whole blocks."""
    block = block_bytes(model, job.element, job.tp)
    rate = device.memory.host_gb_per_s
    mine = math.ceil(math.ceil(job.context / BLOCK) / job.cp) * block
    tokens = job.host_memory // block * job.cp * BLOCK
    return HostRoom(tokens, mine / (rate * 1e9) if rate else None)


def largest_context(model: ModelShape, device: Device, job: Job) -> list[tuple[int, int]]:
    """(ranks, tokens): the largest context that 1, 2, 4, ... groups of ``tp`` ranks hold, up to the
    job's, by their KV alone: the sum of whole blocks."""
    room = memory_of(model, device, job).kv_room
    blocks = room // block_bytes(model, job.element, job.tp)
    return [(n * job.tp, n * blocks * BLOCK) for n in counts(job.cp)]
