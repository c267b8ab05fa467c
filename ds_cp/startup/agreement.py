"""Start-up runs in phases; each ends with an agreement, so that all ranks go on or all raise.

A phase is one of two kinds. ``local_phase`` runs work that may fail on one rank alone; the groups
refuse every exchange within it, since a peer would wait in it for the rank that failed.
``joint_phase`` runs work that exchanges messages; that work must carry out its exchanges even when
it fails in between (``RowSums.expected`` does), so that its peers reach the agreement as well.

What is not agreed on, as the loss of a peer or a fault between two phases, ends the job on every
rank as a failed step does (``comm.failure.failing``).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

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
    is_out_of_memory,
)

T = TypeVar("T")
REPORT = 1024  # bytes of a rank's report to rank 0
MESSAGE = 800  # bytes of the message in it
# Errors that keep their class on every rank.
KINDS: tuple[type[DsCpError], ...] = (
    CommError, ConfigError, ModelError, TopologyError, UnsupportedModelError,
)  # fmt: skip


class Report(msgspec.Struct, array_like=True):
    """What one rank says at the end of a phase. ``exit_code`` 0: all is well; ``kind``: the class
    of the error. ``kv_blocks`` and ``digests``: values that all ranks need, in some phases."""

    exit_code: int
    message: str
    kv_blocks: int = 0
    kind: str = ""
    digests: tuple[str, ...] = ()


def local_phase(world: World, work: Callable[[], T]) -> T:
    """Run ``work``, which exchanges nothing; raise on every rank if it failed on any.

    The error is that of the first rank that failed, with its rank and host unless all ranks say
    the same.
    """
    with world.local_work():
        result, failure = _attempt(work)
    return _agree(world, result, failure)


def joint_phase(world: World, work: Callable[[], T]) -> T:
    """As ``local_phase``, for work whose exchanges all ranks carry out even if one fails.

    Where the exchange itself broke (``CommError``) no other follows: that error is raised at once.
    """
    result, failure = _attempt(work)
    if isinstance(failure, CommError):
        raise failure
    return _agree(world, result, failure)


def agreed(world: World, err: DsCpError) -> DsCpError:
    """``err``, which every rank is about to raise, so that no rank publishes it: the world is of
    use still."""
    world.agreed = err
    return err


def exchange_reports(world: World, mine: Report) -> list[Report]:
    """Every rank's report, on every rank; an empty one of those that are away."""
    short = mine.message.encode()[:MESSAGE].decode(errors="ignore")
    raw = msgspec.msgpack.encode(msgspec.structs.replace(mine, message=short))
    frame = torch.zeros(REPORT, dtype=torch.uint8)
    frame[: len(raw) + 2] = torch.frombuffer(
        bytearray(len(raw).to_bytes(2, "little") + raw), dtype=torch.uint8
    )
    frames = [torch.zeros_like(frame) for _ in range(world.size)]
    frames[0] = frame
    others = [(r, frames[r]) for r in world.members if r]
    control = Control(world)
    control.collect(frame, others if world.rank == 0 else [])
    everything = torch.cat(frames).numpy().tobytes() if world.rank == 0 else None
    data = control.broadcast(everything)
    reports = []
    for at in range(0, world.size * REPORT, REPORT):
        length = int.from_bytes(data[at : at + 2], "little")
        raw = data[at + 2 : at + 2 + length]
        reports.append(msgspec.msgpack.decode(raw, type=Report) if raw else Report(0, ""))
    return reports


def gather_blocks(world: World, mine: int) -> list[int]:
    """Every rank's number of KV blocks, on every rank."""
    return [report.kv_blocks for report in exchange_reports(world, Report(0, "", mine))]


def gather_told(
    world: World, names: Sequence[str], reasons: Mapping[str, str]
) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """Every rank's names, and its reasons by name, on every rank. Names have no blanks; a reason
    becomes one line and is cut where all together would be too long, so that none is lost."""
    room = MESSAGE // max(1, len(reasons)) - 1  # bytes of each, without the line's end
    lines = [
        f"{name} {' '.join(reason.split())}".encode()[:room].decode(errors="ignore")
        for name, reason in reasons.items()
    ]
    reports = exchange_reports(world, Report(0, "\n".join(lines), digests=tuple(names)))
    told = []
    for report in reports:
        pairs = (line.partition(" ") for line in report.message.splitlines())
        told.append((report.digests, {name: reason for name, _, reason in pairs}))
    return told


def _attempt(work: Callable[[], T]) -> tuple[T | None, DsCpError | None]:
    """The result of ``work``, or the error to report."""
    try:
        return work(), None
    except DsCpError as err:
        return None, err
    except Exception as err:
        if is_out_of_memory(err):
            first = (str(err).splitlines() or [""])[0][:200]
            cause = f" ({first})" if first else ""
            return None, UserError(
                f"not enough memory{cause}: lower kv_cache or use fewer ranks a host"
            )
        # A fault of ds_cp: reported on every rank rather than hang the others.
        traceback.print_exc()
        return None, DsCpError(f"{type(err).__name__}: {err} (this is a fault of ds_cp)")


def _agree(world: World, result: T | None, failure: DsCpError | None) -> T:
    mine = Report(0, "")
    if failure is not None:
        mine = Report(failure.exit_code, str(failure), kind=type(failure).__name__)
    reports = exchange_reports(world, mine)
    failed = [rank for rank, report in enumerate(reports) if report.exit_code]
    if failed:
        first = reports[failed[0]]
        everywhere = len({(r.exit_code, r.message) for r in reports}) == 1
        if failure is not None and everywhere:
            raise agreed(world, failure)
        where = f"rank {failed[0]} on {world.topology.hosts[failed[0]]}: "
        raise agreed(world, _kind(first)(where + first.message)) from failure
    return cast(T, result)  # nothing failed, so this is what ``work`` returned


def _kind(report: Report) -> type[DsCpError]:
    """The class of error that a rank reported, or the nearest one that has its exit code."""
    other = UserError if report.exit_code == 2 else DsCpError
    return next((kind for kind in KINDS if kind.__name__ == report.kind), other)
