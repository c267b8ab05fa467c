"""Rank 0's port: the store, the supervisors, strangers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace

import msgspec
import pytest

from ds_cp.errors import CommError, LaunchError
from ds_cp.link import door as door_module
from ds_cp.link.door import Door
from ds_cp.link.knock import Port, knock, knock_async
from ds_cp.link.peer import SealedPeer
from ds_cp.link.seal import Claim
from ds_cp.link.values import Reply, Request

SECRET = b"0123456789abcdef"
LIMIT_S = 60.0


def claim(rank: int, **changes: object) -> Claim:
    made = Claim("control", rank, 4, f"host{rank}", 100 + rank, "1.0", "mark")
    return msgspec.structs.replace(made, **changes)


class Place:
    """An open door and what it has told."""

    def __init__(self) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.door = Door(self.sock, SECRET, claim(0), 5.0)
        self.came: list[Claim] = []
        self.heard: list[bytes] = []
        self.misfits: list[str] = []
        self.strangers: list[str] = []
        self.door.on_control = self._on_control
        self.door.on_misfit = lambda claim, why: self.misfits.append(why)
        self.door.on_stranger = lambda address, why: self.strangers.append(why)

    async def _on_control(self, claim: Claim, peer: SealedPeer) -> None:
        self.came.append(claim)
        while (message := await peer.receive()) is not None:
            self.heard.append(message)
            peer.send(b"heard " + message)

    def port(self, mine: Claim, secret: bytes = SECRET, timeout_s: float = LIMIT_S) -> Port:
        return Port("127.0.0.1", self.sock.getsockname()[1], secret, mine, timeout_s, 5.0)

    async def until(self, done: Callable[[], bool]) -> None:
        async def poll() -> None:
            while not done():
                await asyncio.sleep(0.005)

        await asyncio.wait_for(poll(), LIMIT_S)


def run(work: Callable[[Place], Awaitable[None]]) -> Place:
    place = Place()

    async def main() -> None:
        await place.door.open()
        await asyncio.wait_for(work(place), LIMIT_S)
        place.door.close()

    asyncio.run(main())
    return place


def test_a_supervisor_is_let_in_and_heard() -> None:
    async def work(place: Place) -> None:
        peer, verdict = await knock_async(place.port(claim(2)))
        assert verdict.host == "host0"
        peer.send(b"one")
        assert await peer.receive() == b"heard one"
        peer.close()
        assert await peer.receive() is None and peer.ended == "closed"

    place = run(work)
    assert [one.rank for one in place.came] == [2] and place.door.strangers == 0


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        (claim(2, version="0.9"), "it runs ds_cp 0.9, and rank 0 ds_cp 1.0"),
        (claim(2, mark="other"), "rank 2 on host2 was started with another config than rank 0"),
        (claim(2, size=8), "it is rank 2 of 8, and the job has 4 ranks"),
        (claim(4), "it is rank 4 of 4"),
        (claim(-1), "it is rank -1 of 4"),
    ],
)
def test_who_is_of_the_job_and_does_not_fit_is_told_why(mine: Claim, said: str) -> None:
    """And rank 0 knows it."""

    async def work(place: Place) -> None:
        with pytest.raises(LaunchError, match=said) as caught:
            await knock_async(place.port(mine))
        assert "\n" not in str(caught.value)
        await place.until(lambda: bool(place.misfits))
        with pytest.raises(LaunchError, match=said):
            await asyncio.to_thread(knock, place.port(mine))

    place = run(work)
    assert said in place.misfits[0] and not place.came and place.door.strangers == 0


def test_another_secret_is_a_stranger() -> None:
    async def work(place: Place) -> None:
        for secret, has in ((b"f" * 16, "has a secret"), (b"", "has none")):
            with pytest.raises(LaunchError, match=has) as caught:
                await knock_async(place.port(claim(1), secret))
            assert "DS_CP_JOB_SECRET" in str(caught.value)
        await place.until(lambda: place.door.strangers == 2)

    place = run(work)
    assert not place.came and not place.misfits


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b"\0\0\0\4what", b"", b"\0\0"]
)
def test_garbage_is_dropped_and_does_no_harm(sent: bytes) -> None:
    async def work(place: Place) -> None:
        reader, writer = await asyncio.open_connection(*place.sock.getsockname())
        writer.write(sent)
        writer.write_eof()
        with contextlib.suppress(OSError):
            await reader.read()
        await place.until(lambda: place.door.strangers == 1)
        peer, _ = await knock_async(place.port(claim(3)))
        peer.send(b"x")
        assert await peer.receive() == b"heard x"
        writer.close()

    assert run(work).came[0].rank == 3


def test_slow_ones_lose_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "PROVE_S", 0.2)

    async def work(place: Place) -> None:
        reader, writer = await asyncio.open_connection(*place.sock.getsockname())
        writer.write(b"\0")
        await reader.read()
        await place.until(lambda: place.door.strangers == 1)
        writer.close()

    assert "in time" in run(work).strangers[0]


def test_many_that_say_nothing_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "MAX_UNKNOWN", 4)

    async def work(place: Place) -> None:
        silent = [await asyncio.open_connection(*place.sock.getsockname()) for _ in range(12)]
        await place.until(lambda: place.door.strangers >= 8)
        peer, _ = await knock_async(place.port(claim(1)))
        peer.send(b"x")
        assert await peer.receive() == b"heard x"
        for _, writer in silent:
            writer.close()

    assert run(work).came[0].rank == 1


def test_the_store_by_the_port() -> None:
    """Another one's wait ends with the key; a request that is none ends nothing."""

    async def work(place: Place) -> None:
        async def ask(peer: SealedPeer, request: Request) -> Reply:
            peer.send(msgspec.msgpack.encode(request))
            raw = await peer.receive()
            assert raw is not None
            return msgspec.msgpack.decode(raw, type=Reply)

        one, _ = await knock_async(place.port(claim(1, purpose="store")))
        other, _ = await knock_async(place.port(claim(0, purpose="store")))
        waits = asyncio.create_task(ask(one, Request("get", ["a", "b"], wait_s=1.0)))
        await ask(other, Request("set", ["a", "b"], [b"1", b"2"]))
        reply = await waits
        if not reply.done:  # a busy machine: its second was over
            reply = await ask(one, Request("get", ["a", "b"]))
        assert reply.values == [b"1", b"2"]
        assert not (await ask(one, Request("get", ["c"], wait_s=0.01))).done
        assert (await ask(one, Request("add", ["n"], amount=3))).number == 3
        assert (await ask(other, Request("add", ["n"], amount=-1))).number == 2
        assert (await ask(one, Request("add", ["a"], amount=1))).number == 2
        assert (await ask(one, Request("compare_set", ["x"], [b"", b"y"]))).values == [b"y"]
        assert (await ask(one, Request("compare_set", ["x"], [b"", b"z"]))).values == [b"y"]
        assert (await ask(one, Request("compare_set", ["w"], [b"q", b"z"]))).values == [b"q"]
        assert (await ask(one, Request("count"))).number == 4
        assert (await ask(one, Request("delete", ["x"]))).number == 1
        await ask(one, Request("set", ["t"], [b"no number"]))
        assert "not a number" in (await ask(one, Request("add", ["t"], amount=1))).error
        assert (await ask(one, Request("set", ["a"], []))).error
        one.send(b"\xc1")
        assert await one.receive() is not None
        assert (await ask(one, Request("check", ["a", "b"]))).done
        one.close()
        other.close()

    assert run(work).door.strangers == 0


def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
    port = Port("127.0.0.1", number, SECRET, claim(1), 0.3)
    with pytest.raises(CommError, match="did not reach rank 0 on 127.0.0.1 port"):
        knock(port)
    with pytest.raises(CommError, match="within 0.3 s"):
        asyncio.run(knock_async(port))


def test_another_program_has_the_port() -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
            await reader.read()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = Port("127.0.0.1", server.sockets[0].getsockname()[1], SECRET, claim(1), LIMIT_S)
        with pytest.raises(LaunchError, match="is not rank 0 of this job"):
            await knock_async(port)
        with pytest.raises(LaunchError, match="comm.port"):
            await asyncio.to_thread(knock, replace(port, timeout_s=5.0))
        server.close()

    asyncio.run(main())
