"""Responses that run on without their request: it is answered at once, and they are asked for."""

from __future__ import annotations

import asyncio
from typing import Any

from ds_cp.api.answers.budget import Held
from ds_cp.api.answers.generation import Generation
from ds_cp.api.answers.sse import stream_error
from ds_cp.api.errors import ApiError
from ds_cp.api.responses.answer import ResponseAnswer
from ds_cp.api.responses.resource import cancelled, failed
from ds_cp.api.responses.store import Kept, ResponseStore
from ds_cp.errors import EngineDeadError


async def run_in_background(
    store: ResponseStore,
    kept: Kept,
    answer: ResponseAnswer,
    generation: Generation,
    held: Held,
    request_id: str,
) -> None:
    """Let a response that is kept run on. ``kept``: as it is before its answer. ``held``: the
    memory of this response alone, which is given back at its end."""
    kept.task = asyncio.create_task(run(store, kept, answer, generation, held, request_id))
    await asyncio.sleep(0)  # it has begun, so that it ends by itself when it is cancelled


async def run(
    store: ResponseStore,
    kept: Kept,
    answer: ResponseAnswer,
    generation: Generation,
    held: Held,
    request_id: str,
) -> None:
    """Run a response to its end, whatever that is, and keep what it is then."""
    try:
        await answer.collect(generation, held)
        kept.task = kept.asked = None
        answer.finish()  # which keeps it
        if store.get(kept.body["id"], kept.said.owner) is None:
            ended(store, kept, failed(kept.body, (), _too_large()), again=True)
    except asyncio.CancelledError:
        ended(store, kept, cancelled(kept.body))
        raise
    except EngineDeadError as err:
        if not store.log.lasts:
            ended(store, kept, answer.failure(stream_error(err, request_id)))
        kept.task = None  # else it has not ended: a restart goes on with it
    except Exception as err:
        ended(store, kept, answer.failure(stream_error(err, request_id)))
    finally:
        await generation.close()
        held.release()


def ended(store: ResponseStore, kept: Kept, body: dict[str, Any], *, again: bool = False) -> None:
    """A response runs no more. ``again``: it was dropped, though nobody deleted it."""
    kept.task = kept.asked = None
    kept.body = body
    if again or store.get(body["id"], kept.said.owner) is kept:  # it was not deleted
        store.keep(kept)


async def cancel(kept: Kept) -> None:
    """End a response that runs; it is ``cancelled`` then."""
    if kept.task is not None:
        kept.task.cancel()
        await asyncio.gather(kept.task, return_exceptions=True)


def _too_large() -> ApiError:
    return ApiError(
        500,
        "the answer is larger than server.max_stored_response_bytes allows beside what runs; set "
        "max_output_tokens, or raise that limit",
    )
