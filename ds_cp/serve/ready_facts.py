"""What rank 0 finds out once its engine is ready: facts for the HTTP application, and lines for the
operator on how chats are read."""

from __future__ import annotations

import time
from typing import Any

from ds_cp.config import Server
from ds_cp.engine.interface import EngineInfo
from ds_cp.facts import Facts
from ds_cp.parsing.choose import choose
from ds_cp.scheduler.scheduler import Scheduler
from ds_cp.templates.chat import ChatTemplate


def info_of(model: str, facts: Facts, scheduler: Scheduler) -> EngineInfo:
    """The engine's facts, of a model with this name in the API."""
    return EngineInfo(
        model=model,
        max_model_len=facts.max_model_len,
        vocab_size=facts.vocab_size,
        kv_capacity_tokens=scheduler.allocator.capacity_tokens,
        largest_request_tokens=scheduler.largest_tokens,
        ranks=len(facts.hosts),
        hosts=len(set(facts.hosts)),
        dtype=facts.dtype,
        created=int(time.time()),
        host_capacity_tokens=sum(facts.host_blocks_per_rank) * facts.block_size,
    )


def chat_notes(
    template: ChatTemplate, tokenizer: Any, server: Server, timeout_s: float
) -> list[str]:
    """Lines on the chat template, which is examined within ``timeout_s`` seconds, on the parsers of
    tool calls and reasoning, and on values of the config that the template does not read."""
    notes = template.look(timeout_s)
    if not template.available:
        return notes
    added = getattr(tokenizer, "added_tokens_decoder", {})
    chosen = choose(
        template.choice.text,
        [str(token) for token in added.values()],
        tool=server.tool_parser,
        reasoning=server.reasoning_parser,
    )
    unread = sorted(set(server.chat_template_kwargs) - template.choice.names())
    if unread:
        names = ", ".join(unread)
        notes.append(f"server.chat_template_kwargs: the chat template does not read {names}")
    return [*notes, *chosen.notes]
