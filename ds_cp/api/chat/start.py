"""From a chat request to a running one: rendered, constrained, handed to the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from ds_cp.api.answers.budget import ID_BYTES, Held, held_by
from ds_cp.api.answers.generation import Generation
from ds_cp.api.chat.prompt import template_input
from ds_cp.api.chat.reader import AnswerReader
from ds_cp.api.chat.request import ChatRequest
from ds_cp.api.chat.style import ChatStyle
from ds_cp.api.context import AppContext
from ds_cp.api.errors import ApiError
from ds_cp.errors import RequestError
from ds_cp.grammar.constraint import FIELD, StructuredOutputsParams
from ds_cp.grammar.lark import Thought
from ds_cp.parsing.calls import Toolbox
from ds_cp.parsing.forced import PLAIN, CallGrammar, call_grammar, opening
from ds_cp.parsing.ids import new_ids
from ds_cp.parsing.registry import HARMONY, TOOL_FAMILIES, make_parser
from ds_cp.parsing.thinking import TAIL_CHARS
from ds_cp.sampling_params import SamplingParams
from ds_cp.templates.messages import ToolShape

Rendered = tuple[str, list[int]]  # a prompt, as text and as token ids


@dataclass(frozen=True)
class Conversation:
    """A chat that runs. ``readers``: one for each of its ``n`` answers. ``held``: the memory of its
    request."""

    chat: ChatRequest
    params: SamplingParams
    prompt_ids: list[int]
    generation: Generation
    readers: list[AnswerReader]
    held: Held


async def start_chat(
    context: AppContext,
    chat: ChatRequest,
    request: Request,
    answer_id: str,
    arrival: float,
    rendered: Rendered | None = None,
) -> Conversation:
    """Render a chat, unless it is ``rendered``, and hand it to the engine. ``arrival``: of the HTTP
    request, in seconds of ``time.monotonic()``.

    Raises ``ApiError`` and ``RequestError`` with the client's field for what cannot be rendered, is
    too long, or the engine refuses; what it reads of the chat is charged to the request's memory.
    """
    context.engine.check_room(chat.options, chat.params.n)  # before it costs a moment more
    style = context.styles.now()
    shape = await context.codec.tool_shape()
    text, ids = rendered or await render(context, chat)
    plan = plan_answer(chat, style, shape, text)
    held = held_by(request.scope)
    held.take(ID_BYTES * len(ids))
    generation = context.start(
        answer_id,
        [ids],
        plan.params,
        chat.options,
        arrival,
        held,
        stream=chat.stream,
        prompt_param=chat.names.messages,
        max_param=chat.names.max_tokens,
        clamp=chat.clamp,
    )
    kept = plan.params.kept_special_tokens if plan.params.skip_special_tokens else frozenset()
    marks = [name for name, number in style.special.items() if number in kept]
    readers = [
        AnswerReader(plan.parser(), marks, lambda token: context.texts.piece(token)[0], index)
        for index in range(plan.params.n)
    ]
    return Conversation(chat, plan.params, ids, generation, readers, held)


async def render(context: AppContext, chat: ChatRequest) -> Rendered:
    """The prompt of a chat, as text and as token ids. Raises ``ApiError`` with the client's
    field."""
    style = context.styles.now()
    values = style.template_values(
        context.server.chat_template_kwargs,
        chat.template_kwargs,
        chat.effort,
        chat.names.template_kwargs,
        chat.names.effort,
    )
    shape = await context.codec.tool_shape()
    try:
        return await context.codec.encode_chat(template_input(chat, style, shape, values))
    except ApiError as err:
        if err.param == "messages":
            err.param = chat.names.messages
        raise


@dataclass(frozen=True)
class AnswerPlan:
    """How a chat is answered: the engine's parameters, and what makes the parser of an answer."""

    params: SamplingParams
    parser: Callable[[], Any]


def plan_answer(chat: ChatRequest, style: ChatStyle, shape: ToolShape, prompt: str) -> AnswerPlan:
    """What the engine must keep, and how its text is read. ``prompt``: as it was rendered.

    Raises ``RequestError`` with the client's field where the tools' schemas or the client's own
    constraint cannot be kept.
    """
    tool, reasoning = style.parser(shape.offers), style.chosen.reasoning
    may_call = chat.choice.mode != "none" and bool(chat.choice.names)
    forced: CallGrammar | None = None
    if may_call and (tool or chat.choice.mode == "required"):
        forced = call_grammar(tool or PLAIN, chat.tools, chat.choice)
    reads = forced.tool if forced else tool if may_call else None
    # A format is of the text of an answer. Where it must be a call, it has none.
    own = None if chat.choice.mode == "required" else chat.params.structured_outputs
    end = _end_of_prompt(chat, reasoning, prompt)
    before = opening(reasoning, end, chat.continue_final)
    thought = Thought(before.end, before.begin, before.optional)
    special = style.kept(reads, reasoning)
    constraint: StructuredOutputsParams | None = None
    if own is not None:
        then = replace(thought, then=before.before_content)
        constraint = _own_constraint(chat, own, then, reads, special)
    elif forced is not None:
        constraint = _calls_constraint(chat, forced, thought, special)
    params = replace(
        chat.params,
        structured_outputs=constraint,
        kept_special_tokens=frozenset(special.values()),
    )

    earlier = sum(len(turn.calls) for turn in chat.turns)
    schemas = {one.name: one.parameters for one in chat.tools}
    toolbox = Toolbox(schemas, new_ids(style.ids, earlier))
    return AnswerPlan(
        params, lambda: make_parser(reads, reasoning, toolbox, end, chat.continue_final)
    )


def _end_of_prompt(chat: ChatRequest, reasoning: str | None, prompt: str) -> str:
    """What of the prompt says where its answer begins. Where the answer goes on with the last turn,
    that is what this turn said: a mark that the user wrote opens no reasoning. Harmony's header
    stands before it; the last one of the prompt counts."""
    if not chat.continue_final:
        return prompt[-TAIL_CHARS:]
    if reasoning == HARMONY:
        return prompt
    content = chat.turns[-1].content
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return prompt[max(0, len(prompt) - sum(map(len, parts))) :]


def _calls_constraint(
    chat: ChatRequest, forced: CallGrammar, thought: Thought, special: dict[str, int]
) -> StructuredOutputsParams:
    """The answer is calls. Schemas of tools that are not strict are kept as far as they can be."""
    name = chat.names.tools
    try:
        return StructuredOutputsParams(
            structural_tag=forced.structural_tag,
            lenient=not all(one.strict for one in chat.tools if one.name in chat.choice.names),
            thought=thought,
            special_tokens=special,
            asked_as=name,
        )
    except RequestError as err:
        message = str(err).replace(f"{FIELD}.structural_tag", name).replace(FIELD, name)
        raise RequestError(message, name) from None


def _own_constraint(
    chat: ChatRequest,
    own: StructuredOutputsParams,
    thought: Thought,
    reads: str | None,
    special: dict[str, int],
) -> StructuredOutputsParams:
    """The content is what the client wants, behind the reasoning; or the answer calls tools."""
    begins: tuple[str, ...] = ()
    if reads is not None:
        form = TOOL_FAMILIES[reads].format
        begins = form.triggers or tuple(map(form.before_arguments, chat.choice.names))
    free = thought.optional or not thought.end  # the model need not think
    if own.grammar is not None and free and not begins:
        return own  # in place of it: a foreign grammar cannot be put behind anything
    try:
        return replace(own, thought=thought, or_begins=begins, special_tokens=special)
    except RequestError as err:
        name = own.asked_as
        message = str(err) if name == FIELD else str(err).replace(f"{FIELD}.", f"{name}: ")
        raise RequestError(message, name) from None
