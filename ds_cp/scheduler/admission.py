"""The checks of a request before it is queued: it is valid, and can be served here one day. No
torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_cp.errors import CapacityError, RequestError
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.block_manager import BlockManager


@dataclass(frozen=True)
class Limits:
    """``max_model_len`` in tokens; ``max_num_batched_tokens``: tokens that one rank computes in one
    step."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queue: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def check_request(
    limits: Limits, blocks: BlockManager, prompt: Sequence[int], params: SamplingParams
) -> int:
    """The request's ``max_tokens``, resolved, if it can ever be served here.

    The last token drawn needs no KV, so ``prompt + max_tokens - 1`` is what must fit. Raises
    ``RequestError``, or ``CapacityError`` with the numbers.
    """
    length, largest = len(prompt), blocks.largest_tokens
    if not length:
        raise RequestError("the prompt is empty; give at least one token", "prompt")
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        raise RequestError(
            f"the prompt has a token id outside the vocabulary, 0 to {limits.vocab_size - 1}",
            "prompt",
        )
    if params.n > limits.max_num_seqs:
        raise RequestError(
            f"n is {params.n}, but at most scheduler.max_num_seqs = "
            f"{limits.max_num_seqs} requests run at once; lower n", "n",
        )  # fmt: skip
    want = params.max_tokens if params.max_tokens is not None else 1
    model_len = limits.max_model_len
    need = length + want - 1
    if need > largest:
        have = sum(blocks.open_blocks) * blocks.allocator.block_size
        local = blocks.only_local
        why = " (mode local: one rank's)" if local else ""
        more = "use another mode" if local else "add ranks"
        raise CapacityError(
            f"the request needs KV for {need} tokens ({length} prompt + {want} new - 1), "
            f"but all ranks together hold {have}: the largest possible request here has "
            f"{largest} tokens{why}; shorten it, raise kv_cache, or {more}",
            need=need, have=have, largest=largest,
        )  # fmt: skip
    if length + want > model_len:
        raise RequestError(
            f"the request has {length} prompt + {want} new tokens, above the model's length "
            f"{model_len}; shorten it or lower max_tokens", "prompt" if length >= model_len
            else "max_tokens",
        )  # fmt: skip
    for token in (*params.stop_token_ids, *params.logit_bias):
        if token >= limits.vocab_size:
            raise RequestError(
                f"token id {token} is outside the vocabulary, 0 to {limits.vocab_size - 1}",
                "logit_bias" if token in params.logit_bias else "stop_token_ids",
            )
    return min(model_len - length, largest - length + 1) if params.max_tokens is None else want
