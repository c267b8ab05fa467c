"""What all ranks recorded becomes one file on rank 0's host."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import IO

import msgspec
import torch

from ds_cp.comm.wire import World
from ds_cp.errors import OutputError
from ds_cp.trace.chrome import TraceFile
from ds_cp.trace.clocks import Clock, Offset, Ping, offset_of
from ds_cp.trace.recorder import RECORD, Recorder, Recording, common_end, end_of, records_of
from ds_cp.trace.writing import part_of
from ds_cp.version import __version__

Buffer = bytes | bytearray
SCHEME = "trace"  # name in the ledger
PINGS = 8  # messages to each rank and back, of which the quickest counts


class TraceOutput:
    """Gathers and writes the trace. Collective, made when recording begins: clocks of ranks are
    compared then and at the end. Rank 0 lays what the other ranks recorded on its disk, one rank
    after the other, and turns it into events when all of them have gone: seconds for each 100,000
    spans, which no rank should have to wait for. So it has one rank's spans in memory at a time.
    """

    def __init__(self, world: World, recorder: Recorder, file: str) -> None:
        self._world = world
        self._recorder = recorder
        self._file = file
        self._first = _offsets(world, recorder)

    def lost(self) -> str:
        """On rank 0, a line that says that no trace is written, since the job has failed."""
        return "" if self._world.rank else f"no trace is written to {self._file}: the job failed"

    def write(self) -> str:
        """Write the file; on rank 0, a line that says what is in it, else "". Collective, and all
        ranks take part to the end even where rank 0 cannot write: it raises ``OutputError`` then.
        """
        world = self._world
        last = _offsets(world, self._recorder)
        recording, data = self._recorder.recording()
        head = bytearray(msgspec.msgpack.encode(recording))
        mine = torch.tensor([len(head), len(data)])
        if world.rank != 0:
            world.everybody.exchange([(0, mine)], [], SCHEME).wait()
            for content in filter(None, (head, data)):
                payload = torch.frombuffer(content, dtype=torch.uint8)
                world.everybody.exchange([(0, payload)], [], SCHEME).wait()
            return ""
        sizes = [mine, *(torch.zeros_like(mine) for _ in range(world.size - 1))]
        coming = list(enumerate(sizes))[1:]
        world.everybody.exchange([], coming, SCHEME).wait()
        clocks = [Clock(a, b) for a, b in zip(self._first, last, strict=True)]
        error = max((o.error for o in (*self._first, *last) if o.offset), default=0)
        part = Path(part_of(self._file))
        others = _Others(world, sizes, part)
        try:
            part.touch()  # who waits for this process sees that it has begun
            with tempfile.TemporaryFile(dir=part.absolute().parent) as spool:
                heads = [recording, *others.take(spool)]
                spool.seek(0)
                own: list[Buffer] = [data]
                parts = chain(own, (spool.read(int(size[1])) for size in sizes[1:]))
                kept, left_out, count = self._write(heads, parts, clocks, error)
        except OSError as err:
            others.drop()
            raise OutputError(
                f"cannot write the trace to {self._file}: {err.strerror or err}; "
                "name another file in trace.file"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
        line = f"trace of {kept} steps, {count} spans on {world.size} ranks: {self._file}"
        if left_out:
            line += f"; {left_out} later steps had no room (trace.max_events)"
        return line

    def _write(
        self, heads: Sequence[Recording], parts: Iterable[Buffer], clocks: Sequence[Clock],
        error: int,
    ) -> tuple[int, int, int]:  # fmt: skip
        """The file, of the steps that every rank has kept: how many these are, how many are not in
        it, and the number of spans. ``parts``: each rank's records; ``error``:
        of the clocks, nanoseconds."""
        world, newest = self._world, common_end(heads)
        kept = sum(number <= newest for number, _ in heads[0].steps)
        left_out = len(heads[0].steps) + heads[0].left_out - kept
        about = {
            "version": __version__, "ranks": world.size, "hosts": list(world.topology.hosts),
            "device": world.device.type, "steps": kept, "left_out_steps": left_out,
            "clock_error_us": error / 1000,
        }  # fmt: skip
        part, base = part_of(self._file), self._first[0].at  # rank 0's time that is 0 in the file
        count = 0
        with open(part, "w", encoding="utf-8", buffering=1 << 20) as out:
            trace = TraceFile(out, about)
            for rank, data in enumerate(parts):
                clock, recording = clocks[rank], heads[rank]
                last = end_of(recording, newest, len(data) // RECORD.size)
                count += trace.rank(
                    rank, world.topology.hosts[rank], recording.names,
                    records_of(data, 0, last),
                    lambda time, clock=clock: clock.aligned(time) - base,  # type: ignore[misc]
                )  # fmt: skip
            trace.end()
        os.replace(part, self._file)
        return kept, left_out, count


class _Others:
    """Rank 0's side: what the other ranks send, one after the other. ``sizes``: of each rank, bytes
    of its ``Recording``, bytes of its records; ``part``: is touched whenever something is there."""

    def __init__(self, world: World, sizes: Sequence[torch.Tensor], part: Path) -> None:
        self._world = world
        self._part = part
        self._left = [(r, n) for r, s in enumerate(sizes) if r for n in s.tolist() if n]
        self._sizes = sizes

    def take(self, spool: IO[bytes]) -> list[Recording]:
        """Receive all; the records go to ``spool``, in the order of ranks. ``OSError``."""
        heads = []
        for size in self._sizes[1:]:
            heads.append(msgspec.msgpack.decode(self._receive(), type=Recording))
            if int(size[1]):
                spool.write(self._receive())
            self._part.touch()
        return heads

    def drop(self) -> None:
        """Receive what is left, so that no rank waits."""
        while self._left:
            self._receive()

    def _receive(self) -> memoryview:
        rank, size = self._left.pop(0)
        payload = torch.empty(size, dtype=torch.uint8)
        self._world.everybody.exchange([], [(rank, payload)], SCHEME).wait()
        content: memoryview = payload.numpy().data
        return content


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
