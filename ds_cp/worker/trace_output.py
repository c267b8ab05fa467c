"""What all ranks recorded becomes one file on rank 0's host."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec
import torch

from ds_cp.comm.wire import World
from ds_cp.errors import OutputError
from ds_cp.trace.chrome import TraceFile
from ds_cp.trace.clocks import Clock, Offset, Ping, offset_of
from ds_cp.trace.recorder import RECORD, Recorder, Recording, end_of, records_of
from ds_cp.version import __version__

SCHEME = "trace"  # name in the ledger
PINGS = 8  # messages to each rank and back, of which the quickest counts


class TraceOutput:
    """Gathers and writes the trace. Collective, made when recording begins: clocks of ranks are
    compared then and at the end. Rank 0 takes one rank's records after the other, so it never has
    more than two ranks' in memory."""

    def __init__(self, world: World, recorder: Recorder, file: str) -> None:
        self._world = world
        self._recorder = recorder
        self._file = file
        self._first = _offsets(world, recorder)

    def write(self) -> str:
        """Write the file; on rank 0, a line that says what is in it, else "". Collective, and all
        ranks take part to the end even where rank 0 cannot write: it raises ``OutputError`` then.
        """
        world = self._world
        last = _offsets(world, self._recorder)
        recording, data = self._recorder.recording()
        head = msgspec.msgpack.encode(recording)
        newest = recording.steps[-1][0] if recording.steps else -1
        mine = torch.tensor([newest, len(head), len(data)])
        if world.rank != 0:
            world.everybody.exchange([(0, mine)], [], SCHEME).wait()
            payload = torch.frombuffer(bytearray(head + data), dtype=torch.uint8)
            world.everybody.exchange([(0, payload)], [], SCHEME).wait()
            return ""
        sizes = [mine, *(torch.zeros_like(mine) for _ in range(world.size - 1))]
        coming = list(enumerate(sizes))[1:]
        world.everybody.exchange([], coming, SCHEME).wait()
        clocks = [Clock(a, b) for a, b in zip(self._first, last, strict=True)]
        newest = min(int(size[0]) for size in sizes)
        gather = _Gather(world, newest, clocks, self._first[0].at)
        known = len(recording.steps) + recording.left_out
        kept = sum(number <= newest for number, _ in recording.steps)
        about = {
            "version": __version__, "ranks": world.size, "hosts": list(world.topology.hosts),
            "device": world.device.type, "steps": kept, "left_out_steps": known - kept,
            "clock_error_us": max((o.error for o in (*self._first, *last) if o.offset), default=0)
            / 1000,
        }  # fmt: skip
        failure: OSError | None = None
        part = f"{self._file}.part"
        count = 0
        try:
            with open(part, "w", encoding="utf-8", buffering=1 << 20) as out:
                trace = TraceFile(out, about)
                count = gather.to_file(trace, recording, data, sizes)
                trace.end()
            os.replace(part, self._file)
        except OSError as err:
            failure = err
            gather.drop(sizes)
        if failure is not None:
            raise OutputError(
                f"cannot write the trace to {self._file}: {failure.strerror or failure}; "
                "name another file in trace.file"
            )
        line = f"trace of {kept} steps, {count} spans on {world.size} ranks: {self._file}"
        if known > kept:
            line += f"; {known - kept} later steps had no room (trace.max_events)"
        return line


class _Gather:
    """Rank 0's side: the ranks' records, one rank after the other."""

    def __init__(self, world: World, newest: int, clocks: Sequence[Clock], base: int) -> None:
        self._world = world
        self._newest = newest
        self._clocks = clocks
        self._base = base  # rank 0's time that is 0 in the file
        self._taken = 0  # ranks whose records came

    def to_file(
        self, trace: TraceFile, mine: Recording, data: bytes, sizes: Sequence[torch.Tensor]
    ) -> int:
        """Write all of them; the number of spans. ``OSError`` when the file cannot be written."""
        count = self._rank(trace, 0, mine, memoryview(data))
        while self._taken + 1 < self._world.size:
            payload = self._receive(sizes)
            cut = int(sizes[self._taken][1])
            recording = msgspec.msgpack.decode(payload[:cut], type=Recording)
            count += self._rank(trace, self._taken, recording, payload[cut:])
        return count

    def drop(self, sizes: Sequence[torch.Tensor]) -> None:
        """Receive what is left, so that no rank waits."""
        while self._taken + 1 < self._world.size:
            self._receive(sizes)

    def _receive(self, sizes: Sequence[torch.Tensor]) -> memoryview:
        self._taken += 1
        size = sizes[self._taken]
        payload = torch.empty(int(size[1] + size[2]), dtype=torch.uint8)
        self._world.everybody.exchange([], [(self._taken, payload)], SCHEME).wait()
        content: memoryview = payload.numpy().data
        return content

    def _rank(self, trace: TraceFile, rank: int, recording: Recording, data: memoryview) -> int:
        clock, base = self._clocks[rank], self._base
        last = end_of(recording, self._newest, len(data) // RECORD.size)
        return trace.rank(
            rank, self._world.topology.hosts[rank], recording.names, records_of(data, 0, last),
            lambda time: clock.aligned(time) - base,
        )  # fmt: skip


def _offsets(world: World, recorder: Recorder) -> list[Offset]:
    """Every rank's clock against rank 0's, on rank 0; none elsewhere. Collective."""
    group = world.everybody
    note = torch.zeros(1, dtype=torch.int64)
    if world.rank != 0:
        for _ in range(PINGS):
            group.exchange([], [(0, note)], SCHEME).wait()
            note[0] = recorder.now
            group.exchange([(0, note)], [], SCHEME).wait()
        return []
    found = [Offset(recorder.now, 0, 0)]
    for rank in range(1, world.size):
        pings = []
        for _ in range(PINGS):
            left = recorder.now
            group.exchange([(rank, note)], [], SCHEME).wait()
            group.exchange([], [(rank, note)], SCHEME).wait()
            pings.append(Ping(left, int(note[0]), recorder.now))
        found.append(offset_of(pings))
    return found
