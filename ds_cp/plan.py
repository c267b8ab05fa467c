"""The contract between the scheduler and the workers: plans go out, outcomes come back.

One tagged union. ``StepPlan`` is one step, ``Idle`` a sign of life, ``Stop`` the end of a run;
``Outcome`` is the answer to each. A plan is plain integers, from which every rank derives its
shapes and messages. It says what changes: requests that begin or end, blocks that are added or
moved, and the requests that run. Every rank keeps the same state of them (``worker.state``).
So a step of hundreds of running requests is a few bytes each, and a token sampled in one step can
enter the next one before rank 0 has seen it.

Typed and bounded on the wire (msgspec), never pickled. A plan is encoded once: the worker of rank 0
broadcasts the bytes that it received, and every rank decodes them. No torch here.
"""

from __future__ import annotations

import msgspec

from ds_cp.grammar.vocabulary import Vocabulary
from ds_cp.layout import Home, Runs

MAX_PLAN_BYTES = 64 * 2**20  # bytes of one plan as msgpack; every channel to ranks carries that


class Sampling(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """How to choose one request's tokens; sent once.

    ``seed`` and a token's index name the random number to use, so that a request's tokens depend on
    nothing else. ``early_banned``: ids that may not be chosen before ``min_tokens`` tokens.
    ``logprobs`` and ``prompt_logprobs``: the number of alternatives, or -1 for none at all.
    ``grammar``: the text of what the answer must look like, which each rank that draws compiles
    (``ds_cp.grammar``); ``ends``: under a grammar, ids that may come only where the answer may end.
    """

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
    grammar: str = ""
    ends: tuple[int, ...] = ()

    @property
    def looks_back(self) -> bool:
        """Whether the choice of a token depends on which tokens came before it."""
        return self.penalizes or bool(self.grammar)

    @property
    def penalizes(self) -> bool:
        """Whether tokens that came before are more or less likely to come again."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


class Begin(msgspec.Struct, frozen=True, array_like=True):
    """A request starts, or starts again after it was preempted. ``tokens``: all known ones, the
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
    computes the prompt's last token once more, for a draw of its own. It has the grammar of its
    parent, which ``sampling`` leaves out."""

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
    """The content of block ``source`` is copied to ``target``, before the step computes, and from
    then on ``target`` is block ``index`` of each of ``requests``. Transfers are carried out as if
    one after the other.

    Either may be a host place (``layout.on_host``): a block is kept in the host memory of its rank,
    or comes back from there to a block of any rank, for ``requests`` that have that block already.
    """

    requests: tuple[int, ...]
    index: int
    source: Home
    target: Home


class StepPlan(msgspec.Struct, frozen=True, array_like=True, tag="run"):
    """What all ranks do next, in the order of the fields; forks are made last.

    ``ended``: requests to forget. ``seen``: (request, index, token) of outputs, for requests whose
    sampling looks back. ``grown``: a block for the next token of a request. ``vocabulary``: comes
    once, with the first request that has a grammar.
    """

    step: int
    ended: tuple[int, ...] = ()
    seen: tuple[tuple[int, int, int], ...] = ()
    transfers: tuple[Transfer, ...] = ()
    begins: tuple[Begin, ...] = ()
    grown: tuple[tuple[int, Home], ...] = ()
    chunks: tuple[Chunk, ...] = ()
    decodes: tuple[Decodes, ...] = ()
    forks: tuple[Fork, ...] = ()
    vocabulary: Vocabulary | None = None


class Idle(msgspec.Struct, frozen=True, array_like=True, tag="idle"):
    """A sign of life, so that no rank takes silence for the end of rank 0. Changes nothing."""


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """Every rank forgets its requests and leaves ``Worker.follow``."""


Plan = StepPlan | Idle | Stop

NO_DRAW = -1  # in place of a token: the logits were not finite, or could not be drawn from
NO_GRAMMAR = -2  # in place of a token: the request's grammar allows none, or passed its bounds


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """The token chosen for a request, its log-probability and the most likely ones, best first.

    ``token`` is below 0 (``NO_DRAW``, ``NO_GRAMMAR``) when there is none; the request then ends
    with an error.
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


# Names in the ledger of what attention sends; every rank reports its bytes under each of them.
ATTENTION_SCHEMES = (
    "ring_pass_kv", "ring_pass_q", "ring_pass_q_partials", "tree_q", "tree_partials", "ship_kv",
)  # fmt: skip


class RankTimes(msgspec.Struct, frozen=True, array_like=True):
    """One rank's part of a step: seconds that it worked on it, and of these waited for other ranks;
    bytes that it sent under each of ``ATTENTION_SCHEMES``; blocks that its host memory could not
    copy since its worker began."""

    rank: int
    seconds: float
    waited: float
    sent: tuple[int, ...]
    host_failed: int = 0


class Outcome(msgspec.Struct, frozen=True, array_like=True, tag="outcome"):
    """What rank 0 learns from one plan (``step`` 0: from one that is no step).

    The tokens drawn and the prompts scored. ``seconds``: the longest time that a rank worked on the
    step; rank 0's ends when it has the rows of all ranks. ``model_seconds``: the longest time in
    the model's forward call. ``failed``: requests with a prompt token that could not be scored;
    they end with an error. ``ranks``: of those with work in the step.
    """

    step: int = 0
    sampled: tuple[Sampled, ...] = ()
    scored: tuple[Scored, ...] = ()
    seconds: float = 0.0
    model_seconds: float = 0.0
    failed: tuple[int, ...] = ()
    ranks: tuple[RankTimes, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Plan] = msgspec.msgpack.Decoder(Plan)


def encode_plan(plan: Plan) -> bytes:
    """The plan as msgpack."""
    return _encoder.encode(plan)


def decode_plan(payload: bytes) -> Plan:
    """The plan from msgpack. Raises ``msgspec.DecodeError`` for bytes that are not a plan."""
    try:
        return _decoder.decode(payload)
    except UnicodeDecodeError as err:  # a tag that is no text
        raise msgspec.DecodeError(f"a plan's tag is not UTF-8: {err}") from err
