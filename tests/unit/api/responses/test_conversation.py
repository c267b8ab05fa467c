"""What a request brings together, of its own, by references and by ``previous_response_id``: it is
counted before it is walked."""

from __future__ import annotations

from typing import Any

import pytest

from ds_cp.api.chat.request import ChatRequest
from ds_cp.api.errors import ApiError
from ds_cp.api.requests.json_weight import MAX_MEMBERS
from ds_cp.api.requests.messages import MAX_MESSAGES, MAX_PARTS
from ds_cp.api.responses.conversation import chat_of, own_items, said_before
from ds_cp.api.responses.items import Item, text_item
from ds_cp.api.responses.request import ResponseInput
from ds_cp.api.responses.store import Kept, ResponseStore, Said
from ds_cp.api.responses.turns import turns_of
from ds_cp.sampling_params import RequestOptions, SamplingParams


def store_of(*turns: list[Item]) -> ResponseStore:
    """Responses r0, r1, .., each after the one before."""
    store = ResponseStore(100, 1 << 30)
    before: Said | None = None
    for number, items in enumerate(turns):
        before = Said(items, before)
        assert store.keep(Kept({"id": f"r{number}"}, items, before))
    return store


def chat(store: ResponseStore, value: Any, previous: str | None = None) -> ChatRequest:
    body = ResponseInput.model_validate({"input": value, "previous_response_id": previous})
    before = said_before(store, body, None)
    items = own_items(store, body, None)
    return chat_of(body, before, items, SamplingParams(), RequestOptions())


def refused(store: ResponseStore, value: Any, previous: str | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(store, value, previous)
    assert caught.value.status_code == 400
    return caught.value


def test_an_item_is_named_once() -> None:
    """A reference of 80 bytes may stand for megabytes: 10,000 of them must not."""
    item = text_item("system", "x" * 1_000_000)
    store = store_of([item])
    reference = {"type": "item_reference", "id": item["id"]}
    assert len(chat(store, [reference]).turns) == 1
    error = refused(store, [{"role": "user", "content": "a"}, *[reference] * 5000])
    assert error.param == "input[2].id" and item["id"] in error.detail


def test_a_conversation_has_no_more_items_than_a_body() -> None:
    most = [text_item("user", "a")] * (MAX_MESSAGES // 2)
    store = store_of(most, most)
    assert len(chat(store, [{"role": "user", "content": "b"}], "r0").turns) == MAX_MESSAGES // 2 + 1
    error = refused(store, [{"role": "user", "content": "b"}], "r1")
    assert error.param == "input" and str(MAX_MESSAGES + 1) in error.detail


def test_a_conversation_has_no_more_parts_than_a_body() -> None:
    wide = text_item("user", "a")
    wide["content"] *= MAX_PARTS
    count = MAX_MEMBERS // MAX_PARTS
    store = store_of([wide] * count, [wide | {"id": "msg_named"}])
    assert len(chat(store, None, "r0").turns) == count
    for value, previous in ((None, "r1"), ([{"id": "msg_named"}], "r0")):
        assert str(MAX_MEMBERS + MAX_PARTS) in refused(store, value, previous).detail


def test_responses_that_say_nothing_count() -> None:
    before: Said | None = None
    for _ in range(5):
        before = Said([], before)
    assert before is not None and (before.count, before.parts) == (5, 0)


def test_a_long_run_is_one_turn() -> None:
    """In time that grows with its items, not with their square: 10 GB would be copied."""
    texts = [text_item("system", f"{i}".rjust(200, "x")) for i in range(10_000)]
    (turn,) = turns_of("first", texts)
    assert turn.content == "\n\n".join(["first", *(item["content"][0]["text"] for item in texts)])
