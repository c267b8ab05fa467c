"""One step, as plain integers: what rank 0 decides and every rank derives its shapes and messages
from.

A plan says what changes: requests that begin or end, blocks that are added or moved, and which
requests run. Every rank keeps the same books of it (``mirror``), so that a step of hundreds of
running requests is a few bytes each, and a token sampled in one step can enter the next one without
rank 0 having seen it. Typed and bounded on the wire (msgspec), never pickled. No torch here.
"""

from __future__ import annotations

import msgspec

from ds_cp.layout import Home, Runs

MAX_PLAN_BYTES = 64 * 2**20  # of one plan as msgpack: what every channel to the ranks carries


class Sampling(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """How to choose one request's tokens; sent once. ``seed`` and a token's index name the random
    number to use, so that a request's stream depends on nothing else. ``early_banned``: ids that
    may not be chosen before ``min_tokens`` others were. ``logprobs`` and
    ``prompt_logprobs``: how many alternatives, -1 for none at all."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int = -1
    prompt_logprobs: int = -1
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    early_banned: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def looks_back(self) -> bool:
        """Whether a token depends on which tokens came before it."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


class Begin(msgspec.Struct, frozen=True, array_like=True):
    """A request starts, or starts again after it gave way. ``tokens``: all that are known, the
    prompt and then ``len(tokens) - prompt_length`` of the output. ``homes``: the blocks that hold
    its first ``computed`` tokens already (a prefix that was found)."""

    request: int
    tokens: tuple[int, ...]
    prompt_length: int
    homes: tuple[Home, ...]
    computed: int
    sampling: Sampling


class Fork(msgspec.Struct, frozen=True, array_like=True):
    """``request`` starts as another answer to the prompt of ``parent``, whose blocks it shares. It
    computes the prompt's last token once more, for a draw of its own."""

    parent: int
    request: int
    sampling: Sampling


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """The next tokens of a prompt. ``owners``: per rank with any, the positions it computes;
    ``homes``: the blocks that are added for them, by position. ``samples``: it is the last chunk.
    """

    request: int
    mode: str
    ring_pass: str
    owners: tuple[tuple[int, Runs], ...]
    homes: tuple[Home, ...]
    samples: bool


class Decodes(msgspec.Struct, frozen=True, array_like=True):
    """One more token for each of ``requests``, computed where its KV goes."""

    mode: str
    ring_pass: str
    requests: tuple[int, ...]


class Transfer(msgspec.Struct, frozen=True, array_like=True):
    """The content of block ``source`` is copied to ``target``, before anything else is written, and
    from then on ``target`` is block ``index`` of each of ``requests``."""

    requests: tuple[int, ...]
    index: int
    source: Home
    target: Home


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """What all ranks do next, in the order of the fields; the forks come into being at the end.

    ``kind``: "run", "idle" (a sign of life) or "stop". ``ended``: requests to forget. ``seen``:
    (request, index, token) of outputs, for requests whose sampling looks back. ``grown``: a block
    for the next token of a request.
    """

    step: int
    kind: str
    ended: tuple[int, ...] = ()
    seen: tuple[tuple[int, int, int], ...] = ()
    transfers: tuple[Transfer, ...] = ()
    begins: tuple[Begin, ...] = ()
    grown: tuple[tuple[int, Home], ...] = ()
    chunks: tuple[Chunk, ...] = ()
    decodes: tuple[Decodes, ...] = ()
    forks: tuple[Fork, ...] = ()


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """The token chosen for a request, its log-probability and the most likely ones, best first.

    ``token`` is -1 when the logits were not finite; the request then ends with an error.
    """

    request: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Scored(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of a stretch of a prompt: of the tokens at ``start``, ``start + 1`` ..."""

    request: int
    start: int
    rows: tuple[tuple[float, tuple[tuple[int, float], ...]], ...]


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0 learns from one step: the tokens drawn, prompts scored, and the seconds that the
    step and, within it, the model's forward call took on rank 0."""

    step: int
    sampled: tuple[Sampled, ...] = ()
    scored: tuple[Scored, ...] = ()
    seconds: float = 0.0
    model_seconds: float = 0.0


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(StepPlan)


def encode_plan(plan: StepPlan) -> bytes:
    """The plan as msgpack."""
    return _encoder.encode(plan)


def decode_plan(payload: bytes) -> StepPlan:
    """The plan from msgpack; ``msgspec.ValidationError`` when it is not one."""
    return _decoder.decode(payload)
