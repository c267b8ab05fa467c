"""Responses that ran in the background when the server ended: after a restart they go on."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from time import monotonic
from typing import Any

from starlette.requests import Request

from ds_cp.api.answers.budget import Budget, Held
from ds_cp.api.answers.sse import stream_error
from ds_cp.api.chat.start import Conversation, Rendered, start_chat
from ds_cp.api.context import AppContext, request_options
from ds_cp.api.errors import ApiError
from ds_cp.api.responses.answer import ResponseAnswer
from ds_cp.api.responses.background import ended, run
from ds_cp.api.responses.conversation import SAMPLING_NAMES, chat_of
from ds_cp.api.responses.items import Item
from ds_cp.api.responses.request import ResponseRequest
from ds_cp.api.responses.resource import failed
from ds_cp.api.responses.store import Kept, ResponseStore, Said
from ds_cp.api.responses.truncation import fitted
from ds_cp.errors import DsCpError, EngineDeadError, QueueFullError
from ds_cp.journal.responses import BACKGROUND
from ds_cp.sampling_params import RequestOptions, SamplingParams

PAUSE_S = 0.5  # seconds between looks whether the engine is ready, or has room
AT_ONCE = 64  # responses that go on at once: the others wait here rather than in the engine's queue

Json = dict[str, Any]


def sampling_of(body: ResponseRequest) -> SamplingParams:
    """The engine's parameters of a request."""
    return body.sampling(
        SAMPLING_NAMES,
        max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if body.wants_logprobs else None,
        structured_outputs=body.constraint,
    )


async def begin(
    context: AppContext,
    body: ResponseRequest,
    before: Said | None,
    items: list[Item],
    options: RequestOptions,
    request: Request,
    response_id: str,
    arrival: float,
) -> Conversation:
    """Hand the conversation of a request to the engine."""
    chat = chat_of(body, before, items, sampling_of(body), options)
    rendered: Rendered | None = None
    if body.truncation == "auto":
        earlier = before.conversation() if before is not None else []
        context.engine.check_room(chat.options)  # before it is tokenized
        chat, rendered = await fitted(context, chat, body.instructions, [*earlier, *items])
    return await start_chat(context, chat, request, response_id, arrival, rendered)


def background_options(options: RequestOptions, response_id: str) -> RequestOptions:
    """Those of a response that a restart goes on with."""
    return replace(options, resumable=BACKGROUND + response_id)


class Resumption:
    """Goes on with ``left``, responses that a restart has found running, once the engine is
    ready."""

    def __init__(
        self, context: AppContext, store: ResponseStore, budget: Budget, left: list[Kept]
    ) -> None:
        self._context = context
        self._store = store
        self._budget = budget
        self._left = left
        self._seats = asyncio.Semaphore(AT_ONCE)

    def start(self) -> None:
        """Begin; each ends by itself, and is cancelled as any other that runs."""
        for kept in self._left:
            kept.task = asyncio.create_task(self._go_on(kept))

    async def _go_on(self, kept: Kept) -> None:
        request_id = uuid.uuid4().hex
        try:
            while self._context.engine.state == "starting":
                await asyncio.sleep(PAUSE_S)
            async with self._seats:
                while not await self._ran(kept, request_id):
                    await asyncio.sleep(PAUSE_S)
        except asyncio.CancelledError:
            if kept.asked is not None:
                ended(self._store, kept, kept.body | {"status": "cancelled"})
            raise
        except EngineDeadError:
            kept.task = None
        except (ApiError, DsCpError) as err:
            error = stream_error(err, request_id)
            ended(self._store, kept, failed(kept.body, (), error))

    async def _ran(self, kept: Kept, request_id: str) -> bool:
        """Whether it ran to its end; False where there is no room for it now."""
        asked, said = kept.asked, kept.said
        assert asked is not None
        held = Held(self._budget)
        state = {"request_id": request_id, "key_digest": said.owner, "held": held}
        request = Request({"type": "http", "headers": [], "client": None, "state": state})
        options = replace(request_options(asked.body, request), client=asked.client)
        response_id = kept.body["id"]
        try:
            conversation = await begin(
                self._context, asked.body, said.before, list(kept.input),
                background_options(options, response_id), request, response_id, monotonic(),
            )  # fmt: skip
        except ApiError as err:
            held.release()
            if err.status_code != 503:
                raise
            if (now := self._context.engine.state) in ("stopping", "dead"):
                raise EngineDeadError(f"the engine is {now}") from None
            return False
        except BaseException:
            held.release()
            raise

        def done(response: Json) -> None:
            items = [*kept.input, *response["output"]]
            self._store.keep(Kept(response, kept.input, Said(items, said.before, said.owner)))

        answer = ResponseAnswer(self._context, asked.body, conversation, kept.body, done, held)
        try:
            await conversation.generation.admitted(PAUSE_S)
        except QueueFullError:
            await conversation.generation.close()
            held.release()
            return False
        except Exception:
            pass  # it comes again below
        await run(self._store, kept, answer, conversation.generation, held, request_id)
        return True
