"""A worker hears its supervisor whatever it does at the moment."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from ds_cp.errors import CommError
from ds_cp.serve.channel import Channel
from ds_cp.serve.orders import Leave, Left, Loaded, Meet, Met, Orders, Word

LIMIT_S = 60.0


class Both:
    """The two ends, and how often the worker was made to leave."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.supervisor = Channel(ours)
        self.orders = Orders(theirs)
        self.left = threading.Semaphore(0)

    def abandon(self) -> None:
        self.left.release()

    def has_left(self, seconds: float = LIMIT_S) -> bool:
        return self.left.acquire(timeout=seconds)

    def heard(self, done: Callable[[], bool]) -> None:
        """Wait until the worker's thread has read what was sent."""
        for _ in range(int(LIMIT_S / 0.01)):
            if done():
                return
            self.left.acquire(timeout=0.01)
        raise AssertionError("it was not heard")


def test_told_to_leave() -> None:
    both = Both()
    both.orders.attend(0, both.abandon)
    both.supervisor.send(Leave(0))
    assert both.has_left()
    both.supervisor.send(Meet(1))
    assert both.orders.next_meeting() == Meet(1)
    both.orders.attend(1, both.abandon)
    assert not both.has_left(0.05), "the last order was for the generation before"
    both.supervisor.send(Leave(1))
    assert both.has_left()


def test_told_before_it_is_there() -> None:
    """It was asked to leave a meeting while it still tried to join."""
    both = Both()
    both.supervisor.send(Meet(2))
    both.supervisor.send(Leave(2))
    assert both.orders.next_meeting() == Meet(2)
    both.heard(lambda: both.orders.is_off(2))
    both.orders.attend(2, both.abandon)
    assert both.has_left(0.0)


def test_told_when_it_has_left_by_itself() -> None:
    both = Both()
    both.orders.attend(0, both.abandon)
    waiting = threading.Thread(target=both.orders.next_meeting, daemon=True)
    waiting.start()
    both.heard(lambda: both.orders._abandon is None)
    both.supervisor.send(Leave(0))
    both.supervisor.send(Meet(1))
    waiting.join(LIMIT_S)
    assert not waiting.is_alive() and not both.has_left(0.0)


def test_a_wait_for_a_plan_ends() -> None:
    both = Both()
    engine, worker = socket.socketpair()
    both.orders.attend(0, both.abandon)
    engine.send(b"a plan")
    both.orders.wait_for(worker)
    assert worker.recv(6) == b"a plan"
    both.supervisor.send(Leave(0))
    with pytest.raises(CommError, match="a rank is gone"):
        both.orders.wait_for(worker)
    assert both.has_left()
    both.orders.attend(1, both.abandon)
    engine.send(b"a plan")
    both.orders.wait_for(worker)


def test_words_arrive() -> None:
    both = Both()
    for word in (Loaded(), Left(0, "a peer is gone"), Met(3)):
        both.orders.tell(word)
        assert both.supervisor.receive(Word) == word
    both.supervisor.sock.close()
    both.orders.tell(Loaded())
