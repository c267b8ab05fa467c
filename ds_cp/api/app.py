"""The HTTP application: OpenAI's protocol over an ``EngineInterface``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ds_cp.api.admin import rank_routes
from ds_cp.api.answers.budget import ID_BYTES, Budget, HoldMemory, auto_bytes, held_by
from ds_cp.api.answers.chat import chat_completions, tokenized
from ds_cp.api.answers.completions import completions
from ds_cp.api.answers.json_pieces import json_integers, json_object, json_text
from ds_cp.api.answers.logprobs import TokenTexts
from ds_cp.api.answers.paced import PacedJson, Turns
from ds_cp.api.chat.start import render
from ds_cp.api.chat.style import ChatStyles
from ds_cp.api.context import AppContext
from ds_cp.api.errors import ApiError, ErrorBody, from_engine, from_validation
from ds_cp.api.live import live_routes
from ds_cp.api.messages.route import message_routes
from ds_cp.api.metrics import ServerMetrics
from ds_cp.api.openapi import CHAT_ANSWERS, TEXT_ANSWERS
from ds_cp.api.page_files import page_paths, page_routes
from ds_cp.api.request_log import RequestLog
from ds_cp.api.requests.bodies import Bodies
from ds_cp.api.requests.chat_body import ChatCompletionRequest, TokenizeRequest
from ds_cp.api.requests.json_route import strict_json_route
from ds_cp.api.requests.protocol import CompletionRequest, DetokenizeRequest
from ds_cp.api.responses.route import response_routes
from ds_cp.api.state import HEALTH_PATHS, METRICS_PATH, package_version, state_routes
from ds_cp.api.tokenization import TextCodec
from ds_cp.api.transport.answer_log import AnswerLog
from ds_cp.api.transport.cors import Cors
from ds_cp.api.transport.hosts import Hosts
from ds_cp.api.transport.middleware import ApiKeys, Failures, ReadLimits, RequestIds
from ds_cp.api.transport.routing import Routing, allowed_methods, flat
from ds_cp.config import Server
from ds_cp.engine.interface import EngineInterface
from ds_cp.errors import DsCpError
from ds_cp.journal.journal import Journal
from ds_cp.log_stream import say

# What every route may answer besides its own, for openapi.json.
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is at fault."},
    "5XX": {"model": ErrorBody, "description": "The server is at fault or not ready."},
}


def create_app(
    engine: EngineInterface,
    server: Server,
    *,
    log_requests: bool = False,
    journal: Journal | None = None,
) -> FastAPI:
    """The ASGI application over ``engine``, with the settings of the config's ``server`` section.
    ``log_requests``: a line on stderr for each answer that ends. ``journal``: keeps what is to
    outlive a restart.

    The engine may still be starting: its info and tokenizer are not read before its state is
    "ready". Until then every route but /health answers 503, or without the engine's numbers.
    """

    def model_name() -> str:
        return (*server.model_names, engine.info.model)[0]

    codec = TextCodec(engine, server.tokenize_timeout_s)
    context = AppContext(
        engine,
        server,
        ServerMetrics(engine, model_name),
        codec,
        TokenTexts(engine),
        Turns(),
        ChatStyles(engine, server),
    )
    engine.on_ended(context.metrics.ended)
    if log_requests:
        engine.on_ended(RequestLog(model_name, server.log_format == "json"))

    def model_length() -> int:
        context.check_ready()
        return engine.info.max_model_len

    limit = server.max_buffered_bytes
    budget = Budget(auto_bytes() if limit == "auto" else limit)
    bodies = Bodies(server.max_body_bytes, server.body_timeout_s, model_length, budget.limit)
    json_route = strict_json_route(
        bodies, server.unknown_fields == "refuse", context.metrics.ignored_fields
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        codec.close()
        bodies.close()

    app = FastAPI(
        title="ds_cp",
        version=package_version(),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # Routing takes a slash at the end away
        responses=_ERRORS,
    )
    routers = (
        _completion_routes(context, json_route),
        _text_routes(context, json_route),
        response_routes(context, json_route, budget, journal),
        message_routes(context, json_route),
        state_routes(context),
        rank_routes(context),
        live_routes(context),
        page_routes(),
    )
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(DsCpError, _on_typed)
    # The last one added is the outermost.
    app.add_middleware(HoldMemory, budget=budget)
    if server.api_keys:
        app.add_middleware(ApiKeys, keys=server.api_keys, open_paths=HEALTH_PATHS | page_paths())
    app.add_middleware(Routing, routes=app.router.routes)
    app.add_middleware(Hosts, hosts=server.answered_hosts)
    app.add_middleware(
        ReadLimits, max_body_bytes=server.max_body_bytes, timeout_s=server.body_timeout_s
    )
    app.add_middleware(Failures)
    if server.cors_origins:
        app.add_middleware(Cors, origins=server.cors_origins)
    app.add_middleware(
        AnswerLog,
        paths=[route.path for router in routers for route in flat(router.routes)],
        count=context.metrics.answered,
        say=say if log_requests else None,
        left_out={*HEALTH_PATHS, METRICS_PATH},
    )
    app.add_middleware(RequestIds)
    return app


def _completion_routes(context: AppContext, json_route: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=json_route)

    @router.post("/v1/chat/completions", response_model=None, responses=CHAT_ANSWERS)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation, whole or (``stream``) as events."""
        return await chat_completions(context, body, request)

    @router.post("/v1/completions", response_model=None, responses=TEXT_ANSWERS)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Complete one prompt or several, as text or token ids, whole or (``stream``) as events."""
        return await completions(context, body, request)

    return router


def _text_routes(context: AppContext, json_route: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=json_route)

    @router.post("/tokenize", response_model=dict[str, Any])
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """The tokens of a prompt, or of messages as the chat template writes them."""
        context.check(body.model)
        if body.messages is not None:
            _, ids = await render(context, tokenized(body))
        else:
            ids = await context.codec.encode(
                body.prompt or "", add_special_tokens=body.add_special_tokens
            )
        held_by(request.scope).take(ID_BYTES * len(ids))
        answer = {
            "count": len(ids),
            "max_model_len": context.engine.info.max_model_len,
            "tokens": json_integers(ids),
        }
        return PacedJson(json_object(answer), context.turns)

    @router.post("/detokenize", response_model=dict[str, str])
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of some tokens."""
        context.check(body.model)
        context.codec.check_count(len(body.tokens))
        context.check_ids(body.tokens, "tokens")
        text = await context.codec.decode(body.tokens)
        return PacedJson(json_object({"prompt": json_text(text)}), context.turns)

    return router


async def _on_validation(request: Request, err: Exception) -> Response:
    assert isinstance(err, RequestValidationError)
    return from_validation(err.errors()).response()


async def _on_http(request: Request, err: Exception) -> Response:
    assert isinstance(err, HTTPException)
    if isinstance(err, ApiError):
        return err.response()
    texts = {
        404: f"there is no {request.method} {request.url.path[:200]} here; see /openapi.json",
        405: f"{request.method} is not allowed on {request.url.path[:200]}",
    }
    message = texts.get(err.status_code, str(err.detail))
    headers = dict(err.headers or {})
    if err.status_code == 405:  # of all routes of the path, not of the first one alone
        methods = allowed_methods(request.app.router.routes, request.scope["path"])
        headers["Allow"] = ", ".join(methods)
    return ApiError(err.status_code, message, headers=headers).response()


async def _on_typed(request: Request, err: Exception) -> Response:
    assert isinstance(err, DsCpError)
    answer = from_engine(err)
    if answer is None:
        raise err  # not the client's fault: Failures logs it and answers 500
    return answer.response()
