"""Groups, exchanges and the plan channel: what they refuse, what arrives, that nothing hangs."""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deepspeed.comm as ds_comm
import psutil
import pytest
import torch

import ds_cp
from ds_cp.attention import LayerSpec, Span, attention
from ds_cp.comm.control import Control
from ds_cp.comm.pending import Pending
from ds_cp.comm.ring import RingExchange
from ds_cp.comm.tree import RowBlock, TreeRoutes
from ds_cp.comm.wire import Group, Rendezvous, World, join
from ds_cp.errors import CommError, ConfigError, LaunchError
from tests.helpers.engines import tiny_llama
from tests.helpers.oracle import full_attention
from tests.helpers.ranks import RankError, run_ranks, run_ranks_briefly, world_group

pytestmark = pytest.mark.cpu_only("what carries CPU tensors")


def joins_again(world: World) -> None:
    """A second job of several ranks is refused before anything waits; one of a rank is not in the
    way of the first."""
    with pytest.raises(LaunchError, match="has joined a job already, by another engine") as caught:
        join(
            world.rank, 2, Rendezvous("127.0.0.1", 1), host="a", hosts=None, device=world.device,
            timeout_s=5,
        )  # fmt: skip
    assert "engine.shutdown()" in str(caught.value) and "\n" not in str(caught.value)
    config = {"kv_cache": {"tokens_per_rank": 64, "block_size": 16}}
    engine = ds_cp.init_inference(tiny_llama(), config, env={})
    assert len(engine.generate([1, 2, 3])[0].outputs[0].token_ids) == 16
    engine.shutdown()
    world.everybody.barrier()


def test_one_job_a_process() -> None:
    run_ranks(joins_again, 2)


SIZES = [0, 1, Control.FRAME - 8, Control.FRAME - 7, 2**20, 3]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


def refusal(kind: type[Exception], call: Callable[..., Any], *args: Any) -> str:
    """The message of the error that ``call(*args)`` must raise."""
    with pytest.raises(kind) as caught:
        call(*args)
    return str(caught.value)


# --- four ranks, one start-up


def four_ranks(world: World) -> dict[str, Any]:
    whole = world.group("cp", [[0, 1, 2, 3]])
    checks = [
        misuse_of_a_ring, prepared_rounds, refused_messages, refused_groups,
        messages_keep_their_order,
    ]  # fmt: skip
    for check in checks:
        check(world, whole)
        whole.barrier()
    return {
        "carrier": type(whole.transport).__name__,
        "sums": sums_over_sub_groups(world),
        "plans": [plan(world, size) for size in SIZES],
        "oversize": oversize(world),
        "collected": collected(world),
        "sub_world": sub_worlds(world),
        "listening": listening(),
        "alone": size_one_groups(world, whole),
    }


def misuse_of_a_ring(world: World, group: Group) -> None:
    """A second post, a wait too many: refused before anything is sent, and the ring goes on."""
    world.ledger.clear()
    ring = RingExchange(group, [0, 1, 2, 3], "ring")
    mine, there = torch.full((5,), float(world.rank)), torch.empty(5)
    assert refusal(RuntimeError, ring.wait) == "ring: wait without a post"
    for hop in range(1, 4):
        ring.post(mine, there)
        assert "post before" in refusal(RuntimeError, ring.post, mine, torch.empty(5))
        assert ring.wait() is there
        assert there.tolist() == [ring.origin(hop)] * 5 == [(world.rank - hop) % 4] * 5
        assert refusal(RuntimeError, ring.wait) == "ring: wait without a post"
        mine, there = there, torch.empty(5)
    assert world.ledger["ring"].bytes == 3 * 5 * 4 and world.ledger["ring"].exchanges == 3
    others = [r for r in range(4) if r != world.rank]
    assert "not in the ring" in refusal(ValueError, RingExchange, group, others, "ring")

    pending = group.exchange([(ring.next, mine)], [(ring.prev, there)], "once")
    pending.wait()
    assert "waited for twice" in refusal(RuntimeError, pending.wait)
    nothing = group.exchange([], [], "once")
    nothing.wait()
    assert "waited for twice" in refusal(RuntimeError, nothing.wait)


def prepared_rounds(world: World, group: Group) -> None:
    """Checked once and started often: each start sends what is there then and is booked as an
    exchange; one without messages is none."""
    world.ledger.clear()
    me, size = group.rank, group.size
    mine, there = torch.empty(700), torch.empty(700)
    one = group.prepare([((me + 1) % size, mine)], [((me - 1) % size, there)], "prepared")
    for i in range(4):
        mine.fill_(10 * i + me)
        pending = one.start()
        pending.wait()
        assert there.eq(10 * i + (me - 1) % size).all()
        assert "waited for twice" in refusal(RuntimeError, pending.wait)
        mine.fill_(-1)  # what was sent is on its way
    entry = world.ledger["prepared"]
    assert (entry.bytes, entry.exchanges) == (4 * 700 * 4, 4)
    nothing = group.prepare([(1 - min(me, 1), torch.empty(0))], [], "nothing")
    for _ in range(2):
        nothing.start().wait()
    assert world.ledger["nothing"].exchanges == 0
    with world.local_work():
        assert "local to one rank" in refusal(RuntimeError, one.start)
    strided = torch.ones(4, 4)[:, 1]
    text = refusal(ValueError, group.prepare, [((me + 1) % size, strided)], [], "bad")
    assert "must be contiguous" in text


def refused_messages(world: World, group: Group) -> None:
    """To oneself, outside the group, not contiguous: refused before anything is sent or booked."""
    world.ledger.clear()
    me, good, strided = world.rank, torch.ones(4), torch.ones(4, 4)[:, 1]
    peer = (me + 1) % 4
    for bad in (me, -1, 4):
        for sends, recvs in (([(peer, good), (bad, good)], []), ([], [(peer, good), (bad, good)])):
            text = refusal(ValueError, group.exchange, sends, recvs, "bad")
            assert f"rank {me} cannot message rank {bad}" in text
    for sends, recvs in (([(peer, good), (peer, strided)], []), ([], [(peer, strided)])):
        text = refusal(ValueError, group.exchange, sends, recvs, "bad")
        assert "must be contiguous" in text
    assert "non-contiguous" in refusal(ValueError, group.all_reduce, strided, "bad")
    assert "non-contiguous" in refusal(ValueError, group.broadcast, strided, "bad")
    assert strided.tolist() == [1.0] * 4
    assert world.ledger.schemes() == {}


def refused_groups(world: World, group: Group) -> None:
    odd: list[list[list[int]]] = [
        [[0, 1]], [[0, 1], [1, 2, 3]], [[0, 1, 2, 3, 4]], [[0, 0, 1, 2, 3]], [], [[]]
    ]  # fmt: skip
    for members in odd:
        text = refusal(ValueError, world.group, "odd", members)
        assert "is not a partition of 4 ranks" in text
    others = [r for r in range(4) if r != world.rank]
    assert "not a member" in refusal(ValueError, Group, "odd", others, world, None)


def messages_keep_their_order(world: World, group: Group) -> None:
    """Several messages of several dtypes and sizes to one peer, empty ones among them."""
    world.ledger.clear()
    me = group.rank
    to, of = (me + 1) % 4, (me - 1) % 4

    def message(rank: int, i: int) -> torch.Tensor:
        length = (i * 7) % 5 * (rank + 1)  # the first is empty
        return (torch.arange(length) + 10 * rank + i).to(DTYPES[i])

    kinds = range(len(DTYPES))
    sends = [(to, message(me, i)) for i in kinds]
    recvs = [(of, torch.empty_like(message(of, i))) for i in kinds]
    group.exchange(sends, recvs, "many").wait()
    for i in kinds:
        assert torch.equal(recvs[i][1], message(of, i)), (me, i)
    payload = sum(message(me, i).numel() * message(me, i).element_size() for i in kinds)
    assert world.ledger["many"].bytes == payload and world.ledger["many"].exchanges == 1


def sums_over_sub_groups(world: World) -> list[Any]:
    """deepspeed's ``inference_all_reduce`` ignores its group on CPU; ours must not."""
    found: list[Any] = []
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        for members in ([[0, 2], [1, 3]], [[0], [1, 2, 3]], [[3, 2, 1, 0]], [[1], [0], [3], [2]]):
            group = world.group("sum", members)
            world.ledger.clear()
            x = torch.full((3, 2), 10**world.rank, dtype=torch.int32).to(dtype)
            group.all_reduce(x, "sum")
            found.append((x.flatten().tolist(), world.ledger["sum"].bytes))
    return found


def plan(world: World, size: int) -> bool:
    payload = bytes(i * 31 % 251 for i in range(size))
    got = Control(world).broadcast(payload if world.rank == 0 else None)
    return isinstance(got, bytes) and got == payload


def oversize(world: World) -> list[str]:
    """Rank 0 refuses to send it; a rank that is announced one refuses to make room for it."""
    found = []
    if world.rank == 0:
        too_much = bytes(Control.LIMIT + 1)
        found.append(refusal(CommError, Control(world).broadcast, too_much))
        frame = torch.zeros(Control.FRAME, dtype=torch.uint8)
        frame[:8] = torch.tensor(list((2**50).to_bytes(8, "little")), dtype=torch.uint8)
        world.everybody.broadcast(frame, "plan")
    else:
        found.append(refusal(CommError, Control(world).broadcast, None))
    assert plan(world, 100)  # the channel goes on
    return found


def collected(world: World) -> list[list[float]]:
    """Rank r sends r rows, and rank 0's stay; then rank 2 sends alone and others nothing."""
    mine = torch.full((world.rank, 2), world.rank + 0.5, dtype=torch.float64)
    buffers = [torch.empty(r, 2, dtype=torch.float64) for r in range(4)]
    world.ledger.clear()
    others = list(enumerate(buffers))[1:] if world.rank == 0 else []
    Control(world).collect(mine, others)
    assert world.ledger["result"].bytes == 16 * world.rank
    again = torch.zeros(1, 2, dtype=torch.float64)
    if world.rank in (0, 2):
        Control(world).collect(again + 7, [(2, again)] if world.rank == 0 else [])
    else:
        Control(world).collect(again[:0], [])
    return [b.flatten().tolist() for b in [*buffers, again]] if world.rank == 0 else []


def sub_worlds(world: World) -> list[float]:
    """Errors of attention to fp64 in groups that do not start at rank 0, or run backwards."""
    errors = []
    for members in ([[0], [1, 2, 3]], [[2, 3], [0, 1]], [[3, 1], [2, 0]], [[1, 3, 0], [2]]):
        group = world.group("part", members)
        assert group.ranks == tuple(next(m for m in members if world.rank in m))
        assert group.ranks[group.rank] == world.rank
        assert sorted(group.ring) == list(range(group.size))
        for mode, pass_ in (("ring", "kv"), ("ring", "q"), ("tree", "kv")):
            errors.append(attention_error(group, mode, pass_))
    return errors


def attention_error(group: Group, mode: str, pass_: str) -> float:
    """Each group on its own sequence of 5 tokens a rank."""
    n = group.size
    torch.manual_seed(sum(group.ranks))
    q, k, v = (torch.randn(5 * n, heads, 8) for heads in (4, 2, 2))
    runs = tuple(((5 * r, 5),) for r in range(n))
    mine = slice(5 * group.rank, 5 * group.rank + 5)
    out = attention(
        q[mine], k[mine], v[mine], Span(runs, runs), group, LayerSpec(4, 2, 8, 0.5),
        mode=mode, ring_pass=pass_,
    )  # fmt: skip
    at = torch.arange(5 * n)
    ref, _ = full_attention(q, k, v, at, at, scale=0.5)
    return float((out.double() - ref[mine]).abs().max() / ref.abs().max())


def listening() -> list[str]:
    """Addresses on which this process listens, with one open to all beside them."""
    with socket.create_server(("0.0.0.0", 0)) as wide:
        found = [
            (c.laddr.ip, c.laddr.port)
            for c in psutil.Process().net_connections(kind="tcp")
            if c.status == psutil.CONN_LISTEN
        ]
        found.remove(("0.0.0.0", wide.getsockname()[1]))  # proof that the look-up sees such ones
    return [ip for ip, _ in found]


def size_one_groups(world: World, whole: Group) -> list[str]:
    alone = world.group("alone", [[0], [1], [2], [3]])
    found = without_calls(lambda: everything_alone(alone, world))
    whole.barrier()
    return found


def without_calls(work: Callable[[], None]) -> list[str]:
    """The names of ``deepspeed.comm``'s functions that ``work`` called."""
    names = ["isend", "irecv", "all_reduce", "broadcast", "batch_isend_irecv", "new_group"]
    kept, called = {name: getattr(ds_comm, name) for name in names}, []

    def note(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: called.append(name)

    try:
        for name in names:
            setattr(ds_comm, name, note(name))
        work()
    finally:
        for name, function in kept.items():
            setattr(ds_comm, name, function)
    return called


def everything_alone(group: Group, world: World) -> None:
    """Every entry of a group of one: no call, the same types, nothing booked."""
    world.ledger.clear()
    x = torch.arange(6.0).view(2, 3)
    group.all_reduce(x, "sum")
    assert x.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    group.barrier()
    pending = group.exchange([], [], "none")
    assert isinstance(pending, Pending)
    pending.wait()
    assert (group.size, group.rank, group.ring, group.hosts) == (1, 0, (0,), (0,))
    assert RingExchange(group, [0], "ring").size == 1
    route = TreeRoutes().find((RowBlock(0, 0, 2, (0,)),), group.hosts, group.rank)
    assert not (route.away or route.carried or route.inside or route.asked or route.between)
    for mode, pass_ in (("local", "kv"), ("ring", "kv"), ("ring", "q"), ("tree", "kv")):
        assert attention_error(group, mode, pass_) <= 2e-6
    assert world.ledger.schemes() == {}


CARRIERS = {"shared memory": ("aaaa", True), "gloo": ("aaaa", False), "both": ("abab", True)}


@pytest.fixture(scope="module", params=CARRIERS)
def four(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What four ranks found over each carrier; misuse that was not refused has failed there, with
    its traceback."""
    hosts, shared = CARRIERS[request.param]
    found = run_ranks(four_ranks, 4, hosts=list(hosts), shared_memory=shared)
    kinds = {"shared memory": "SharedMemory", "gloo": "ProcessGroup", "both": "Routed"}
    assert {rank["carrier"] for rank in found} == {kinds[request.param]}
    return found


def test_all_reduce_sums_over_the_group_only(four: list[dict[str, Any]]) -> None:
    """2(N-1)/N of the buffer per rank, too."""
    tens = [1, 10, 100, 1000]
    groups = [[{0, 2}, {1, 3}], [{0}, {1, 2, 3}], [{0, 1, 2, 3}], [{0}, {1}, {2}, {3}]]
    for rank, found in enumerate(four):
        cases = iter(found["sums"])
        for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2), (torch.int32, 4)):
            for partition in groups:
                ranks = next(g for g in partition if rank in g)
                want = float(torch.tensor(sum(tens[r] for r in ranks)).to(dtype))
                n = len(ranks)
                values, nbytes = next(cases)
                assert values == pytest.approx([want] * 6, rel=2**-7)
                assert nbytes == 2 * (n - 1) * 6 * size // n


def test_plans_arrive_whole(four: list[dict[str, Any]]) -> None:
    for found in four:
        assert found["plans"] == [True] * len(SIZES)


def test_a_plan_above_the_limit_is_refused(four: list[dict[str, Any]]) -> None:
    assert four[0]["oversize"] == [f"a plan of {2**26 + 1} bytes is above the limit {2**26}"]
    for found in four[1:]:
        assert found["oversize"] == [f"a plan of {2**50} bytes is above the limit {2**26}"]


def test_results_are_collected_by_sender(four: list[dict[str, Any]]) -> None:
    assert four[0]["collected"] == [[], [1.5] * 2, [2.5] * 4, [3.5] * 6, [7.0] * 2]


def test_groups_that_do_not_start_at_rank_0(four: list[dict[str, Any]]) -> None:
    for found in four:
        assert len(found["sub_world"]) == 12 and max(found["sub_world"]) <= 2e-6


def test_a_one_host_job_listens_on_loopback_only(four: list[dict[str, Any]]) -> None:
    assert four[0]["listening"]  # the store
    for found in four:
        assert set(found["listening"]) <= {"127.0.0.1", "::1"}


def test_groups_of_one_make_no_call(four: list[dict[str, Any]]) -> None:
    assert [found["alone"] for found in four] == [[]] * 4


def alone_in_the_world(world: World) -> list[str]:
    def work() -> None:
        group = world.group("cp", [[0]])
        everything_alone(group, world)
        for size in SIZES:
            assert plan(world, size)
        Control(world).collect(torch.ones(2), [])
        assert world.ledger.schemes() == {}

    found = without_calls(work)
    assert "above the limit" in refusal(
        CommError, lambda: Control(world).broadcast(bytes(Control.LIMIT + 1))
    )
    return found


def test_a_world_of_one_makes_no_call() -> None:
    assert run_ranks(alone_in_the_world, 1) == [[]]


# --- peers that are silent or gone


def wait_for(path: Path, limit: float) -> None:
    deadline = time.monotonic() + limit
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def timed(call: Callable[[], Any]) -> tuple[float, str]:
    began = time.monotonic()
    text = refusal(CommError, call)
    return time.monotonic() - began, text


def against_silence(world: World, limit: float, done: Path) -> dict[str, tuple[float, str]]:
    """Rank 0 says nothing until rank 1 has given up on every kind of call."""
    pairs = {name: world.group(name, [[0, 1]]) for name in ("a", "b", "c")}
    world.group("ready", [[0, 1]]).barrier()
    if world.rank == 0:
        wait_for(done, 60 + 10 * limit)
        return {}
    calls: dict[str, Callable[[], Any]] = {
        "exchange": pairs["a"].exchange([], [(0, torch.empty(3))], "hello").wait,
        "all_reduce": lambda: pairs["b"].all_reduce(torch.ones(3), "sum"),
        "ring": lambda: one_hop(pairs["c"]),
        "plan": lambda: Control(world).broadcast(None),
    }
    with ThreadPoolExecutor(len(calls)) as pool:  # each has its own group, so they wait at once
        found = dict(zip(calls, pool.map(timed, calls.values()), strict=True))
    done.touch()
    return found


def one_hop(group: Group) -> None:
    ring = RingExchange(group, [0, 1], "ring")
    ring.post(torch.ones(3), torch.empty(3))
    ring.wait()


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "gloo"])
def test_a_silent_peer_is_an_error_within_the_limit(tmp_path: Path, shared: bool) -> None:
    """In groups too: torch gives a new group half an hour unless given another limit."""
    done = tmp_path / "done"
    limit, (_, found) = run_ranks_briefly(against_silence, 2, 3.0, done, shared_memory=shared)
    names = {
        "exchange": "hello in group a",
        "all_reduce": "sum in group b",
        "ring": "ring in group c",
        "plan": "plan broadcast in group world",
    }
    for call, name in names.items():
        seconds, text = found[call]
        assert seconds < 10 * limit, (call, seconds)
        assert text.startswith(f"{name}: a peer was silent for {limit:g} s"), text
        assert "comm.timeout_s" in text and "\n" not in text
    assert found["exchange"][0] >= 0.9 * limit  # a limit, not a refusal


def against_death(world: World, notes: Path) -> None:
    group = world.group("cp", [[0, 1, 2]])
    group.barrier()
    if world.rank == 1:
        os._exit(7)
    calls: list[Callable[[], Any]] = [
        group.exchange([], [(1, torch.empty(3))], "hello").wait,
        lambda: group.all_reduce(torch.ones(3), "sum"),
    ]
    found = [timed(call) for call in calls]
    (notes / f"{world.rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_dead_peer_is_an_error_at_once(tmp_path: Path, carrier: str) -> None:
    """Long before the limit of 60 s, on every rank that waits for it."""
    with pytest.raises(RankError, match="rank 1"):
        hosts, shared = CARRIERS[carrier]
        run_ranks(
            against_death, 3, tmp_path, comm_timeout=60, hosts=list(hosts[:3]), shared_memory=shared
        )
    for rank in (0, 2):
        for seconds, text in json.loads((tmp_path / f"{rank}.json").read_text()):
            assert seconds < 30
            noticed = re.search(r"in group cp: a peer is gone, noticed ([\d.]+) s after", text)
            assert noticed and abs(float(noticed[1]) - seconds) < 5, text


# --- joining


def seat(rank: int, size: int, at: Rendezvous, timeout_s: float, digest: str = "") -> World:
    return join(
        rank, size, at, host="here", hosts=None, device=torch.device("cpu"), timeout_s=timeout_s,
        digest=digest,
    )  # fmt: skip


def rejoin(world: World) -> list[str]:
    """Join again, twice, with other digests; rank 0 names the ports while the ranks can talk."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = json.dumps([listener.getsockname()[1] for listener in listeners]).encode()
    ports = Control(world).broadcast(ports if world.rank == 0 else None)
    world.leave()
    texts = []
    for listener, port, digests in zip(listeners, json.loads(ports), ("aba", "abb"), strict=True):
        at = Rendezvous("127.0.0.1", port, listener.fileno() if world.rank == 0 else None)
        texts.append(refusal(ConfigError, seat, world.rank, 3, at, 30.0, digests[world.rank]))
    return texts


def test_ranks_started_differently_are_told_so() -> None:
    """Every rank is, also those that agree with rank 0, and the last to read."""
    for texts in run_ranks(rejoin, 3):
        assert texts[0].startswith("ranks [1] were started with another config than rank 0")
        assert texts[1].startswith("ranks [1, 2] were started with another config than rank 0")


def join_in_vain(world: World) -> dict[str, tuple[float, str]]:
    """Nobody else comes; nobody is there; the socket is not one."""

    world.leave()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as other:
        closed = other.getsockname()[1]
    here, there = (
        Rendezvous("127.0.0.1", port, listener.fileno()),
        Rendezvous("127.0.0.1", closed),
    )
    with open(os.devnull) as file:
        bad = Rendezvous("127.0.0.1", port, file.fileno())
        refused = refusal(LaunchError, seat, 0, 2, bad, 2.0)
    return {
        "alone": timed(lambda: seat(0, 2, here, 2.0)),
        "nobody": timed(lambda: seat(1, 2, there, 2.0)),
        "not a socket": (0.0, refused),
    }


def test_joining_in_vain_ends_within_the_limit() -> None:
    [found] = run_ranks(join_in_vain, 1)
    for name in ("alone", "nobody"):
        seconds, text = found[name]
        assert seconds < 20
        assert text.startswith(
            f"rank {int(name == 'nobody')} of 2 could not join the others at 127.0"
        )
        assert "within 2 s" in text
    assert "socket" in found["not a socket"][1]


def join_with_an_empty_build_folder(rank: int, folder: str, pipe: Any, port: int = 0) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    listener = socket.create_server(("127.0.0.1", 0)) if rank == 0 else None
    if listener is not None:
        port = listener.getsockname()[1]
        pipe.send(port)
    at = Rendezvous("127.0.0.1", port, listener.fileno() if listener else None)
    world = seat(rank, 2, at, 60.0)  # a job of one rank has no use for deepspeed
    from deepspeed.comm import comm
    from deepspeed.ops import __compatible_ops__

    pipe.send(
        (__compatible_ops__["deepspeed_shm_comm"], comm.cdb is not None, comm.cdb.shm_comm_op)
    )
    world.leave()
    os._exit(0)


def test_deepspeed_compiles_nothing(tmp_path: Path) -> None:
    """Its shared-memory op would take a compiler and a minute, and then ignore groups."""
    context = mp.get_context("forkserver")
    mine, theirs = context.Pipe(duplex=False)
    folder = tmp_path / "extensions"
    children = []
    port = 0
    for rank in range(2):
        args = (rank, str(folder), theirs, port)
        children.append(context.Process(target=join_with_an_empty_build_folder, args=args))
        children[rank].start()
        if rank == 0:
            assert mine.poll(60)
            port = mine.recv()
    for _ in children:
        assert mine.poll(60)
        assert mine.recv() == (False, True, None)  # compatible, joined, op
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert not folder.exists() or not any(folder.rglob("*"))


def gloo_threads() -> list[str]:
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.append(Path(f"/proc/self/task/{task}/comm").read_text().strip())
    return [name for name in names if "gloo" in name]


def leave_holding_on(world: World) -> tuple[list[str], list[str]]:
    """A failed start keeps every object it has made in its traceback; so do we here."""
    held = world_group(world)
    held.barrier()
    before = gloo_threads()
    world.leave()
    return before, gloo_threads()


def test_leaving_ends_gloos_threads_though_a_group_is_referred_to() -> None:
    for before, after in run_ranks(leave_holding_on, 2):
        assert before
        assert after == []
