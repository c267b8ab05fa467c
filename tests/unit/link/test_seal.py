"""Who is let in, and that a changed byte is seen."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.link.seal import (
    HEAD,
    MAX_FRAME,
    Claim,
    ClientProof,
    RefusedError,
    Seal,
    SealError,
    ServerProof,
    Verdict,
    size_of,
)

SECRET = b"0123456789abcdef"
CLAIM = Claim("control", 2, 4, "b", 17, "1.0", "mark")


def body(frame: bytes) -> bytes:
    assert size_of(frame[:HEAD], MAX_FRAME) == len(frame) - HEAD
    return frame[HEAD:]


@dataclass
class Meeting:
    """Both sides, up to the verdict."""

    client_secret: bytes = SECRET
    server_secret: bytes = SECRET
    refused: str = ""
    wire: list[bytes] = field(default_factory=list)

    def seals(self) -> tuple[Seal, Seal]:
        """The client's and the server's."""
        server, client = ServerProof(self.server_secret), ClientProof(self.client_secret, CLAIM)
        answer = client.answer(body(server.greeting))
        claim, known = server.claim(body(answer))
        assert (claim.rank, claim.host, known) == (2, "b", self.client_secret == self.server_secret)
        verdict, seal = server.verdict(Verdict(self.refused, "a", 1, not known))
        self.wire = [server.greeting, answer, verdict]
        found, mine = client.verdict(body(verdict))
        assert (found.host, found.pid) == ("a", 1)
        return mine, seal


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=50)), max_size=8), st.binary())
@settings(max_examples=50)
def test_what_one_side_seals_the_other_opens(
    messages: list[tuple[bool, bytes]], secret: bytes
) -> None:
    """With a secret of any length, and none."""
    client, server = Meeting(secret, secret).seals()
    for from_client, payload in messages:
        one, other = (client, server) if from_client else (server, client)
        assert other.open(body(one.close_over(payload))) == payload


def test_who_does_not_know_the_secret_proves_nothing_and_gets_no_proof() -> None:
    meeting = Meeting(client_secret=b"another")
    with pytest.raises(RefusedError) as caught:
        meeting.seals()
    assert caught.value.secret
    with pytest.raises(RefusedError):
        Meeting(client_secret=b"").seals()


def test_a_refusal_is_proved_and_says_why() -> None:
    with pytest.raises(RefusedError, match="another config") as caught:
        Meeting(refused="another config").seals()
    assert not caught.value.secret


def test_a_server_that_only_says_yes_is_not_believed() -> None:
    """It has recorded another meeting, and plays it again."""
    meeting = Meeting()
    meeting.seals()
    client = ClientProof(SECRET, CLAIM)
    client.answer(body(meeting.wire[0]))
    with pytest.raises(RefusedError):
        client.verdict(body(meeting.wire[2]))


def test_a_recorded_claim_is_of_no_use() -> None:
    meeting = Meeting()
    meeting.seals()
    assert not ServerProof(SECRET).claim(body(meeting.wire[1]))[1]


def test_the_servers_proof_is_not_the_clients() -> None:
    """What one side says cannot be sent back to it as if it were the other's."""
    client, server = Meeting().seals()
    frame = body(client.close_over(b"x"))
    with pytest.raises(SealError):
        client.open(frame)
    assert server.open(frame) == b"x"
    with pytest.raises(SealError):  # nor twice
        server.open(frame)


@given(st.integers(0, 200), st.integers(1, 255))
@settings(max_examples=60)
def test_a_changed_byte_is_seen(place: int, change: int) -> None:
    client, server = Meeting().seals()
    frame = bytearray(body(client.close_over(b"a message")))
    frame[place % len(frame)] ^= change
    with pytest.raises(SealError):
        server.open(bytes(frame))


@given(st.binary(max_size=300))
@settings(max_examples=100)
def test_garbage_is_no_message(raw: bytes) -> None:
    for kind in (ServerProof(SECRET).claim, ClientProof(SECRET, CLAIM).answer):
        with pytest.raises(SealError):
            kind(raw)


@pytest.mark.parametrize("host", ["x" * 256, "a\nds_cp: error: no", "\x1b[31m"])
def test_names_can_be_shown(host: str) -> None:
    server = ServerProof(b"")
    client = ClientProof(b"", msgspec.structs.replace(CLAIM, host=host))
    answer = client.answer(body(server.greeting))
    with pytest.raises(SealError, match="that is none"):
        server.claim(body(answer))


def test_lengths_are_bounded() -> None:
    with pytest.raises(SealError, match="above the limit 4096"):
        size_of((4097).to_bytes(HEAD, "big"), 4096)
    client, _ = Meeting().seals()
    with pytest.raises(ValueError, match="above the limit"):
        client.close_over(bytes(MAX_FRAME))
