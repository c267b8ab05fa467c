"""The routes of /v1/responses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, Literal

from fastapi import APIRouter, Query
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from ds_cp.api.answers.budget import Budget, held_by
from ds_cp.api.answers.named_events import new_id
from ds_cp.api.answers.paced import PacedJson
from ds_cp.api.answers.respond import respond
from ds_cp.api.chat.start import render
from ds_cp.api.context import AppContext, key_digest_of, request_id_of, request_options
from ds_cp.api.errors import ApiError
from ds_cp.api.openapi import RESPONSE_ANSWERS
from ds_cp.api.responses.answer import ResponseAnswer
from ds_cp.api.responses.background import cancel, run_in_background
from ds_cp.api.responses.conversation import SAMPLING_NAMES, chat_of, own_items, said_before
from ds_cp.api.responses.journal import restore, synced
from ds_cp.api.responses.request import ResponseInput, ResponseRequest
from ds_cp.api.responses.resource import in_pieces, new_response
from ds_cp.api.responses.resume import Resumption, background_options, begin
from ds_cp.api.responses.store import Asked, Kept, ResponseStore, Said
from ds_cp.journal.journal import Journal

MAX_ID_CHARS = 128  # characters of an id in a path
MAX_PAGE = 100  # items of one page

Json = dict[str, Any]


def response_routes(
    context: AppContext, json_route: type[APIRoute], budget: Budget, journal: Journal | None
) -> APIRouter:
    """POST /v1/responses, and what is kept of it: GET, DELETE, cancel, input_items. With a
    ``journal`` it has what was kept before a restart, and what was running goes on, its memory of
    ``budget``."""
    server = context.server
    store = ResponseStore(server.max_stored_responses, server.max_stored_response_bytes)
    left = restore(store, journal) if journal is not None else []

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        Resumption(context, store, budget, left).start()
        yield
        await store.close()

    router = APIRouter(lifespan=lifespan)
    bodies = APIRouter(route_class=json_route)  # of the routes that read one

    @bodies.post("/v1/responses", response_model=None, responses=RESPONSE_ANSWERS)
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        return await _create(context, store, journal, body, request)

    @bodies.post("/v1/responses/input_tokens", response_model=dict[str, Any])
    async def count_input_tokens(body: ResponseInput, request: Request) -> Json:
        context.check(body.model)
        owner = key_digest_of(request)
        params = body.sampling(SAMPLING_NAMES)
        options = request_options(body, request)
        before = said_before(store, body, owner)
        chat = chat_of(body, before, own_items(store, body, owner), params, options)
        _, ids = await render(context, chat)
        return {"object": "response.input_tokens", "input_tokens": len(ids)}

    @router.get("/v1/responses/{response_id}", response_model=None, responses=RESPONSE_ANSWERS)
    async def get_response(
        response_id: str, request: Request, stream: bool = Query(default=False)
    ) -> Response:
        kept = store.find(response_id, key_digest_of(request))
        if stream:
            raise ApiError(
                400, "stream is not supported here: ask again without it", param="stream"
            )
        return PacedJson(in_pieces(kept.body), context.turns)

    @router.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str, request: Request) -> Json:
        kept = store.find(response_id, key_digest_of(request))
        await cancel(kept)
        store.drop(response_id)
        await synced(journal)
        return {"id": response_id, "object": "response", "deleted": True}

    @router.post(
        "/v1/responses/{response_id}/cancel", response_model=None, responses=RESPONSE_ANSWERS
    )
    async def cancel_response(response_id: str, request: Request) -> Response:
        kept = store.find(response_id, key_digest_of(request))
        if not kept.body["background"]:
            raise ApiError(
                400,
                "Only responses that were created with background true can be cancelled; the "
                "others end with their connection",
                param="background",
            )
        await cancel(kept)
        kept = store.find(response_id, key_digest_of(request))
        return PacedJson(in_pieces(kept.body), context.turns)

    @router.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(
        response_id: str,
        request: Request,
        limit: int = Query(default=20, ge=1, le=MAX_PAGE),
        order: Literal["asc", "desc"] = Query(default="desc"),
        after: str | None = Query(default=None, max_length=MAX_ID_CHARS),
    ) -> Json:
        kept = store.find(response_id, key_digest_of(request))
        items = list(kept.input) if order == "asc" else list(reversed(kept.input))
        return _page(items, limit, after)

    router.include_router(bodies)
    return router


async def _create(
    context: AppContext,
    store: ResponseStore,
    journal: Journal | None,
    body: ResponseRequest,
    request: Request,
) -> Response:
    arrival = monotonic()
    context.check(body.model)
    owner = key_digest_of(request)
    before = said_before(store, body, owner)
    items = own_items(store, body, owner)
    response = new_response(body, new_id("resp"), context.model_name(body.model))
    options = request_options(body, request)
    if body.background:
        options = background_options(options, response["id"])

    def kept_with(response: Json, asked: Asked | None = None) -> Kept:
        said = Said([*items, *response["output"]], before, owner)
        return Kept(response, items, said, asked=asked)

    def done(response: Json) -> None:
        if response["store"]:
            store.keep(kept_with(response))

    held = held_by(request.scope)
    if body.background:  # its memory is not the request's, which ends first
        held = request.scope["state"]["held"] = held.moved()
    try:
        conversation = await begin(
            context, body, before, items, options, request, response["id"], arrival
        )
        answer = ResponseAnswer(context, body, conversation, response, done, held)
        generation = conversation.generation
        if not body.background:
            return await respond(context, request, answer, generation, stream=bool(body.stream))
        kept = kept_with(response, Asked(body, options.client))
        if not store.keep(kept):
            await generation.close()
            raise ApiError(
                400,
                "background needs a place to keep the response, and it is larger than "
                "server.max_stored_response_bytes or server.max_stored_responses allow",
                param="background",
            )
    except BaseException:
        held.release()
        raise
    await run_in_background(store, kept, answer, generation, held, request_id_of(request))
    await synced(journal)
    return PacedJson(in_pieces(response), context.turns)


def _page(items: list[Json], limit: int, after: str | None) -> Json:
    begin = 0
    if after is not None:
        places = [index for index, item in enumerate(items) if item["id"] == after]
        if not places:
            raise ApiError(400, f"after: there is no item {after!r} here", param="after")
        begin = places[0] + 1
    page = items[begin : begin + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": begin + limit < len(items),
    }
