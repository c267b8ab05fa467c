"""The checks of a request before it is queued: it is valid, and its KV and plan can ever fit. No
torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_cp.errors import CapacityError, RequestError
from ds_cp.grammar.limits import MAX_GRAMMAR_BYTES
from ds_cp.plan import MAX_PLAN_BYTES
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.block_manager import BlockManager

BEGIN_BYTES = MAX_PLAN_BYTES - 8 * 2**20  # bytes of a plan's begins; the rest is for its chunks


@dataclass(frozen=True)
class Limits:
    """``max_model_len`` in tokens; ``max_num_batched_tokens``: tokens that one rank computes in one
    step; ``max_queue_wait_s``: predicted seconds until a request begins, at most."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queue: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_queue_wait_s: float | None = None

    def begin_bytes(self, tokens: int, block_size: int, params: SamplingParams) -> int:
        """An upper bound, in bytes of msgpack, of a ``Begin`` of ``tokens`` known tokens."""
        home = 9  # a list of a rank below 2**16 and a block below 2**32
        ends = len(self.eos_token_ids) + len(params.stop_token_ids)
        sampling = 256 + 16 * len(params.logit_bias) + 10 * ends
        if params.structured_outputs is not None:
            sampling += MAX_GRAMMAR_BYTES
        return sampling + self._token_bytes * tokens + home * (tokens // block_size)

    def begin_tokens(self, block_size: int, params: SamplingParams) -> int:
        """The most known tokens with which a request fits in a plan."""
        fixed = self.begin_bytes(0, block_size, params)
        return (BEGIN_BYTES - fixed) * block_size // (self._token_bytes * block_size + 9)

    @property
    def _token_bytes(self) -> int:
        """Bytes of the largest token id in msgpack."""
        largest = self.vocab_size - 1
        return next((n for n, top in ((1, 0x7F), (2, 0xFF), (3, 0xFFFF)) if largest <= top), 5)


def check_request(limits: Limits, prompt: Sequence[int], params: SamplingParams) -> None:
    """Whether a request is acceptable at all. Linear in the prompt; reads nothing that changes, so
    a caller needs no lock.

    Raises ``RequestError`` that names the field.
    """
    length = len(prompt)
    if not length:
        raise RequestError("the prompt is empty; give at least one token", "prompt")
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < limits.vocab_size)
        raise RequestError(
            f"token id {str(wrong)[:24]} of the prompt is outside the vocabulary, "
            f"0 to {limits.vocab_size - 1}",
            "prompt",
        )
    if params.n > limits.max_num_seqs:
        raise RequestError(
            f"n is {params.n}, but at most scheduler.max_num_seqs = {limits.max_num_seqs} "
            "requests run at once; lower n",
            "n",
        )
    for name, tokens in (
        ("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias),
    ):  # fmt: skip
        for token in tokens:
            if token >= limits.vocab_size:
                raise RequestError(
                    f"{name}: token id {token} is outside the vocabulary, "
                    f"0 to {limits.vocab_size - 1}",
                    name,
                )
    want = params.max_tokens if params.max_tokens is not None else 1
    if length + want > limits.max_model_len:
        raise RequestError(
            f"the request has {length} prompt + {want} new tokens, "
            f"above the model's length {limits.max_model_len}; shorten it or lower max_tokens",
            "prompt" if length >= limits.max_model_len else "max_tokens",
        )


def fit_max_tokens(
    limits: Limits, blocks: BlockManager, length: int, params: SamplingParams
) -> int:
    """``max_tokens`` of an acceptable request, resolved, if its KV and its plan can ever fit here.

    The last token drawn needs no KV, so ``length + max_tokens - 1`` is what must fit. Raises
    ``CapacityError`` or ``RequestError`` with the numbers.
    """
    want = params.max_tokens if params.max_tokens is not None else 1
    need, largest = length + want - 1, blocks.largest_tokens
    if need > largest:
        have = sum(blocks.open_blocks) * blocks.allocator.block_size
        local = blocks.only_local
        why = " (mode local: one rank's)" if local else ""
        more = "use another mode" if local else "add ranks"
        raise CapacityError(
            f"the request needs KV for {need} tokens ({length} prompt + {want} new - 1), "
            f"but all ranks together hold {have}: "
            f"the largest possible request here has {largest} tokens{why}; "
            f"shorten it, raise kv_cache, or {more}",
            need=need, have=have, largest=largest,
            param="prompt" if length > largest else "max_tokens",
        )  # fmt: skip
    sendable = limits.begin_tokens(blocks.allocator.block_size, params)
    if need > sendable:
        raise RequestError(
            f"the request has {need} tokens ({length} prompt + {want} new - 1), "
            f"but the plan that starts it carries at most {sendable} to the ranks "
            f"({BEGIN_BYTES} bytes); shorten it",
            "prompt" if length > sendable else "max_tokens",
        )
    if params.max_tokens is not None:
        return want
    return min(limits.max_model_len, largest + 1, sendable + 1) - length
