"""Checks of OpenAI's own client: tools, JSON, and the Responses protocol. ``openai_sdk.py`` calls
``declare``."""

from __future__ import annotations

import json
from typing import Any

import openai
from checks import ASK_JSON, ASK_WEATHER, TOOL, Checks, is_call, is_object, weather
from person import Person

FORCED: Any = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
FLAT: Any = {"type": "function", "strict": False} | TOOL["function"]
USER = {"role": "user", "content": ASK_WEATHER}


def declare(checks: Checks, client: Any) -> None:
    """Run the checks."""
    chats(checks, client.chat.completions)
    responses(checks, client.responses)


def chats(checks: Checks, chat: Any) -> None:
    """Tools and JSON of chat completions."""
    given: Any = {"model": checks.model, "max_tokens": 300, "temperature": 0}
    person: Any = given | {"messages": [{"role": "user", "content": ASK_JSON}]}

    @checks.check("tools")
    def _() -> Any:
        (call,) = chat.create(messages=[USER], **given | FORCED).choices[0].message.tool_calls
        is_call(call.function.name, call.function.arguments)
        named = {"type": "function", "function": {"name": TOOL["function"]["name"]}}
        for choice in (named, "required"):
            answer = chat.create(messages=[USER], **given | FORCED | {"tool_choice": choice})
            (again,) = answer.choices[0].message.tool_calls
            is_call(again.function.name, again.function.arguments)
        assert again.id != call.id and again.function == call.function
        return f"{call.function.name}({call.function.arguments})"

    @checks.check("tools in a stream")
    def _() -> Any:
        (whole,) = chat.create(messages=[USER], **given | FORCED).choices[0].message.tool_calls
        pieces = [
            piece.function.arguments
            for chunk in chat.create(messages=[USER], stream=True, **given | FORCED)
            for choice in chunk.choices
            for piece in choice.delta.tool_calls or []
        ]
        assert "".join(pieces) == whole.function.arguments and len(pieces) > 1, pieces
        with chat.stream(messages=[USER], **given | FORCED) as stream:
            kinds = {event.type for event in stream}
            (call,) = stream.get_final_completion().choices[0].message.tool_calls
        assert "tool_calls.function.arguments.delta" in kinds, kinds
        assert call.function.arguments == whole.function.arguments
        return f"{len(pieces)} pieces"

    @checks.check("agent loop")
    def _() -> Any:
        messages: list[Any] = [USER]
        for choice in ("required", "auto", "none"):  # a small model might call for ever
            fields = given | FORCED | {"tool_choice": choice}
            message = chat.create(messages=messages, **fields).choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                break
            for call in message.tool_calls:
                is_call(call.function.name, call.function.arguments)
                result = weather(**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        assert len(messages) >= 4 and message.content, messages
        return f"{len(messages)} messages"

    @checks.check("JSON output")
    def _() -> Any:
        answer = chat.create(**person | {"response_format": {"type": "json_object"}}).choices[0]
        is_object(answer.message.content, answer.finish_reason)

    @checks.check("JSON by a schema")
    def _() -> Any:
        found = chat.parse(response_format=Person, **person).choices[0].message.parsed
        assert isinstance(found, Person), found
        return repr(found)

    @checks.check("JSON by a schema in a stream")
    def _() -> Any:
        with chat.stream(response_format=Person, **person) as stream:
            deltas = [event.delta for event in stream if event.type == "content.delta"]
            message = stream.get_final_completion().choices[0].message
        assert isinstance(message.parsed, Person) and "".join(deltas) == message.content, message
        return repr(message.parsed)


def responses(checks: Checks, over: Any) -> None:
    """The Responses protocol."""
    given: Any = {"model": checks.model, "max_output_tokens": 300, "temperature": 0}

    @checks.check("response")
    def _() -> Any:
        asked = given | {"max_output_tokens": 8}
        first = over.create(instructions="Be brief.", input="Say hello.", **asked)
        assert first.output_text and first.usage.output_tokens <= 8, first
        second = over.create(previous_response_id=first.id, input="And again?", **asked)
        assert second.output_text and second.usage.input_tokens > first.usage.input_tokens
        assert over.retrieve(first.id).output_text == first.output_text
        over.delete(first.id)
        try:
            over.retrieve(first.id)
        except openai.NotFoundError:
            return "create, previous_response_id, retrieve, delete"
        raise AssertionError("still there")

    @checks.check("response in a stream")
    def _() -> Any:
        asked = given | {"max_output_tokens": 8, "input": "Say hello."}
        whole = over.create(**asked).output_text
        events = list(over.create(stream=True, **asked))
        assert (events[0].type, events[-1].response.output_text) == ("response.created", whole)
        with over.stream(**asked) as stream:
            events = list(stream)
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        # Cut by its limit it is "response.incomplete", which get_final_response() does not take.
        assert events[-1].response.output_text == "".join(deltas) == whole
        return f"{len(events)} events"

    @checks.check("response with tools")
    def _() -> Any:
        items: list[Any] = [USER]
        for choice in ("required", "auto", "none"):
            forced = {"tools": [FLAT], "tool_choice": choice, "parallel_tool_calls": False}
            with over.stream(input=items, **given | forced) as stream:
                events = list(stream)
            kind = "response.function_call_arguments.delta"
            pieces = [event.delta for event in events if event.type == kind]
            answer = events[-1].response
            calls = [item for item in answer.output if item.type == "function_call"]
            assert "".join(pieces) == "".join(call.arguments for call in calls), pieces
            if not calls:
                break
            for call in calls:
                is_call(call.name, call.arguments)
                fields = {"name": call.name, "arguments": call.arguments, "call_id": call.call_id}
                result = weather(**json.loads(call.arguments))
                items += [
                    {"type": "function_call"} | fields,
                    {"type": "function_call_output", "call_id": call.call_id, "output": result},
                ]
        assert len(items) >= 3 and answer.output_text, answer
        return f"{len(items)} items"

    @checks.check("response by a schema")
    def _() -> Any:
        found = over.parse(input=ASK_JSON, text_format=Person, **given).output_parsed
        assert isinstance(found, Person), found
        with over.stream(input=ASK_JSON, text_format=Person, **given) as stream:
            assert stream.get_final_response().output_parsed == found
        return repr(found)
