"""What a request of /v1/responses is about: what it brings, and what is kept before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_cp.api.chat.request import ChatRequest, FieldNames
from ds_cp.api.errors import ApiError
from ds_cp.api.requests.json_weight import MAX_MEMBERS
from ds_cp.api.requests.messages import MAX_MESSAGES
from ds_cp.api.requests.turns import check_answers
from ds_cp.api.responses.items import Item
from ds_cp.api.responses.request import ResponseInput
from ds_cp.api.responses.store import ResponseStore, Said
from ds_cp.api.responses.turns import turns_of
from ds_cp.sampling_params import RequestOptions, SamplingParams

NAMES = FieldNames(
    messages="input",
    max_tokens="max_output_tokens",
    effort="reasoning.effort",
)
SAMPLING_NAMES: Mapping[str, str] = {
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
}


def said_before(store: ResponseStore, body: ResponseInput, owner: str | None) -> Said | None:
    """What ``previous_response_id`` goes on from. Raises ``ApiError`` 400 where it is not kept, or
    not finished."""
    name = body.previous_response_id
    if name is None:
        return None
    kept = store.get(name, owner)
    if kept is None:
        raise ApiError(
            400,
            f"Previous response with id {name!r} not found: it was never stored, was deleted, or "
            "made room for newer ones; send the whole input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    if kept.task is not None:
        raise ApiError(
            400,
            f"Previous response with id {name!r} is still in progress; wait until it is completed",
            param="previous_response_id",
            code="previous_response_in_progress",
        )
    return kept.said


def own_items(store: ResponseStore, body: ResponseInput, owner: str | None) -> list[Item]:
    """The items of the request, those that it names by their ids in full. Raises ``ApiError``: 404
    for one that is not kept, 400 for one that is named twice: what a request brings to the model
    must not be a multiple of what it and the store hold."""
    found = []
    references: set[str] = set()
    for index, item in enumerate(body.input or ()):
        if item["type"] == "item_reference":
            named = store.item(item["id"], owner)
            if named is None:
                raise ApiError(
                    404,
                    f"Item with id {item['id']!r} not found: items are kept as long as their "
                    "responses; send the item itself",
                    param=f"input[{index}].id",
                    code="item_not_found",
                )
            if item["id"] in references:
                raise ApiError(
                    400,
                    f"Duplicate item found with id {item['id']!r}; name it once",
                    param=f"input[{index}].id",
                    code="invalid_value",
                )
            references.add(item["id"])
            item = named
        found.append(item)
    return found


def chat_of(
    body: ResponseInput,
    before: Said | None,
    items: Sequence[Item],
    params: SamplingParams,
    options: RequestOptions,
) -> ChatRequest:
    """The request as a chat. ``items``: its own. Raises ``ApiError`` 400 for the result of a call
    that nobody made, and for a conversation of too many items."""
    _check_size(before, items)
    earlier = before.conversation() if before is not None else []
    turns = turns_of(body.instructions, [*earlier, *items])
    check_answers(turns, "input", "function_call_output")
    return ChatRequest(
        turns=turns,
        params=params,
        options=options,
        tools=body.tools or (),
        choice=body.choice,
        template_kwargs=body.chat_template_kwargs or {},
        effort=body.reasoning.effort if body.reasoning else None,
        stream=bool(body.stream),
        moves_system=True,
        names=NAMES,
    )


def _check_size(before: Said | None, items: Sequence[Item]) -> None:
    """``ApiError`` 400 before a conversation is walked that is longer than a body may be."""
    whole = Said(items, before)
    for count, most, what in (
        (whole.count, MAX_MESSAGES, "items"),
        (whole.parts, MAX_MEMBERS, "parts in its items"),
    ):
        if count > most:
            raise ApiError(
                400,
                f"input: the conversation has {count} {what}, with those of previous_response_id "
                f"and of item references; at most {most}; begin a new one",
                param="input",
                code="invalid_value",
            )
