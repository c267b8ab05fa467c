"""Routes that say what is served and how it is doing: models, health, load, facts, metrics."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ds_cp.api.context import AppContext

HEALTH_PATHS = frozenset({"/health", "/ready"})  # asked without an API key
METRICS_PATH = "/metrics"
# The content types of /metrics.
_EXPOSITION: dict[str, Any] = {"text/plain": {}, "application/openmetrics-text": {}}


def package_version() -> str:
    """The installed version of ds_cp."""
    try:
        return version("ds_cp")
    except PackageNotFoundError:  # run from a plain checkout
        return "0+unknown"


def state_routes(context: AppContext) -> APIRouter:
    """The routes of this file; all are GET."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """Every name of the model, in OpenAI's shape with the fields of Anthropic's beside."""
        context.check_ready()
        cards = [model_card(context, name) for name in context.model_names()]
        ends = {"first_id": cards[0]["id"], "last_id": cards[-1]["id"], "has_more": False}
        return {"object": "list", "data": cards} | ends

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str) -> dict[str, Any]:
        """404 for a name that is not served."""
        context.check(model)
        return model_card(context, model)

    @router.get("/health")
    async def health() -> Response:
        """Whether it is alive: 200 when ready, or recovering, when requests wait; 503 while
        starting, stalled, stopping or dead, which ``status`` says."""
        return _health(context, ("ready", "recovering"))

    @router.get("/ready")
    async def ready() -> Response:
        """Whether to send requests here rather than elsewhere: 200 when ready alone."""
        return _health(context, ("ready",))

    @router.get("/load")
    async def load() -> dict[str, Any]:
        """Requests in the engine and the share of the KV cache that is in use."""
        context.check_ready()
        stats = context.engine.stats()
        used, total = sum(stats.kv_blocks_used), sum(stats.kv_blocks_total)
        return {
            "server_load": stats.num_requests_running + stats.num_requests_waiting,
            "num_requests_running": stats.num_requests_running,
            "num_requests_waiting": stats.num_requests_waiting,
            "kv_cache_usage_perc": used / total if total else 0.0,
        }

    @router.get("/server_info")
    async def server_info() -> dict[str, Any]:
        """Facts that do not change while the server runs. Lengths and capacities in tokens."""
        context.check_ready()
        info = context.engine.info
        return {
            "version": package_version(),
            "model": info.model,
            "served_model_names": list(context.model_names()),
            "max_model_len": info.max_model_len,
            "vocab_size": info.vocab_size,
            "kv_capacity_tokens": info.kv_capacity_tokens,
            "host_capacity_tokens": info.host_capacity_tokens,
            "largest_request_tokens": info.largest_request_tokens,
            "ranks": info.ranks,
            "hosts": info.hosts,
            "dtype": info.dtype,
            "created": info.created,
        }

    @router.get("/version")
    async def get_version() -> dict[str, str]:
        """The installed version."""
        return {"version": package_version()}

    @router.get(METRICS_PATH, response_class=Response, responses={200: {"content": _EXPOSITION}})
    async def metrics(request: Request) -> Response:
        """Metrics for Prometheus, in the format that ``Accept`` asks for."""
        text, content_type = context.metrics.exposition(",".join(request.headers.getlist("accept")))
        return Response(text, headers={"Content-Type": content_type})

    return router


def model_card(context: AppContext, name: str) -> dict[str, Any]:
    """One served name, as the clients of OpenAI and of Anthropic read a model."""
    info = context.engine.info
    created = datetime.fromtimestamp(info.created, timezone.utc)
    return {
        "id": name,
        "object": "model",
        "created": info.created,
        "owned_by": "ds_cp",
        "root": info.model,
        "max_model_len": info.max_model_len,
        "type": "model",
        "display_name": name,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "max_input_tokens": info.max_model_len,
    }


def _health(context: AppContext, well: Collection[str]) -> Response:
    """``overloaded`` and ``ranks_away`` are there when they say something."""
    health = context.engine.health
    body: dict[str, Any] = {"status": health.state}
    if health.is_overloaded:
        body["overloaded"] = True
    if health.ranks_away:
        body["ranks_away"] = list(health.ranks_away)
    return JSONResponse(body, status_code=200 if health.state in well else 503)
