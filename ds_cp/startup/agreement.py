"""A phase that can fail on one rank alone ends with an agreement: all ranks learn of all."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import msgspec
import torch

from ds_cp.comm.control import Control
from ds_cp.comm.wire import World
from ds_cp.errors import (
    CommError,
    ConfigError,
    DsCpError,
    ModelError,
    TopologyError,
    UnsupportedModelError,
    UserError,
)

T = TypeVar("T")
REPORT = 1024  # bytes of a rank's report to rank 0
MESSAGE = 800  # bytes of the message in it
KINDS: tuple[type[DsCpError], ...] = (
    CommError, ConfigError, ModelError, TopologyError, UnsupportedModelError,
)  # fmt: skip


class Report(msgspec.Struct, array_like=True):
    exit_code: int  # 0: all is well
    message: str
    kv_blocks: int = 0
    kind: str = ""  # class of the error


def agreed(world: World, work: Callable[[], T]) -> T:
    """Do ``work`` here; raise on every rank if it failed on any, with the first one's reason."""
    mine, result = Report(0, ""), None
    failure: DsCpError | None = None
    try:
        result = work()
    except DsCpError as err:
        failure, mine = err, Report(err.exit_code, str(err), kind=type(err).__name__)
    except MemoryError:
        failure = UserError("not enough memory; lower kv_cache or use fewer ranks a host")
        mine = Report(2, str(failure))
    except Exception as err:  # our own fault: say it on every rank rather than hang the others
        traceback.print_exc()
        failure = DsCpError(f"{type(err).__name__}: {err} (this is a fault of ds_cp)")
        mine = Report(1, str(failure))
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


def exchange_reports(world: World, mine: Report) -> list[Report]:
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
        reports.append(msgspec.msgpack.decode(data[at + 2 : at + 2 + length], type=Report))
    return reports


def gather_blocks(world: World, mine: int) -> list[int]:
    return [report.kv_blocks for report in exchange_reports(world, Report(0, "", mine))]
