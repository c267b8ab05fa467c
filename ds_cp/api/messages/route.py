"""The routes of /v1/messages."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from ds_cp.api.answers.named_events import new_id
from ds_cp.api.answers.respond import respond
from ds_cp.api.chat.request import ChatRequest, FieldNames
from ds_cp.api.chat.start import render, start_chat
from ds_cp.api.context import AppContext, request_id_of, request_options
from ds_cp.api.error_shapes import MESSAGES_PATH
from ds_cp.api.messages.answer import MessageAnswer
from ds_cp.api.messages.request import CountRequest, MessagesRequest
from ds_cp.api.openapi import MESSAGE_ANSWERS, MESSAGE_ERRORS
from ds_cp.api.requests.turns import check_answers
from ds_cp.sampling_params import SamplingParams

_NAMES = FieldNames(effort="thinking")
_SAMPLING_NAMES: Mapping[str, str] = {"stop": "stop_sequences"}


def message_routes(context: AppContext, json_route: type[APIRoute]) -> APIRouter:
    """POST /v1/messages and /v1/messages/count_tokens."""
    router = APIRouter(route_class=json_route)

    @router.post(MESSAGES_PATH, response_model=None, responses=MESSAGE_ANSWERS)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        arrival = monotonic()
        context.check(body.model)
        params = body.sampling(
            _SAMPLING_NAMES,
            max_tokens=body.max_tokens,
            stop=body.stop_sequences or None,
            structured_outputs=body.constraint,
        )
        chat = _chat_of(body, params, request)
        message_id = new_id("msg")
        conversation = await start_chat(context, chat, request, message_id, arrival)
        request_id = request_id_of(request)
        answer = MessageAnswer(context, body, conversation, message_id, request_id)
        stream = bool(body.stream)
        response = await respond(context, request, answer, conversation.generation, stream=stream)
        response.headers["request-id"] = request_id
        return response

    @router.post(f"{MESSAGES_PATH}/count_tokens", responses=MESSAGE_ERRORS)
    async def count_tokens(body: CountRequest, request: Request) -> dict[str, int]:
        context.check(body.model)
        _, ids = await render(context, _chat_of(body, body.sampling(_SAMPLING_NAMES), request))
        return {"input_tokens": len(ids)}

    return router


def _chat_of(body: CountRequest, params: SamplingParams, request: Request) -> ChatRequest:
    turns = body.turns
    check_answers(turns, "messages", "tool_result")
    last = turns[-1]
    # An answer goes on with what the assistant said last.
    continues = last.role == "assistant" and bool(last.content) and not last.calls
    return ChatRequest(
        turns=turns,
        params=params,
        options=request_options(body, request),
        tools=body.tools or (),
        choice=body.choice,
        template_kwargs=body.chat_template_kwargs or {},
        effort=body.effort,
        continue_final=continues,
        add_generation_prompt=not continues,
        stream=bool(body.stream),
        clamp=True,
        moves_system=True,
        names=_NAMES,
    )
