"""Routes for operators: drain a rank while requests run, reopen it, rebalance the cache.

They change the placement of all requests. They need the API key like every other route; without
``server.api_key`` they are open, and the server listens on loopback only.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request

from ds_cp.api.context import AppContext
from ds_cp.api.errors import ApiError, from_engine
from ds_cp.errors import RequestError


def rank_routes(context: AppContext) -> APIRouter:
    """POST /ranks/{rank}/drain, /ranks/{rank}/reopen and /rebalance, all without a body."""
    router = APIRouter(dependencies=[Depends(_refuse_other_pages), Depends(_refuse_body)])

    @router.post("/ranks/{rank}/drain")
    async def drain(rank: int) -> dict[str, Any]:
        """Move everything off a rank, live, and place nothing there. 400 when there is no such
        rank, or when the others cannot hold what runs."""
        context.check_ready()
        try:
            context.engine.drain(rank)
        except RequestError as err:
            raise _about_rank(err) from None
        return {"rank": rank, "drained": True}

    @router.post("/ranks/{rank}/reopen")
    async def reopen(rank: int) -> dict[str, Any]:
        """Let a drained rank take KV again. 400 when there is no such rank."""
        context.check_ready()
        try:
            context.engine.reopen(rank)
        except RequestError as err:
            raise _about_rank(err) from None
        return {"rank": rank, "drained": False}

    @router.post("/rebalance")
    async def rebalance() -> dict[str, int]:
        """Move KV blocks from full ranks to empty ones; how many will move."""
        context.check_ready()
        return {"moving": context.engine.rebalance()}

    return router


def _about_rank(err: RequestError) -> ApiError:
    answer = from_engine(err)
    assert answer is not None
    answer.param = "rank"
    return answer


async def _refuse_other_pages(request: Request) -> None:
    """403 for the web pages of other sites: they can make a browser send a POST without a body, and
    the browser then names them in ``Origin``."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise ApiError(403, "this route does not answer to pages of other sites")


async def _refuse_body(request: Request) -> None:
    if await request.body():
        raise ApiError(400, "this route takes no body")
