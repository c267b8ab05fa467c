"""The rings between processes of a host: what arrives, in which order, and what ends a wait.

Members are threads of this process, each with its own seat; a peer's life is a child process.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import torch

from ds_cp.comm import channel as ch
from ds_cp.comm.channel import Channel, ChannelError, Messages, Shape
from ds_cp.comm.join import Hello, cores_of, share_of
from ds_cp.comm.shared_memory import (
    LOOK_S,
    SHORT_LOOK_S,
    longest_look,
    open_memory,
    private_memory,
)
from ds_cp.native import Library, load

LIBRARY = load()
pytestmark = pytest.mark.skipif(
    not isinstance(LIBRARY, Library), reason=f"{LIBRARY}; then run these tests again"
)
TOKEN = bytes(range(ch.TOKEN))
PAGE = 4096
LINE = 64


@contextmanager
def seats(
    members: int, ring_bytes: int = PAGE, lives: Sequence[int] | None = None, look_s: float = 0.0
) -> Iterator[list[Channel]]:
    """Every seat of a new channel."""
    shape = Shape(members, ring_bytes)
    assert isinstance(LIBRARY, Library)
    fd = private_memory(shape.nbytes(LIBRARY))
    with ExitStack() as stack:
        found = []
        for me in range(members):
            seat = Channel(
                LIBRARY, fd, shape, me, TOKEN, list(lives or [-1] * members), look_s, make=me == 0
            )
            stack.callback(seat.close)
            found.append(seat)
        stack.callback(os.close, fd)
        yield found


def at_once(*works: Any) -> list[BaseException | None]:
    """Run each work in a thread; what each raised."""
    raised: list[BaseException | None] = [None] * len(works)

    def run(i: int, work: Any) -> None:
        try:
            work()
        except BaseException as err:
            raised[i] = err

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return raised


def finish(seat: Channel, number: int, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while number and not seat.wait(number, deadline - time.monotonic()):
        pass


def payload(seed: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def refused(seat: Channel, number: int, limit_s: float) -> tuple[ChannelError, float]:
    began = time.monotonic()
    with pytest.raises(ChannelError) as caught:
        finish(seat, number, limit_s)
    return caught.value, time.monotonic() - began


@pytest.mark.parametrize("ring_bytes", [PAGE, 3 * PAGE, 64 * PAGE])
@pytest.mark.parametrize("members", [2, 3])
def test_messages_of_any_size_arrive_in_order(members: int, ring_bytes: int) -> None:
    """Around the end of the ring, in pieces, several of them under way at once, both ways."""
    plan = random.Random(ring_bytes + members)
    rounds = [
        {
            (a, b): [plan.choice((1, 63, 64, 65, 4032, 4096, plan.randrange(1, 40_000)))
                     for _ in range(plan.randrange(4))]
            for a in range(members) for b in range(members) if a != b
        }
        for _ in range(25)
    ]  # fmt: skip

    def work(seat: Channel, me: int) -> None:
        under_way: list[tuple[int, list[torch.Tensor], list[torch.Tensor]]] = []

        def check() -> None:
            number, got, want = under_way.pop()  # the newest first
            finish(seat, number)
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))

        for i, sizes in enumerate(rounds):
            sends, recvs, want = [], [], []
            for (a, b), lengths in sizes.items():
                for j, length in enumerate(lengths):
                    data = payload(i * 1000 + a * 100 + b * 10 + j, length)
                    if a == me:
                        sends.append((b, data))
                    if b == me:
                        recvs.append((a, torch.zeros_like(data)))
                        want.append(data)
            under_way.append((seat.post(sends, recvs), [t for _, t in recvs], want))
            if i % 3 == 2:
                while under_way:
                    check()
        while under_way:
            check()

    with seats(members, ring_bytes) as found:
        raised = at_once(*[lambda s=s, i=i: work(s, i) for i, s in enumerate(found)])
        assert raised == [None] * members


def test_messages_that_are_packed_once_are_sent_any_number_of_times() -> None:
    """What the tensors hold then."""
    with seats(2) as (one, other):
        mine, got = torch.zeros(3000), torch.zeros(3000)
        going, coming = Messages.of([(1, mine)], []), Messages.of([], [(0, got)])
        for i in range(5):
            mine.fill_(i)
            sent, expected = one.start(going), other.start(coming)
            raised = at_once(lambda n=sent: finish(one, n), lambda n=expected: finish(other, n))
            assert raised == [None, None] and got.eq(i).all()


def test_two_that_both_send_much_do_not_wait_for_each_other() -> None:
    size = 3_000_001
    with seats(2) as found:
        buffers = [torch.zeros(size, dtype=torch.uint8) for _ in found]

        def work(me: int) -> None:
            number = found[me].post([(1 - me, payload(me, size))], [(1 - me, buffers[me])])
            assert number  # 4 KiB are under way, the rest is not
            finish(found[me], number)

        assert at_once(lambda: work(0), lambda: work(1)) == [None, None]
        assert all(torch.equal(buffers[me], payload(1 - me, size)) for me in (0, 1))


def test_what_fits_is_through_at_once() -> None:
    """And who waits for it later finds it, though the sender did nothing more."""
    with seats(2, 2 * PAGE) as (one, other):
        assert one.post([(1, payload(1, PAGE))], []) == 0
        got = torch.zeros(PAGE, dtype=torch.uint8)
        assert other.post([], [(0, got)]) == 0
        assert torch.equal(got, payload(1, PAGE))
        assert one.post([], []) == 0


def test_an_exchange_moves_while_a_later_one_is_waited_for() -> None:
    """Rank 0 expects rows early and waits for them late, as for the outcome of a step."""
    with seats(2) as (one, other):
        early, late = torch.zeros(50_000, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)
        expected = one.post([], [(1, early)])
        then = one.post([(1, payload(3, 9))], [(1, late)])

        def peer() -> None:
            first = other.post([(0, payload(1, 50_000))], [])
            second = other.post([(0, payload(2, 9))], [(0, torch.zeros(9, dtype=torch.uint8))])
            finish(other, second)
            finish(other, first)

        def me() -> None:
            finish(one, then)
            finish(one, expected)

        assert at_once(peer, me) == [None, None]
        assert torch.equal(early, payload(1, 50_000)) and torch.equal(late, payload(2, 9))


def test_tensors_live_until_their_exchange_is_through() -> None:
    with seats(2) as (one, other):
        number = one.post([(1, payload(7, 200_000))], [])  # nobody else refers to it
        noise = [payload(i, 200_000) for i in range(20)]
        got = torch.zeros(200_000, dtype=torch.uint8)
        coming = other.post([], [(0, got)])
        assert at_once(lambda: finish(one, number), lambda: finish(other, coming)) == [None, None]
        assert torch.equal(got, payload(7, 200_000)) and len(noise) == 20


@pytest.mark.parametrize("look_s", [0.0, 0.001])
def test_a_silent_peer_runs_into_the_limit(look_s: float) -> None:
    with seats(3, look_s=look_s) as found:
        number = found[0].post([], [(2, torch.zeros(4))])
        err, seconds = refused(found[0], number, 0.3)
        assert (err.reason, err.peer) == (ch.SILENT, 2) and 0.29 <= seconds < 2
        full = found[0].post([(1, torch.zeros(10_000))], [])
        err, _ = refused(found[0], full, 0.1)
        assert (err.reason, err.peer) == (ch.SILENT, 1)


def waits(seat: Channel, peer: Channel, pauses: Sequence[float]) -> list[float]:
    """Seconds of CPU time in which ``seat`` waits for messages that ``peer`` sends after pauses."""
    found: list[float] = []
    there = threading.Semaphore(0)

    def wait() -> None:
        for _ in pauses:
            number = seat.post([], [(1, torch.zeros(4))])
            there.release()
            began = time.thread_time()
            finish(seat, number)
            found.append(time.thread_time() - began)

    def send() -> None:
        for pause in pauses:
            there.acquire()
            time.sleep(pause)
            finish(peer, peer.post([(0, torch.ones(4))], []))

    assert at_once(wait, send) == [None, None]
    return found


def test_a_wait_looks_about_as_long_as_waits_are_and_not_where_they_are_longer() -> None:
    """By its CPU time: all of a usual wait, no more than the bound of a long one, however long, and
    nothing where waits are usually longer than the bound, until they are short again."""
    looks = 0.02
    with seats(2, look_s=looks) as (one, other):
        usual = waits(one, other, [0.004] * 8)
        assert sum(usual[4:]) > 0.2 * 4 * 0.004  # awake, but where others want the core
        (idle,) = waits(one, other, [0.4])
        assert idle < 2 * looks  # signals are looked after every 50 ms, without a look each
        long = waits(one, other, [0.06] * 8)
        assert sum(long[4:]) < 0.25 * looks * 4
        again = waits(one, other, [0.004] * 30)
        assert sum(again[-4:]) > 0.2 * 4 * 0.004


def test_a_wait_that_may_not_look_sleeps() -> None:
    with seats(2) as (one, other):
        assert sum(waits(one, other, [0.005] * 10)) < 0.02


def test_a_peer_that_leaves_wakes_who_waits_for_it() -> None:
    """At once, long before the limit; what it sent before still arrives."""
    with seats(3) as found:
        got = torch.zeros(100, dtype=torch.uint8)
        assert found[1].post([(0, payload(1, 100))], []) == 0
        assert found[0].post([], [(1, got)]) == 0 and torch.equal(got, payload(1, 100))
        waiting = found[0].post([], [(1, torch.zeros(4)), (2, torch.zeros(4))])
        assert found[2].post([(0, torch.ones(4)), (0, torch.ones(8))], []) == 0
        threading.Timer(0.2, found[1].close).start()
        err, seconds = refused(found[0], waiting, 20.0)
        assert (err.reason, err.peer) == (ch.CLOSED, 1) and 0.1 < seconds < 2
        late = torch.zeros(8)
        found[2].close()
        assert found[0].post([], [(2, late)]) == 0 and late.tolist() == [1.0] * 8
        assert found[0].lost() == 1


def test_a_peer_whose_process_has_ended_is_noticed_soon() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    life = os.pidfd_open(child.pid)
    try:
        with seats(2, lives=[-1, life]) as (one, _):
            number = one.post([], [(1, torch.zeros(4))])
            assert one.lost() is None
            killed: list[float] = []

            def kill() -> None:
                killed.append(time.monotonic())
                child.kill()

            threading.Timer(0.2, kill).start()
            err, _ = refused(one, number, 20.0)
            assert (err.reason, err.peer) == (ch.GONE, 1)
            assert time.monotonic() - killed[0] < 1.0  # 0.05 s where the machine is not busy
            assert one.lost() == 1
    finally:
        child.kill()
        child.wait()
        os.close(life)


@pytest.mark.parametrize("busy", [False, True])
def test_a_signal_that_another_thread_takes_is_handled_during_a_wait(busy: bool) -> None:
    """Its handler runs in the thread that waits, asleep or copying, and may end the wait."""

    class StopError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StopError

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with seats(3) as found:
            number = found[0].post([], [(1, torch.zeros(4))])
            ended = threading.Event()

            def other() -> None:
                time.sleep(0.05)
                signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

            def copying() -> None:
                data = torch.ones(1_000_000, dtype=torch.uint8)
                with suppress(ChannelError):  # that the test has closed the other end
                    while not ended.is_set():
                        finish(found[2], found[2].post([(0, data)], []))

            threads = [threading.Thread(target=other)]
            if busy:
                coming = torch.zeros(1_000_000, dtype=torch.uint8)
                for _ in range(2000):
                    found[0].post([], [(2, coming)])
                threads.append(threading.Thread(target=copying, daemon=True))
            began = time.monotonic()
            for thread in threads:
                thread.start()
            with pytest.raises(StopError):
                finish(found[0], number, 3.0)
            assert time.monotonic() - began < 1.0
            ended.set()
            found[0].close()
            for thread in threads:
                thread.join(5)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_closing_ends_my_own_wait_and_may_be_done_twice() -> None:
    with seats(2) as (one, _):
        number = one.post([], [(1, torch.zeros(4))])
        threading.Timer(0.2, one.close).start()
        err, seconds = refused(one, number, 20.0)
        assert err.reason == ch.SHUT and seconds < 2
        one.close()
        for call in (lambda: one.post([], []), lambda: one.wait(1, 0.1), one.pump, one.lost):
            with pytest.raises(ChannelError):
                call()


def test_closing_while_other_threads_are_in_any_call() -> None:
    """As when a rank gives up on one thread and the step goes on for a moment on another."""
    for turn in range(24):
        with seats(2, look_s=0.0001 * (turn % 2)) as (one, other):
            started = threading.Barrier(4)

            def until_closed(*calls: Any, started: threading.Barrier = started) -> None:
                started.wait()
                with pytest.raises(ChannelError) as caught:
                    while True:
                        for call in calls:
                            call()
                assert caught.value.reason in (ch.SHUT, ch.CLOSED)

            def exchange(seat: Channel, peer: int) -> None:
                data = torch.zeros(20_000, dtype=torch.uint8)
                finish(seat, seat.post([(peer, data)], [(peer, torch.zeros_like(data))]))

            def close(
                one: Channel = one, started: threading.Barrier = started, turn: int = turn
            ) -> None:
                started.wait()
                time.sleep(turn * 5e-5)
                one.close()

            raised = at_once(
                lambda one=one: until_closed(lambda: exchange(one, 1)),
                lambda other=other: until_closed(lambda: exchange(other, 0)),
                lambda one=one: until_closed(one.pump, lambda: one.lost() is None),
                close,
            )
            assert raised == [None] * 4


def test_memory_that_nobody_closes_goes_with_its_channel() -> None:
    def mapped() -> int:
        with open("/proc/self/maps") as lines:
            return sum("memfd:ds_cp" in line for line in lines)

    before = mapped()
    assert isinstance(LIBRARY, Library)
    shape = Shape(2, PAGE)
    fd = private_memory(shape.nbytes(LIBRARY))
    seat = Channel(LIBRARY, fd, shape, 0, TOKEN, [-1, -1], 0.0, make=True)
    os.close(fd)
    assert mapped() == before + 1
    del seat
    assert mapped() == before


def test_a_message_of_another_size_is_said() -> None:
    with seats(2) as (one, other):
        one.post([(1, torch.zeros(10, dtype=torch.uint8))], [])
        with pytest.raises(ChannelError) as caught:
            other.post([], [(0, torch.zeros(12, dtype=torch.uint8))])
        err = caught.value
        assert (err.reason, err.peer, err.expected, err.found) == (ch.DIFFERENT, 0, 12, 10)


def test_after_a_failed_post_nothing_is_moved_any_more() -> None:
    """Its tensors are the caller's again: what arrives later must not be written into them."""
    with seats(3) as found:
        found[2].post([(1, torch.ones(64, dtype=torch.uint8))], [])
        mine = torch.zeros(4096, dtype=torch.uint8)
        earlier = torch.zeros(8, dtype=torch.uint8)
        waiting = found[1].post([], [(0, earlier)])
        with pytest.raises(ChannelError):
            found[1].post([], [(2, torch.zeros(128, dtype=torch.uint8)), (0, mine)])
        found[0].post([(1, payload(1, 8)), (1, torch.full((4096,), 7, dtype=torch.uint8))], [])
        calls = (
            found[1].pump,
            lambda: found[1].post([], [(0, torch.zeros(1))]),
            lambda: found[1].wait(waiting, 0.1),
        )
        for call in calls:
            with pytest.raises(ChannelError) as caught:
                call()
            assert (caught.value.reason, caught.value.peer) == (ch.DIFFERENT, 2)
        assert not mine.any() and not earlier.any()


def test_the_tensors_of_an_exchange_that_failed_at_once_are_kept() -> None:
    """Their addresses are queued: what another call moves later must not go to freed memory."""
    with seats(2) as (one, other):
        one.post([(1, torch.zeros(10, dtype=torch.uint8))], [])
        got, sent = (torch.zeros(12, dtype=torch.uint8) for _ in range(2))
        alive = [weakref.ref(got), weakref.ref(sent)]
        with pytest.raises(ChannelError):
            other.post([(0, sent)], [(0, got)])
        del got, sent
        assert all(there() is not None for there in alive)
        other.close()
        assert not any(there() is not None for there in alive)


def test_garbage_in_the_memory_is_an_error_not_a_crash() -> None:
    """A faulty peer may write anything into the positions and the data."""
    shape = Shape(2, PAGE)
    assert isinstance(LIBRARY, Library)
    controls = slice(2 * PAGE, 3 * PAGE)  # the rings' positions; before them head and members
    plan = random.Random(9)
    reasons = set()
    for case in range(300):
        fd = private_memory(shape.nbytes(LIBRARY))
        pair = [Channel(LIBRARY, fd, shape, i, TOKEN, [-1, -1], 0.0, make=i == 0) for i in (0, 1)]
        with mmap.mmap(fd, shape.nbytes(LIBRARY)) as memory:
            pair[0].post([(1, payload(case, plan.randrange(1, 6000)))], [])
            for _ in range(plan.randrange(1, 4)):
                word = plan.choice((0, 8, LINE)) + 2 * LINE * plan.randrange(4)
                value = plan.choice((plan.getrandbits(64), plan.randrange(10_000), 2**64 - 64))
                at = controls.start + word
                memory[at : at + 8] = value.to_bytes(8, "little")
            if case % 3 == 0:
                memory[3 * PAGE :] = plan.randbytes(len(memory) - 3 * PAGE)
            for seat, peer in ((pair[1], 0), (pair[0], 1)):
                try:
                    number = seat.post([(peer, torch.zeros(5000))], [(peer, torch.zeros(100))])
                    finish(seat, number, 0.001)
                except ChannelError as err:
                    reasons.add(err.reason)
        for seat in pair:
            seat.close()
        os.close(fd)
    assert ch.BROKEN in reasons and reasons <= {ch.BROKEN, ch.SILENT, ch.DIFFERENT}


def test_eight_members_in_turn_and_all_at_once() -> None:
    """More threads than cores: a sum around the ring, then everybody to everybody."""
    n = 8

    def work(seat: Channel, me: int) -> None:
        mine = torch.full((2000,), float(me))
        for _ in range(n - 1):
            coming = torch.empty(2000)
            finish(seat, seat.post([((me + 1) % n, mine)], [((me - 1) % n, coming)]))
            mine = coming
        assert mine.eq((me + 1) % n).all()
        others = [i for i in range(n) if i != me]
        got = {i: torch.empty(700) for i in others}
        sends = [(i, torch.full((700,), 10.0 * me + i)) for i in others]
        finish(seat, seat.post(sends, list(got.items())))
        assert all(got[i].eq(10.0 * i + me).all() for i in others)

    with seats(n) as found:
        raised = at_once(*[lambda s=s, i=i: work(s, i) for i, s in enumerate(found)])
        assert raised == [None] * n


# --- the memory itself


def test_the_memory_is_this_users_alone_and_of_that_size_for_good() -> None:
    before = set(os.listdir("/dev/shm"))
    fd = private_memory(5 * PAGE)
    try:
        found = os.fstat(fd)
        assert found.st_mode & 0o777 == 0o600 and found.st_uid == os.geteuid()
        assert found.st_size == 5 * PAGE and not os.get_inheritable(fd)
        for size in (0, 4 * PAGE, 6 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        assert set(os.listdir("/dev/shm")) == before  # no folder holds it
        other = open_memory(f"/proc/{os.getpid()}/fd/{fd}", 5 * PAGE)
        assert os.path.sameopenfile(fd, other) and not os.get_inheritable(other)
        os.close(other)
    finally:
        os.close(fd)


def test_what_is_not_such_memory_is_not_opened(tmp_path: Any) -> None:
    path = f"/proc/{os.getpid()}/fd/"
    right = private_memory(PAGE)
    loose = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, PAGE)
    os.fchmod(loose, 0o600)
    file = tmp_path / "file"
    file.write_bytes(bytes(PAGE))
    file.chmod(0o600)
    os.mkfifo(tmp_path / "fifo")
    try:
        cases: list[tuple[str, int, type[Exception]]] = [
            (f"{path}{right}", 2 * PAGE, ValueError),
            (f"{path}{loose}", PAGE, ValueError),  # its size may change
            (str(file), PAGE, OSError),  # nothing seals a file
            (str(tmp_path / "fifo"), PAGE, ValueError),  # and nobody waits for its other end
            (f"{path}999", PAGE, OSError),
        ]
        for where, size, kind in cases:
            with pytest.raises(kind):
                open_memory(where, size)
        os.fchmod(right, 0o644)
        with pytest.raises(ValueError, match="this user's alone"):
            open_memory(f"{path}{right}", PAGE)
    finally:
        os.close(right)
        os.close(loose)


def test_a_seat_in_something_else_is_refused() -> None:
    assert isinstance(LIBRARY, Library)
    for shape in (Shape(1, PAGE), Shape(65, PAGE), Shape(2, 100), Shape(2, 0)):
        with pytest.raises(ValueError, match="no channel"):
            shape.nbytes(LIBRARY)
    shape = Shape(2, PAGE)
    fd = private_memory(shape.nbytes(LIBRARY))
    try:
        seat = Channel(LIBRARY, fd, shape, 0, TOKEN, [-1, -1], 0.0, make=True)
        for me, token in ((1, bytes(ch.TOKEN)), (2, TOKEN), (-1, TOKEN)):
            with pytest.raises(ValueError, match="not the channel"):
                Channel(LIBRARY, fd, shape, me, token, [-1, -1], 0.0, make=False)
        with pytest.raises(ValueError, match="each member a pidfd"):
            Channel(LIBRARY, fd, shape, 1, TOKEN, [-1], 0.0, make=False)
        with pytest.raises(ValueError):
            Channel(LIBRARY, fd, Shape(3, PAGE), 1, TOKEN, [-1] * 3, 0.0, make=False)
        for bad in (0, 2, -1):  # oneself, nobody
            with pytest.raises(ChannelError):
                seat.post([(bad, torch.zeros(1))], [])
        seat.close()
    finally:
        os.close(fd)


def test_who_has_no_core_of_its_own_does_not_look() -> None:
    """A thread of another rank may want the core: the longer look is for hosts with cores for
    all."""
    for ranks, threads, cores, want in (
        (2, 1, 2, LOOK_S), (2, 4, 8, LOOK_S), (2, 2, 2, SHORT_LOOK_S), (8, 2, 15, SHORT_LOOK_S),
        (3, 1, 2, 0.0), (4, 4, 2, 0.0),
    ):  # fmt: skip
        assert longest_look(ranks, threads, cores) == want


@pytest.mark.parametrize(
    ("cores", "want", "share"),
    [
        ([(0,), (1,)], 2, 1), ([(0, 1), (0, 1)], 2, 1), ([(0, 1), (2, 3)], 4, 2),
        ([(5,), (5,)], 1, 1), ([(0, 1, 2, 3)], 4, 4), ([(0, 1, 2, 3)] * 4, 4, 1),
        ([(0, 1, 2, 3), (0, 1, 2, 3), (4, 5), (4, 5)], 6, 2),
    ],
    ids=["bound", "shared", "to some", "one for both", "alone", "four", "a socket for two"],
)  # fmt: skip
def test_cores_are_counted_over_the_ranks_of_a_host(
    cores: list[tuple[int, ...]], want: int, share: int
) -> None:
    """A launcher that binds each of two ranks to a core leaves each with one: they look. A rank
    has as many threads as cores for itself."""
    hellos = [Hello("", "k", "h", pid, "", "", some) for pid, some in enumerate(cores)]
    assert cores_of(hellos) == want
    assert (longest_look(2, 1, cores_of(hellos)) == LOOK_S) == (want >= 2)
    assert share_of(hellos[0], hellos) == share
