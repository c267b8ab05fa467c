"""What rank 0 finds out once its engine is ready: facts for the HTTP application, and lines for the
operator on how chats are read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ds_cp.config import Config, Server
from ds_cp.engine.interface import EngineInfo
from ds_cp.engine.sign_of_life import idle_seconds
from ds_cp.facts import Facts
from ds_cp.model.end_tokens import describe_tokenizer
from ds_cp.parsing.choose import choose
from ds_cp.scheduler.build import build_scheduler
from ds_cp.scheduler.scheduler import Scheduler
from ds_cp.serve.channel import Ready
from ds_cp.serve.worker_link import WorkerLink
from ds_cp.templates.chat import LOOK_S, ChatTemplate
from ds_cp.templates.processes import TemplateProcesses


@dataclass(frozen=True)
class Loaded:
    """What an engine is made of. ``ready``: what the worker reported, with what the tokenizer
    adds to it."""

    tokenizer: Any
    chat_template: ChatTemplate
    ready: Ready
    scheduler: Scheduler


def load(
    config: Config,
    link: WorkerLink,
    load_tokenizer: Callable[[], Any],
    templates: TemplateProcesses,
    paced: bool,
) -> Loaded:
    """Load the tokenizer while the worker starts, and wait for that one."""
    tokenizer = load_tokenizer()
    chat_template = ChatTemplate(tokenizer, templates)
    # While the worker starts, and not so long that a rank gives rank 0 up.
    look_s = min(LOOK_S, idle_seconds(config.comm.timeout_s))
    odd = chat_notes(chat_template, tokenizer, config.server, look_s)
    ready = link.ready()
    facts = ready.facts.with_tokenizer(*describe_tokenizer(tokenizer))
    said = facts.notes[len(ready.facts.notes) :]
    ready = Ready(facts, (*ready.summary, *said, *odd))
    return Loaded(tokenizer, chat_template, ready, build_scheduler(config, facts, paced))


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
