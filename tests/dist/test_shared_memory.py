"""Shared memory between real ranks: who has it, who cannot, and what is said when one fails."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_cp.comm.failure import failing
from ds_cp.comm.shared_memory import Neighbours, Process, SharedMemory
from ds_cp.comm.wire import Group, World
from ds_cp.errors import CommError, RankFailedError
from ds_cp.native import Library, load
from tests.helpers.ranks import RankError, run_ranks, world_group

pytestmark = [
    pytest.mark.cpu_only("what carries CPU tensors; has a test of its own marked gpu"),
    pytest.mark.skipif(
        not isinstance(load(), Library), reason=f"{load()}; then run these tests again"
    ),
]


# --- eight ranks on however few cores there are


def eight_ranks(world: World) -> dict[str, Any]:
    group = world_group(world)
    pairs = world.group("pairs", [[r, r + 1] for r in range(0, world.size, 2)])
    found: dict[str, Any] = {"carriers": {type(g.transport).__name__ for g in (group, pairs)}}
    everybody_to_everybody(group)
    found["sums"] = [in_rank_order(group, dtype, n) for dtype, n in SUMS]
    found["plan"] = big_broadcast(group)
    two_groups_at_once(group, pairs)
    found["open"] = [name for fd in os.listdir("/proc/self/fd") if "memfd" in (name := link(fd))]
    found["maps"] = sum("memfd:ds_cp" in line for line in Path("/proc/self/maps").open())
    group.barrier()
    world.leave()
    found["maps after"] = sum("memfd:ds_cp" in line for line in Path("/proc/self/maps").open())
    return found


def link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def everybody_to_everybody(group: Group) -> None:
    """Messages of several lengths and types from each to each, the longest through in pieces."""
    me = group.rank
    others = [r for r in range(group.size) if r != me]

    def message(source: int, target: int, i: int) -> torch.Tensor:
        length = (1, 77, 300_000)[i] + source
        return torch.arange(length).add(10 * source + target).to(torch.float32)

    for _ in range(3):
        sends = [(r, message(me, r, i)) for r in others for i in range(3)]
        recvs = [(r, torch.empty_like(message(r, me, i))) for r in others for i in range(3)]
        group.exchange(sends, recvs, "all").wait()
        expected = [message(r, me, i) for r in others for i in range(3)]
        assert all(torch.equal(got, want) for (_, got), want in zip(recvs, expected, strict=True))


SUMS = [(torch.float32, 10), (torch.float32, 99_999), (torch.bfloat16, 1000), (torch.int64, 5)]


def in_rank_order(group: Group, dtype: torch.dtype, n: int) -> tuple[bool, str]:
    """Whether the sum has the bits of a sum in rank order, and a word that is the bits."""
    parts = [torch.rand(n, generator=torch.Generator().manual_seed(r)) * 100 for r in range(8)]
    parts = [part.to(dtype) for part in parts]
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    want = torch.zeros(n, dtype=wide)
    for part in parts:
        want = want + part.to(wide)
    x = parts[group.rank].clone()
    group.all_reduce(x, "sum")
    return torch.equal(x, want.to(dtype)), str(x.double().sum().item())


def big_broadcast(group: Group) -> bool:
    """Longer than a ring."""
    want = torch.arange(3_000_000, dtype=torch.int32)
    x = want.clone() if group.rank == 0 else torch.zeros_like(want)
    group.broadcast(x, "plan")
    return torch.equal(x, want)


def two_groups_at_once(group: Group, pairs: Group) -> None:
    """Groups do not wait for each other's order: rank 0 expects early what others send last."""
    rows = [torch.zeros(4) for _ in range(group.size)]
    others = list(enumerate(rows))[1:] if group.rank == 0 else []
    pending = group.exchange([], others, "early")
    got = torch.zeros(50_000)
    sent = torch.full((50_000,), float(group.rank))
    pairs.exchange([(1 - pairs.rank, sent)], [(1 - pairs.rank, got)], "later").wait()
    assert got.eq(group.rank ^ 1).all()
    if group.rank:
        group.exchange([(0, torch.full((4,), float(group.rank)))], [], "early").wait()
    pending.wait()
    assert all(row.eq(r).all() for r, row in others)


def test_eight_ranks() -> None:
    found = run_ranks(eight_ranks, 8)
    for rank in found:
        assert rank["carriers"] == {"SharedMemory"}
        assert rank["plan"] and rank["open"] == []  # nothing to open it by
        assert rank["maps"] >= 3 and rank["maps after"] == 0
        assert [same for same, _ in rank["sums"]] == [True] * len(SUMS)
        assert rank["sums"] == found[0]["sums"]


# --- messages longer than a ring

LATE_S = 0.3


def long_before_work(world: World, come: Path) -> bool:
    """Rank 0 sends more than the ring takes and then computes until its peer, which comes late for
    it, has all of it; whether that happens."""
    group = world.group("pair", [[0, 1]])
    message = torch.arange(16 * 2**20 // 4, dtype=torch.int32)
    group.barrier()
    if world.rank == 0:
        pending = group.exchange([(1, message)], [], "long")
        pending.before_work()
        end = time.monotonic() + 20
        while not come.exists() and time.monotonic() < end:
            time.sleep(0.01)
        found_all = come.exists()
        pending.wait()
        return found_all
    time.sleep(LATE_S)
    found = torch.zeros_like(message)
    pending = group.exchange([], [(0, found)], "long")
    pending.before_work()
    pending.wait()
    come.touch()
    return torch.equal(found, message)


def test_what_a_ring_does_not_take_is_sent_before_the_sender_computes(tmp_path: Path) -> None:
    """Else who comes late waits for the sender's work, and is late again for the next layer: 32K
    tokens over two ranks took 89 to 102 s instead of 68."""
    assert run_ranks(long_before_work, 2, tmp_path / "come") == [True, True]


# --- ranks that cannot


def one_cannot(world: World) -> list[Any]:
    """Rank 2 has no library; then the ranks see rank 1 in another namespace; then nobody lacks."""
    ranks = list(range(world.size))
    pids = [torch.zeros(1, dtype=torch.int64) for _ in ranks]
    mine = torch.tensor([os.getpid()])
    others = [r for r in ranks if r != world.rank]
    send = [(r, mine) for r in others]
    world.everybody.exchange(send, [(r, pids[r]) for r in others], "pids").wait()
    pids[world.rank] = mine

    def neighbours(find: Any = load, odd: int = -1, timeout_s: float = 30.0) -> Neighbours:
        processes = [
            Process(int(pid), "elsewhere" if r == odd else "here", "host")
            for r, pid in enumerate(pids)
        ]
        return Neighbours(world.rank, ranks, processes, world.store, timeout_s, 2, 1, find)

    lacks = neighbours(lambda: "there is no library") if world.rank == 2 else neighbours()
    found: list[Any] = [lacks.join("a", ranks, ranks), neighbours(odd=1).join("b", ranks, ranks)]
    if world.rank == 0:  # and the first, which would make the memory
        found.append(neighbours(lambda: "nothing here").join("c", ranks, ranks))
    else:
        found.append(neighbours().join("c", ranks, ranks))
    last = neighbours().join("d", ranks, ranks)
    assert isinstance(last, SharedMemory), last
    last.close()
    return found


def test_if_one_rank_cannot_share_none_does_and_all_say_why() -> None:
    found = run_ranks(one_cannot, 3)
    assert found[0] == found[1] == found[2]
    assert found[0][0] == "rank 2: there is no library"
    assert found[0][1] == "rank 0: rank 1 is in another pid namespace"
    assert found[0][2] == "rank 0: nothing here"


def carriers_of(world: World) -> tuple[str, list[str]]:
    group = world_group(world)
    group.barrier()
    return type(group.transport).__name__, world.notes


def test_switched_off_it_is_gloo_without_a_word() -> None:
    assert run_ranks(carriers_of, 2, shared_memory=False) == [("ProcessGroup", [])] * 2


# --- failures


def one_fails(world: World, notes: Path) -> None:
    """Rank 1 fails in its own work while the others wait for it, and for each other."""
    group = world_group(world)
    group.barrier()
    began = time.monotonic()
    try:
        with failing(world):
            if world.rank == 1:
                time.sleep(0.3)
                raise ValueError("the cause")
            peer = 1 if world.rank == 0 else world.rank - 2  # 2 waits for 0, 3 for 1
            group.exchange([], [(peer, torch.zeros(3))], "wait").wait()
    except RankFailedError as err:
        note = [time.monotonic() - began, str(err)]
        (notes / f"{world.rank}.json").write_text(json.dumps(note))


def test_a_rank_that_fails_wakes_all_and_each_says_the_cause(tmp_path: Path) -> None:
    run_ranks(one_fails, 4, tmp_path)
    for rank in range(4):
        seconds, text = json.loads((tmp_path / f"{rank}.json").read_text())
        assert text == "rank 1 on localhost: ValueError: the cause"
        assert seconds < 30  # comm.timeout_s is 60


def one_stops(world: World, notes: Path) -> None:
    """Rank 1 is stopped: alive and silent. Rank 2 is killed."""
    group = world_group(world)
    group.barrier()
    if world.rank == 1:
        (notes / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    if world.rank == 2:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    if world.rank == 0:
        found = []
        for peer in (2, 1):
            pending = group.exchange([], [(peer, torch.zeros(3))], "wait")
            began = time.monotonic()
            with pytest.raises(CommError) as caught:
                pending.wait()
            found.append([time.monotonic() - began, str(caught.value)])
        (notes / "found.json").write_text(json.dumps(found))
        os.kill(int((notes / "pid").read_text()), signal.SIGKILL)


def test_a_killed_peer_is_gone_and_a_stopped_one_silent(tmp_path: Path) -> None:
    limit = 5.0
    with pytest.raises(RankError, match="rank"):
        run_ranks(one_stops, 3, tmp_path, comm_timeout=limit, timeout=60)
    (gone_s, gone), (silent_s, silent) = json.loads((tmp_path / "found.json").read_text())
    assert "a peer is gone" in gone and "rank 2: its process has ended" in gone and gone_s < limit - 1
    assert f"a peer was silent for {limit:g} s (rank 1)" in silent and silent_s >= limit


# --- ranks that share a GPU


def on_one_gpu(world: World) -> tuple[str, int, list[float]]:
    group = world_group(world)
    peer = 1 - world.rank
    x = torch.full((100_000,), float(world.rank), device=world.device)
    y = torch.empty_like(x)
    pending = group.exchange([(peer, x.add_(1))], [(peer, y)], "x")
    x.zero_()  # what was sent is what was there when it was posted
    pending.wait()
    group.all_reduce(y, "sum")
    group.broadcast(y, "plan")
    world.wait_for_device()
    return world.backend, world.sharing, y.unique().tolist()


@pytest.mark.gpu
def test_two_ranks_exchange_tensors_of_one_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; run `pytest -m gpu tests/dist/test_shared_memory.py` on one")
    for shared in (True, False):
        found = run_ranks(on_one_gpu, 2, device="cuda:0", shared_memory=shared)
        assert found == [("gloo", 2, [3.0])] * 2
