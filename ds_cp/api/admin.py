"""Routes for operators: drain a rank while requests run, reopen it, rebalance or reset the cache.

They change the placement of all requests. They need the API key like every other route; without
``server.api_key`` they are open, and the server listens on loopback only.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from ds_cp.api.context import AppContext
from ds_cp.api.errors import ApiError, from_engine
from ds_cp.config import canonical_origin
from ds_cp.engine.interface import EngineStats
from ds_cp.errors import RequestError

_LEFT: dict[str, Any] = {
    "description": "Blocks are left to move.",
    "content": {"application/json": {"schema": {}}},
}


def rank_routes(context: AppContext) -> APIRouter:
    """POST /ranks/{rank}/drain, /ranks/{rank}/reopen, /rebalance and /reset_prefix_cache, all
    without a body, and GET /ranks."""
    router = APIRouter()
    listed = frozenset(context.server.cors_origins)

    async def refuse_other_pages(request: Request) -> None:
        check_origins(request, listed)

    changing = [Depends(refuse_other_pages), Depends(_refuse_body)]

    @router.get("/ranks")
    async def ranks() -> dict[str, Any]:
        """The state of every rank ("open", "draining", "drained" or "away") and its KV blocks."""
        context.check_ready()
        return {"ranks": _table(context.engine.stats())}

    @router.post(
        "/ranks/{rank}/drain",
        dependencies=changing,
        response_model=None,
        responses={202: _LEFT},
    )
    async def drain(rank: int) -> dict[str, Any] | JSONResponse:
        """Move everything off a rank, live, and place nothing there. 200 when it is empty; 202
        while blocks are left to move, which GET /ranks follows; what was only kept there for later
        prompts, on the device or in host memory, is forgotten. 400 when there is no such rank, when
        no other rank is open, or when the others cannot hold what runs."""
        context.check_ready()
        try:
            context.engine.drain(rank)
        except RequestError as err:
            raise _about_rank(err) from None
        stats = context.engine.stats()
        if rank not in stats.ranks_draining:
            return {"rank": rank, "drained": True}
        left = stats.kv_blocks_used[rank]
        return JSONResponse({"rank": rank, "drained": False, "blocks_left": left}, 202)

    @router.post("/ranks/{rank}/reopen", dependencies=changing)
    async def reopen(rank: int) -> dict[str, Any]:
        """Let a drained rank take KV again. 400 when there is no such rank."""
        context.check_ready()
        try:
            context.engine.reopen(rank)
        except RequestError as err:
            raise _about_rank(err) from None
        return {"rank": rank, "drained": False}

    @router.post("/rebalance", dependencies=changing)
    async def rebalance() -> dict[str, int]:
        """Move KV blocks from full ranks to empty ones; how many will move."""
        context.check_ready()
        return {"moving": context.engine.rebalance()}

    @router.post("/reset_prefix_cache", dependencies=changing)
    async def reset_prefix_cache() -> dict[str, int]:
        """Forget every cached prefix; how many KV blocks became free. What runs keeps its own."""
        context.check_ready()
        return {"blocks_freed": context.engine.reset_prefix_cache()}

    return router


def check_origins(request: Request, listed: frozenset[str]) -> None:
    """403 for the web pages of other sites: they can make a browser send a POST without a body, and
    the browser then names them in ``Origin``.

    A page is of this site if scheme, host and port agree. ``listed`` origins
    (``server.cors_origins``) may too, such as the page's behind a proxy that speaks TLS; "*" among
    them lists none.
    """
    own = canonical_origin(f"{request.scope['scheme']}://{request.headers.get('host', '')}")
    for given in request.headers.getlist("origin"):
        origin = canonical_origin(given)
        if origin is None or (origin != own and origin not in listed):
            raise ApiError(
                403,
                "this route does not answer to pages of other sites; "
                "list the page's origin in server.cors_origins if it is yours",
            )


def _table(stats: EngineStats) -> list[dict[str, Any]]:
    kept = stats.kv_blocks_cached or (0,) * len(stats.kv_blocks_total)
    counts = zip(stats.kv_blocks_used, kept, stats.kv_blocks_total, strict=True)
    return [
        {
            "rank": rank,
            "state": stats.rank_state(rank),
            "kv_blocks": {"used": used, "cached": cached, "total": total},
        }
        for rank, (used, cached, total) in enumerate(counts)
    ]


def _about_rank(err: RequestError) -> ApiError:
    answer = from_engine(err)
    assert answer is not None
    answer.param = "rank"
    return answer


async def _refuse_body(request: Request) -> None:
    try:
        async for piece in request.stream():
            if piece:  # the rest is not waited for
                raise ApiError(400, "this route takes no body")
    except ClientDisconnect:
        raise ApiError(400, "the client left before the end of the body") from None
