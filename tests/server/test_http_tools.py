"""Tools and reasoning in /v1/chat/completions, with the openai client, over an engine that says
what a model would."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers import chat_templates as templates
from tests.helpers.speaking import Speaking
from tests.server.conftest import Running, error_of

CHAT = "/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "what is the weather?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "time", "description": "now"}},
]
THOUGHT = "<think>\nLet me see.\n</think>\n\n"
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
TWO = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
BOTH = [("weather", {"city": "Oslo", "days": 2}), ("time", {})]
Launch = Callable[..., Running]


@pytest.fixture
def speaking(launch: Launch) -> Iterator[Callable[..., Running]]:
    """``speaking(text, ..)`` serves a model that says the texts."""

    def start(
        *says: str, template: str = templates.HERMES, special: Any = (), **settings: Any
    ) -> Any:
        return launch(Speaking(template, special, *says), **settings)

    yield start


def ask(server: Running, stream: bool = False, **fields: Any) -> list[Any]:
    """The messages of an answer, and from a stream the same, put together; each with its finish."""
    given: dict[str, Any] = {"model": "fake-model", "messages": HELLO, "tools": TOOLS} | fields
    extra = {name: given.pop(name) for name in list(given) if name in _EXTRA}
    create = server.client().chat.completions.create
    if not stream:
        reply = create(**given, extra_body=extra)
        return [(choice.message, choice.finish_reason) for choice in reply.choices]
    found: dict[int, dict[str, Any]] = {}
    for chunk in create(**given, extra_body=extra, stream=True):
        for choice in chunk.choices:
            one = found.setdefault(choice.index, {"content": "", "reasoning": "", "calls": []})
            assert "finish" not in one, "a chunk after the finish"
            delta = choice.delta
            one["content"] += delta.content or ""
            one["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or []:
                if call.id:
                    assert call.index == len(one["calls"]) and call.type == "function"
                    one["calls"].append({"id": call.id, "name": call.function.name, "text": ""})
                one["calls"][call.index]["text"] += call.function.arguments
            if choice.finish_reason:
                one["finish"] = choice.finish_reason
    return [found[index] for index in sorted(found)]


_EXTRA = (
    "chat_template_kwargs", "include_reasoning", "return_token_ids", "continue_final_message",
    "add_generation_prompt", "ignore_eos", "guided_regex",
)  # fmt: skip


def test_what_answers_hold_is_counted(speaking: Any) -> None:
    cut, wrong = ONE[: ONE.index("Oslo")], ONE.replace('{"city"', '{"city" "Oslo"')
    server = speaking(THOUGHT + ONE + TWO, wrong, cut, "no call")
    tokens = 0
    for stream in (False, True):
        ask(server, stream, n=4)
        tokens += thought(server, n=4)
    found = counted(server)
    times = 2 + 2  # both ways, and once more for their tokens of reasoning
    assert found["tool_calls_total complete"] == 2 * times
    assert found["tool_calls_total not_json"] == found["tool_calls_total unfinished"] == times
    assert found["reasoning_tokens_total"] == 2 * tokens > 0
    assert found["parser_failures_total"] == found["grammar_answers_total length"] == 0
    ask(server, tool_choice="required", max_tokens=3)
    found = counted(server)
    assert found["grammar_answers_total length"] == 1 and found["grammar_answers_total stop"] == 0


def counted(server: Running) -> dict[str, float]:
    """The counters of what answers hold, by name and outcome."""
    names = ("tool_calls", "reasoning_tokens", "grammar_answers", "parser_failures")
    return {
        f"{sample.name.removeprefix('ds_cp:')} {sample.labels.get('outcome', '')}".strip():
        sample.value
        for family in text_string_to_metric_families(server.get("/metrics").text)
        if family.name in [f"ds_cp:{name}" for name in names]
        for sample in family.samples
    }  # fmt: skip


def thought(server: Running, **fields: Any) -> int:
    """Tokens of reasoning that an answer says it has."""
    body = {"messages": HELLO, "tools": TOOLS, **fields}
    usage = server.post(CHAT, body).json()["usage"]
    return int(usage["completion_tokens_details"]["reasoning_tokens"])


def calls_of(answer: Any) -> list[tuple[str, Any]]:
    """Names and arguments of an answer's calls."""
    if isinstance(answer, dict):
        return [(call["name"], json.loads(call["text"])) for call in answer["calls"]]
    message, _ = answer
    assert all(call.type == "function" and call.id for call in message.tool_calls)
    return [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_beside_content_and_reasoning(speaking: Any, stream: bool) -> None:
    server = speaking(f"{THOUGHT}I will look.\n{ONE}\n{TWO}")
    (answer,) = ask(server, stream)
    assert calls_of(answer) == BOTH
    if stream:
        assert (answer["content"], answer["reasoning"]) == ("I will look.", "Let me see.")
        assert answer["finish"] == "tool_calls"
        assert len({call["id"] for call in answer["calls"]}) == 2
    else:
        message, finish = answer
        assert (message.content, message.reasoning_content) == ("I will look.", "Let me see.")
        assert finish == "tool_calls"
    prompt, params = server.engine.prompt(), server.engine.seen[0][1]
    assert '{"type": "function", "function": {"name": "weather", "parameters"' in prompt
    assert params.structured_outputs is None and not params.kept_special_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_each_of_n_answers_is_its_own(speaking: Any, stream: bool) -> None:
    server = speaking(ONE, "no call <tool", f"{THOUGHT}text", f"{TWO}{ONE}")
    found = ask(server, stream, n=4, logprobs=True)
    if stream:
        assert [calls_of(one) for one in found] == [BOTH[:1], [], [], BOTH[::-1]]
        assert [one["content"] for one in found] == ["", "no call <tool", "text", ""]
        assert [one["finish"] for one in found] == ["tool_calls", "stop", "stop", "tool_calls"]
        return
    assert [one[0].content for one in found] == [None, "no call <tool", "text", None]
    assert [one[0].tool_calls is None for one in found] == [False, True, True, False]
    assert [one[1] for one in found] == ["tool_calls", "stop", "stop", "tool_calls"]


def test_logprobs_and_ids_are_of_all_tokens_whatever_becomes_of_them(speaking: Any) -> None:
    server = speaking(f"{THOUGHT}So.\n{ONE}")
    ids = [*server.engine.ids_of(f"{THOUGHT}So.\n{ONE}"), 0]
    body = {"messages": HELLO, "tools": TOOLS, "logprobs": True, "return_token_ids": True}
    whole = server.post(CHAT, body).json()
    choice = whole["choices"][0]
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert choice["token_ids"] == ids and len(tokens) == len(ids)
    assert whole["prompt_token_ids"] == server.engine.seen[0][0]
    text = server.post(CHAT, body | {"stream": True}).text
    chunks = [json.loads(e[6:]) for e in text.split("\n\n") if e.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [i for one in choices for i in one.get("token_ids", [])] == ids
    streamed = [
        e["token"] for one in choices if one["logprobs"] for e in one["logprobs"]["content"]
    ]
    assert streamed == tokens
    assert [chunk.get("prompt_token_ids") for chunk in chunks[:2]] == [
        whole["prompt_token_ids"],
        None,
    ]


def test_reasoning_is_counted_and_may_be_left_out(speaking: Any) -> None:
    server = speaking(f"{THOUGHT}So.")
    thought = len(server.engine.ids_of(THOUGHT.strip()))
    body: dict[str, Any] = {"messages": HELLO}
    reply = server.post(CHAT, body).json()
    usage = reply["usage"]
    assert usage["completion_tokens"] == len(server.engine.ids_of(f"{THOUGHT}So.")) + 1
    assert abs(usage["completion_tokens_details"]["reasoning_tokens"] - thought) <= 1
    assert reply["choices"][0]["message"]["reasoning_content"] == "Let me see."
    stream = body | {"stream": True, "stream_options": {"include_usage": True}}
    last = server.post(CHAT, stream).text.split("\n\n")[-3]
    assert json.loads(last[6:])["usage"] == usage
    reply = server.post(CHAT, body | {"include_reasoning": False}).json()
    assert "reasoning_content" not in reply["choices"][0]["message"]
    assert "Let me" not in server.post(CHAT, stream | {"include_reasoning": False}).text
    begun = len(server.engine.ids_of("<think>\nLet"))
    reply = server.post(CHAT, body | {"max_tokens": begun}).json()["choices"][0]
    assert reply["finish_reason"] == "length" and reply["message"]["content"] == ""
    assert reply["message"]["reasoning_content"] == "Let"


def test_a_history_with_calls_reaches_the_template(speaking: Any) -> None:
    server = speaking("It rains.")
    (message, _), *_ = ask(speaking(f"{THOUGHT}{ONE}"))
    asked = message.model_dump(exclude_none=True)
    assert set(asked) >= {"role", "tool_calls", "reasoning_content"}
    result = {"role": "tool", "tool_call_id": asked["tool_calls"][0]["id"], "content": "rain"}
    for replay in (asked, asked | {"reasoning": asked["reasoning_content"]}):
        ((message, finish),) = ask(server, messages=[*HELLO, replay, result])
        assert (message.content, finish, message.tool_calls) == ("It rains.", "stop", None)
    prompt = server.engine.prompt()
    assert '"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>' in prompt
    assert "<tool_response>\nrain\n</tool_response>" in prompt and "Let me see." in prompt


def test_a_template_that_knows_no_tools_is_told_in_words(speaking: Any) -> None:
    server = speaking('{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}',
                      template=templates.CHATML)  # fmt: skip
    (answer,) = ask(server)
    assert calls_of(answer) == BOTH[:1] and answer[1] == "tool_calls"
    assert '"name": "weather"' in server.engine.prompt() and "call" in server.engine.prompt()
    call = answer[0].tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    server.engine.says = ["It rains."]
    ask(server, messages=[*HELLO, answer[0].model_dump(exclude_none=True), result])
    assert "Result of the tool weather:\nrain" in server.engine.prompt()


def test_a_template_gets_calls_as_it_wants_them(speaking: Any) -> None:
    server = speaking("hm</think>ok", template=templates.NULL_CONTENT)
    call = {"id": "c", "type": "function", "function": {"name": "time", "arguments": '{"a":1}'}}
    history = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "c", "content": "noon"}]  # fmt: skip
    ((message, _),) = ask(server, messages=history)
    assert '<call>time {"a":1}<result>noon' in server.engine.prompt()
    assert (message.content, message.reasoning_content) == ("ok", "hm")


@pytest.mark.parametrize("stream", [False, True])
def test_harmony_with_special_tokens(speaking: Any, stream: bool) -> None:
    says = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.time <|constrain|>json<|message|>{"a": 1}'
    )
    server = speaking(says, template=templates.HARMONY, special=templates.HARMONY_TOKENS)
    (answer,) = ask(server, stream, reasoning_effort="low")
    assert calls_of(answer) == [("time", {"a": 1})]
    if stream:
        assert (answer["reasoning"], answer["content"]) == ("hm", "")
    assert "Reasoning: low" in server.engine.prompt()
    ids = server.engine.tokenizer.convert_tokens_to_ids(["<|start|>", "<|call|>", "<|end|>"])
    assert set(ids) <= server.engine.seen[0][1].kept_special_tokens
    server.engine.says = ["<|channel|>final<|message|>done <|constrain|>x<|system|>y"]
    (answer,) = ask(server, stream, tools=[])
    content = answer["content"] if stream else answer[0].content
    assert "<|" not in content and content.startswith("done")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "time"}}])
def test_a_call_that_must_come_is_enforced(speaking: Any, choice: Any) -> None:
    server = speaking(f"{THOUGHT}{TWO}")
    (answer,) = ask(server, tool_choice=choice)
    assert calls_of(answer) == BOTH[1:] and answer[0].reasoning_content == "Let me see."
    wish = server.engine.seen[0][1].structured_outputs
    assert wish.structural_tag["at_least"] == 1 and wish.thought.end == "</think>"
    names = [one["begin"] for one in wish.structural_tag["structures"]]
    assert len(names) == (2 if choice == "required" else 1) and "time" in names[-1]
    # A format is of the text of an answer, and this one has none; a guide is of all of it.
    (answer,) = ask(server, tool_choice=choice, response_format={"type": "json_object"})
    assert calls_of(answer) == BOTH[1:]
    assert server.engine.seen[-1][1].structured_outputs == wish
    with pytest.raises(openai.BadRequestError, match="guided_regex what it is; send one"):
        ask(server, tool_choice=choice, guided_regex="a")
    (answer,) = ask(server, tool_choice="none")
    assert answer[0].tool_calls is None and TWO in answer[0].content
    assert "weather?" in server.engine.prompt() and '"weather"' not in server.engine.prompt()
    ask(server, tool_choice="auto", response_format={"type": "json_object"})
    assert server.engine.seen[-1][1].structured_outputs.or_begins == ("<tool_call>",)


def test_the_config_names_parsers_and_values(speaking: Any) -> None:
    says = f"{THOUGHT}{ONE}"
    server = speaking(says, tool_parser="none", reasoning_parser="none")
    (answer,) = ask(server)
    assert answer[0].tool_calls is None and answer[0].content == says
    server = speaking("text", chat_template_kwargs={"enable_thinking": False, "unread": 1})
    for given, off in (({}, True), ({"chat_template_kwargs": {"enable_thinking": True}}, False),
                       ({"reasoning_effort": "high"}, False),
                       ({"reasoning_effort": "none"}, True)):  # fmt: skip
        ask(server, **given)
        assert server.engine.prompt().endswith("<think>\n\n</think>\n\n") == off, given
    for name, words in (("enable_thinkin", "does not read"), ("tools", "is not a request's")):
        reply = server.post(CHAT, {"messages": HELLO, "chat_template_kwargs": {name: True}})
        error = error_of(reply, 400)
        assert words in error["message"] and error["param"] == "chat_template_kwargs"


def test_an_answer_can_go_on(speaking: Any) -> None:
    server = speaking(" 12 and more")
    begun = [*HELLO, {"role": "assistant", "content": "It is"}]
    ((message, _),) = ask(server, messages=begun, continue_final_message=True, tools=[])
    assert message.content == " 12 and more"
    assert server.engine.prompt().endswith("assistant\nIt is")
    ask(server, add_generation_prompt=False, tools=[])
    assert server.engine.prompt().endswith("what is the weather?<|im_end|>\n")
    counted = server.post("/tokenize", {"messages": begun, "continue_final_message": True,
                                        "tools": TOOLS}).json()  # fmt: skip
    text = server.post("/detokenize", {"tokens": counted["tokens"]}).json()["prompt"]
    assert text.endswith("assistant\nIt is") and '"weather"' in text


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_call_is_text(speaking: Any, stream: bool) -> None:
    """However an answer goes wrong, its text comes and its stream ends well."""
    server = speaking("")
    for says in (
        "<tool_call>no json</tool_call>", '<tool_call>{"name": ', "</tool_call>", "<think>",
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"a": \n', "<tool_call>" * 40, "{}", "[[[",
    ):  # fmt: skip
        server.engine.says = [says]
        (answer,) = ask(server, stream)
        if stream:
            text = answer["content"] + answer["reasoning"]
            text += "".join(call["text"] for call in answer["calls"])
            finish = answer["finish"]
        else:
            message, finish = answer
            calls = message.tool_calls or []
            text = (message.content or "") + "".join(c.function.arguments for c in calls)
        assert finish in ("stop", "tool_calls"), says
        words = says.replace("<think>", "").replace("<tool_call>", "").split("arguments")[-1]
        assert finish == "tool_calls" or words.split("<")[0] in text, says


def test_token_ids_of_completions(launch: Launch) -> None:
    server = launch()
    body = {"prompt": [[5, 6], [7]], "max_tokens": 3, "return_token_ids": True, "n": 2}
    whole = server.post("/v1/completions", body).json()["choices"]
    assert [one["prompt_token_ids"] for one in whole] == [[5, 6], [5, 6], [7], [7]]
    assert all(len(one["token_ids"]) == 3 for one in whole)
    text = server.post("/v1/completions", body | {"stream": True}).text
    chunks = [json.loads(e[6:])["choices"] for e in text.split("\n\n") if e.startswith("data: {")]
    for index in range(4):
        mine = [one for (one,) in chunks if one["index"] == index]
        ids = [i for one in mine for i in one["token_ids"]]
        assert ids == whole[index]["token_ids"]
    told = [one["prompt_token_ids"] for (one,) in chunks if "prompt_token_ids" in one]
    assert told == [[5, 6], [7]]
