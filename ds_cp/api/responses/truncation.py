"""``truncation`` auto: the beginning of a conversation is left out until the rest fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from ds_cp.api.chat.request import ChatRequest
from ds_cp.api.chat.start import Rendered, render
from ds_cp.api.context import AppContext
from ds_cp.api.errors import OVERFLOW, ApiError
from ds_cp.api.responses.items import Item
from ds_cp.api.responses.turns import turns_of

# Tokens that are left for an answer without max_output_tokens, but at most a part of the context.
OPEN_TOKENS, OPEN_SHARE = 1024, 1 / 4
MAX_RENDERS = 8  # prompts that are rendered for one request
ITEM_CHARS = 32  # characters of the template around an item, about


def units_of(items: Sequence[Item]) -> list[set[int]]:
    """What may be left out, as indices of items, in the order in which it is.

    First what stands before the last item of the user: each of the user's with what the model
    answered to it. Then the steps behind that, each of what the model said and called, with the
    results; but not the newest one. A call goes with its results, wherever they are; never the
    system's and the developer's items, since they instruct, nor the last one of the user.
    """
    users = [index for index, item in enumerate(items) if item.get("role") == "user"]
    last = users[-1] if users else -1
    units: list[set[int]] = []
    before = ""  # the type of the item before, among those that may be left out
    calls: dict[str, set[int]] = {}  # the unit of a call, by its id
    for index, item in enumerate(items):
        kind = item["type"]
        if index == last:
            before = ""
        if item.get("role") in ("system", "developer") or index == last:
            continue
        result = kind == "function_call_output"
        if not result:
            ended = index > last and before == "function_call_output"
            if not before or item.get("role") == "user" or ended:
                units.append(set())
            units[-1].add(index)
            if kind == "function_call":
                calls[item["call_id"]] = units[-1]
        elif item["call_id"] in calls:
            calls[item["call_id"]].add(index)
        before = kind
    if units and max(units[-1]) > last:
        units.pop()  # the newest step
    return units


async def fitted(
    context: AppContext,
    chat: ChatRequest,
    instructions: str | None,
    items: Sequence[Item],
) -> tuple[ChatRequest, Rendered | None]:
    """The chat of ``items`` with as much of its beginning left out as it must be, so that the
    prompt and the new tokens fit; and its prompt. As it was, without a prompt, where that cannot
    be: then it is refused as any other one that is too long.

    How much to leave out is estimated by characters and found by rendering, ``MAX_RENDERS`` times
    at most, so that a unit more than needed may go.
    """
    room = context.room(0)
    new = chat.params.max_tokens
    most = room - (min(OPEN_TOKENS, int(room * OPEN_SHARE)) if new is None else new)
    if most < 1:
        return chat, None
    units = units_of(items)
    chars = [_chars(item) for item in items]
    total = sum(chars) + len(instructions or "") + 1
    kept = list(accumulate((sum(chars[i] for i in unit) for unit in units), lambda a, b: a - b,
                           initial=total))  # fmt: skip
    low, high, count = -1, len(units) + 1, 0  # ``low`` units are too few, ``high`` are enough
    found: tuple[ChatRequest, Rendered] | None = None
    for turn in range(MAX_RENDERS):
        if found is None and turn == MAX_RENDERS - 1:
            count = len(units)
        gone = set[int]().union(*units[:count])
        rest = [item for index, item in enumerate(items) if index not in gone]
        part = replace(chat, turns=turns_of(instructions, rest))
        rendered = await _rendered(context, part)
        length = 2 * most if rendered is None else max(len(rendered[1]), 1)
        if rendered is not None and length <= most:
            high, found = count, (part, rendered)
        else:
            low = count
        if high - low <= 1:
            break
        goal = kept[count] * most / length
        count = next((k for k in range(len(kept)) if kept[k] <= goal), len(units))
        if found is not None and count >= high:
            break
        count = min(max(count, low + 1), high - 1)
    return found or (chat, None)


async def _rendered(context: AppContext, chat: ChatRequest) -> Rendered | None:
    """The prompt; None where it is longer than the model."""
    try:
        return await render(context, chat)
    except ApiError as err:
        if err.code != OVERFLOW:
            raise
        return None


def _chars(item: Item) -> int:
    texts = [item.get(name, "") for name in ("arguments", "output", "name")]
    texts += [part["text"] for part in item.get("content", ())]
    return ITEM_CHARS + sum(map(len, texts))
