"""How a chat is answered: which parser reads it, which special tokens it sees, and what a grammar
lets the model say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from ds_cp.api.chat.prompt import template_input
from ds_cp.api.chat.request import ChatRequest, Turn
from ds_cp.api.chat.start import AnswerPlan, plan_answer
from ds_cp.api.chat.style import ChatStyle
from ds_cp.api.errors import ApiError
from ds_cp.errors import RequestError
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.grammar.matcher import Compiler, GrammarError
from ds_cp.grammar.vocabulary import Vocabulary
from ds_cp.parsing.choose import Chosen
from ds_cp.parsing.definitions import Tool, read_choice
from ds_cp.parsing.history import EarlierCall
from ds_cp.parsing.registry import TOOL_FAMILIES
from ds_cp.sampling_params import SamplingParams
from ds_cp.templates.messages import ToolShape
from tests.unit.parsing.answers import SCHEMAS, read

TOOLS = [Tool(name, "", schema) for name, schema in SCHEMAS.items()]
KNOWS, PLAIN = ToolShape(True, True), ToolShape()
END = 0
SPECIAL = {
    name: number
    for number, name in enumerate(
        "<|start|> <|channel|> <|message|> <|constrain|> <|end|> <|call|> <|return|> [TOOL_CALLS] "
        "[THINK] [/THINK] <|tool_call> <tool_call|>".split(),
        1,
    )
}
_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
_FIRST = len(SPECIAL) + 1  # the token of byte 0


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    """A vocabulary of an end token, the special tokens, and all bytes."""
    names = [b"<eos>", *(name.encode() for name in SPECIAL)]
    texts = [*names, *(bytes([byte]) for byte in range(256))]
    return Compiler(Vocabulary.of(texts, range(_FIRST)))


def style(tool: str | None, reasoning: str | None = None, **rest: Any) -> ChatStyle:
    return ChatStyle(Chosen(tool, reasoning, True), SPECIAL, frozenset(), **rest)


def chat(choice: Any = None, tools: Any = TOOLS, wish: Any = None, **rest: Any) -> ChatRequest:
    params = SamplingParams(structured_outputs=wish and StructuredOutputsParams(**wish))
    turns = [Turn(role="user", content="hi")]
    single = rest.pop("parallel", None)
    return ChatRequest(
        turns=turns, params=params, tools=tools, choice=read_choice(choice, tools, single), **rest
    )


def fine(compiler: Compiler, plan: AnswerPlan, text: str) -> bool:
    """Whether the grammar of the plan admits the text as a whole answer."""
    wish = plan.params.structured_outputs
    assert wish is not None
    matcher = compiler.compile(wish.source)
    ends = frozenset({END, SPECIAL["<|call|>"], SPECIAL["<|return|>"]})
    for part in _SPLIT.split(text):
        ids = [SPECIAL[part]] if part in SPECIAL else [_FIRST + byte for byte in part.encode()]
        for token in ids:
            try:
                mask = matcher.allowed(ends)
            except GrammarError:
                return False
            if token // 8 >= len(mask) or not mask[token // 8] >> token % 8 & 1:
                return False
            matcher.advance([token], ends)
    return bool(matcher.allowed(ends)[0] & 1)


def heard(plan: AnswerPlan, text: str) -> Any:
    parser = plan.parser()
    return read([*parser.feed(text), *parser.finish()])


ARGUMENTS = '{"city": "Paris", "days": 2}'
FAMILIES = [name for name, family in TOOL_FAMILIES.items() if family.format.arguments == "json"]
# Parser of reasoning, the end of the prompt, and beginnings of an answer: whether each may come.
BEFORE = [
    (None, "", {"": True, "<think>x</think>": False}),
    (
        "think",
        "<|im_start|>assistant\n",
        {"": True, "<think>\nhm\n</think>\n\n": True, "hm": False},
    ),
    ("think", "<think>\n", {"": False, "hm</think>\n\n": True}),
    ("think", "<think>\n\n</think>\n\n", {"": True, "<think>hm</think>": False}),
    ("deepseek_r1", "", {"": False, "<think>hm</think>": True, "hm</think>": True}),
    ("magistral", "", {"": True, "[THINK]hm[/THINK]": True, "hm[/THINK]": False}),
]


@pytest.mark.parametrize(("reasoning", "prompt", "begins"), BEFORE)
@pytest.mark.parametrize("tool", ["hermes", "llama3_json", "mistral", "qwen3_coder"])
def test_a_call_that_must_come_comes_behind_the_reasoning(
    compiler: Compiler, tool: str, reasoning: str | None, prompt: str, begins: dict[str, bool]
) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    plan = plan_answer(chat(named), style(tool, reasoning), KNOWS, prompt)
    wrote = tool if tool in FAMILIES else "json"
    call = TOOL_FAMILIES[wrote].format.render([("get_weather", json.loads(ARGUMENTS))])
    for begin, may in begins.items():
        assert fine(compiler, plan, begin + call) == may, (begin, call)
        if may:
            found = heard(plan, begin + call)
            assert found.calls == [("get_weather", json.loads(ARGUMENTS))]
            assert found.content == "" and ("hm" in found.reasoning) == ("hm" in begin)
    for wrong in ("text", call.replace("Paris", "Paris\n"), call.replace("2", '"2"'), call * 2):
        assert not any(fine(compiler, plan, begin + wrong) for begin in begins)


@pytest.mark.parametrize("tool", FAMILIES)
def test_each_family_that_writes_json_is_forced_in_its_own_words(
    compiler: Compiler, tool: str
) -> None:
    plan = plan_answer(chat("required"), style(tool, "harmony" if tool == "harmony" else None),
                       KNOWS, "<|start|>assistant")  # fmt: skip
    wish = plan.params.structured_outputs
    assert wish is not None and wish.asked_as == "tools" and wish.lenient
    form = TOOL_FAMILIES[tool].format
    text = form.render([("get_weather", json.loads(ARGUMENTS))])
    assert fine(compiler, plan, text)
    assert heard(plan, text).calls == [("get_weather", json.loads(ARGUMENTS))]
    assert not fine(compiler, plan, "text") and not fine(compiler, plan, "")


def test_harmony_thinks_on_its_own_channel(compiler: Compiler) -> None:
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    call = '<|channel|>commentary to=functions.get_time <|constrain|>json<|message|>{"a": 1}'
    plan = plan_answer(chat("required"), style("harmony", "harmony"), KNOWS, "<|start|>assistant")
    for text in (call, thought + call):
        assert fine(compiler, plan, text) and heard(plan, text).calls == [("get_time", {"a": 1})]
    assert heard(plan, thought + call).reasoning == "hm"
    wish = {"json": {"type": "integer"}}
    plan = plan_answer(
        chat(tools=[], wish=wish), style("harmony", "harmony"), KNOWS, "<|start|>assistant"
    )
    final = "<|channel|>final<|message|>"
    assert fine(compiler, plan, f"{final}12") and fine(compiler, plan, f"{thought}{final}12")
    assert not fine(compiler, plan, "12") and not fine(compiler, plan, f"{thought}{final}x")
    assert heard(plan, f"{thought}{final}12").content == "12"
    assert plan.params.kept_special_tokens == {
        SPECIAL[name] for name in SPECIAL if name.startswith("<|") and name.endswith("|>")
    }


@pytest.mark.parametrize(("reasoning", "prompt", "begins"), BEFORE)
def test_what_the_client_wants_begins_behind_the_reasoning(
    compiler: Compiler, reasoning: str | None, prompt: str, begins: dict[str, bool]
) -> None:
    wish = {"json": {"type": "integer"}}
    plan = plan_answer(chat(tools=[], wish=wish), style("hermes", reasoning), KNOWS, prompt)
    for begin, may in begins.items():
        assert fine(compiler, plan, f"{begin}12") == may
        assert not fine(compiler, plan, f"{begin}x")
        if may:
            assert heard(plan, f"{begin}12").content == "12"


@pytest.mark.parametrize(
    ("tool", "call"),
    [
        ("hermes", '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'),
        ("qwen3_coder", "<tool_call>\n<function=get_time>\n</function>\n</tool_call>"),
        ("json", '{"name": "get_time", "arguments": {}}'),
        ("mistral", '[TOOL_CALLS][{"name": "get_time", "arguments": {}}]'),
        ("gemma4", "<|tool_call>call:get_time{}<tool_call|>"),
    ],
)
def test_a_model_may_call_in_place_of_what_the_client_wants(
    compiler: Compiler, tool: str, call: str
) -> None:
    wish = {"json": {"type": "integer"}}
    plan = plan_answer(chat("auto", wish=wish), style(tool, "think"), KNOWS, "")
    for text in ("12", call, f"<think>hm</think>{call}", "<think>hm</think>12"):
        assert fine(compiler, plan, text), text
    assert not fine(compiler, plan, "text") and not fine(compiler, plan, f"text {call}")
    assert heard(plan, call).calls == [("get_time", {})] and heard(plan, "12").content == "12"
    plan = plan_answer(chat("none", wish=wish), style(tool, "think"), KNOWS, "")
    assert not fine(compiler, plan, call) and heard(plan, call).content


def test_a_model_is_free_unless_it_must_call() -> None:
    for choice in ("auto", "none"):
        plan = plan_answer(chat(choice), style("hermes", "think"), KNOWS, "")
        assert plan.params.structured_outputs is None
    plan = plan_answer(chat("auto", tools=[]), style("mistral", "magistral"), KNOWS, "")
    assert plan.params.kept_special_tokens == {SPECIAL["[THINK]"], SPECIAL["[/THINK]"]}
    plan = plan_answer(chat("auto"), style("mistral", None), KNOWS, "")
    assert plan.params.kept_special_tokens == {SPECIAL["[TOOL_CALLS]"]}


def test_strict_tools_are_kept_under_auto(compiler: Compiler) -> None:
    strict = [replace(tool, strict=True) for tool in TOOLS]
    plan = plan_answer(chat("auto", strict), style("hermes", "think"), KNOWS, "")
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"days": %s}}\n</tool_call>'
    assert fine(compiler, plan, "free text") and fine(compiler, plan, f"so: {call % 1}")
    assert fine(compiler, plan, f"<think>hm</think>{call % 1}")
    assert not fine(compiler, plan, f"so: {call % '[]'}")
    assert plan.params.structured_outputs and not plan.params.structured_outputs.lenient


def test_where_the_template_knows_no_tools_calls_are_plain_json(compiler: Compiler) -> None:
    plan = plan_answer(chat("required"), style("deepseek_v3"), PLAIN, "")
    assert fine(compiler, plan, '{"name": "get_time", "arguments": {}}')
    plan = plan_answer(chat("auto"), style("deepseek_v3"), PLAIN, "")
    assert heard(plan, '{"name": "get_time", "arguments": {}}').names == ["get_time"]
    plan = plan_answer(chat("auto"), style("hermes", overridden=True), PLAIN, "")
    assert not heard(plan, '{"name": "get_time", "arguments": {}}').names
    none = style(None, overridden=True)  # server.tool_parser none
    assert heard(plan_answer(chat("auto"), none, KNOWS, ""), '{"name": "get_time"}').content
    assert fine(compiler, plan_answer(chat("required"), none, KNOWS, ""),
                '{"name": "get_time", "arguments": {}}')  # fmt: skip


def test_errors_name_the_clients_field() -> None:
    deep = Tool("f", "", {"type": "object", "enum": list(range(20_000))})
    with pytest.raises(RequestError, match=r"^tools") as caught:
        plan_answer(chat("required", [deep]), style("hermes"), KNOWS, "")
    assert caught.value.param == "tools"
    grammar = {"grammar": "start: /a+/"}
    plan = plan_answer(chat(tools=[], wish=grammar), style(None, "think"), KNOWS, "")
    assert plan.params.structured_outputs == StructuredOutputsParams(grammar="start: /a+/")
    for given, prompt in ((chat(tools=[], wish=grammar), "<think>"), (chat(wish=grammar), "")):
        with pytest.raises(RequestError, match="grammar cannot") as caught:
            plan_answer(given, style("hermes", "think"), KNOWS, prompt)
        assert caught.value.param == "structured_outputs"
    older = StructuredOutputsParams(grammar="start: /a+/", asked_as="guided_grammar")
    given = chat()
    given = replace(given, params=replace(given.params, structured_outputs=older))
    with pytest.raises(RequestError, match=r"^guided_grammar: grammar cannot stand") as caught:
        plan_answer(given, style("hermes"), KNOWS, "")
    assert caught.value.param == "guided_grammar"


def test_what_a_call_excludes_is_named_with_the_field_that_asks_for_the_call() -> None:
    request = chat("required")
    request = replace(request, params=replace(request.params, ignore_eos=True))
    with pytest.raises(RequestError, match="^ignore_eos cannot be kept under tools,") as caught:
        plan_answer(request, style("hermes"), KNOWS, "")
    assert caught.value.param == "ignore_eos"


def test_an_answer_that_goes_on_is_content_at_once() -> None:
    turns = [Turn(role="user", content="hi"), Turn(role="assistant", content="It is")]
    request = replace(chat(tools=[]), turns=turns, continue_final=True)
    plan = plan_answer(request, style(None, "deepseek_r1"), KNOWS, "<|user|>hi<|assistant|>It is")
    assert heard(plan, " 12").content == " 12"
    thought = "<think>hm, 12" + "x" * 600
    opened: list[Any] = [thought, [{"type": "text", "text": thought}]]
    for content in opened:
        going_on = [turns[0], Turn(role="assistant", content=content)]
        plan = plan_answer(
            replace(request, turns=going_on), style(None, "think"), KNOWS, f"..{thought}"
        )
        found = heard(plan, "34</think>12")
        assert (found.reasoning, found.content) == ("34", "12")


@pytest.mark.parametrize("reasoning", ["think", "deepseek_r1", "magistral"])
def test_a_mark_that_the_user_wrote_opens_no_reasoning(reasoning: str) -> None:
    mark = "[THINK]" if reasoning == "magistral" else "<think>"
    asked = f"say {mark} first"
    for content in ("It is", ""):
        turns = [Turn(role="user", content=asked), Turn(role="assistant", content=content)]
        wish = {"json": {"type": "integer"}}
        request = replace(chat(tools=[], wish=wish), turns=turns, continue_final=True)
        plan = plan_answer(request, style(None, reasoning), KNOWS, f"{asked}<|bot|>{content}")
        found = heard(plan, " 12")
        assert (found.reasoning, found.content) == ("", " 12")
        constraint = plan.params.structured_outputs
        assert constraint is not None and constraint.thought is not None
        assert constraint.thought.end == ""


# -- what the template is told -------------------------------------------------------------------


def test_values_of_the_template() -> None:
    reads = frozenset({"enable_thinking", "thinking", "reasoning_effort", "lang"})
    one = ChatStyle(Chosen(None, "think", True), {}, reads, reads)

    def told(given: Any = None, effort: Any = None, **defaults: Any) -> dict[str, Any]:
        return one.template_values(defaults, given or {}, effort, "kwargs")

    assert told() == {} and told(lang="de", other=1) == {"lang": "de"}
    assert told({"lang": "fr"}, lang="de") == {"lang": "fr"}
    assert told({"lang": None}, lang="de") == {"lang": "de"}
    on = {"enable_thinking": True, "thinking": True, "reasoning_effort": "low"}
    assert told(effort="low", enable_thinking=False) == on
    assert told({"thinking": False}, "low") == on | {"thinking": False}
    assert told(effort="none")["enable_thinking"] is False
    assert told({"unknown": False, "another": None, "third": ""}) == {}
    for given, words in (({"x": 1}, "does not read 'x'; it reads enable_thinking, lang"),
                         ({"tokenize": True}, "'tokenize' is not a request's")):  # fmt: skip
        with pytest.raises(ApiError, match=words) as caught:
            told(given)
        assert (caught.value.status_code, caught.value.param) == (400, "kwargs")
    plain = ChatStyle(Chosen(None, "think", True), {}, frozenset())
    assert plain.template_values({}, {}, "high", "kwargs") == {}
    with pytest.raises(ApiError, match="always reasons") as caught:
        plain.template_values({}, {}, "none", "kwargs")
    assert caught.value.param == "reasoning_effort"
    assert ChatStyle(Chosen(None, None, True), {}, frozenset()).template_values(
        {}, {}, "none", "kwargs"
    ) == {}  # fmt: skip


CALLS = [EarlierCall("call_1", "get_time", '{"a": 1}')]
HISTORY = [
    Turn(role="user", content="when?"),
    Turn(role="assistant", content="", reasoning="hm", calls=CALLS),
    Turn(role="tool", content="now", answers="call_1"),
]


def test_history_for_templates_that_know_tools() -> None:
    request = replace(chat("auto"), turns=HISTORY)
    for shape, arguments in ((KNOWS, {"a": 1}), (ToolShape(True, True, True), '{"a": 1}')):
        found = template_input(request, style("hermes"), shape, {"x": 1})
        assert [tool["function"]["name"] for tool in found.tools] == list(SCHEMAS)
        assert found.messages[1]["reasoning_content"] == "hm"
        (call,) = found.messages[1]["tool_calls"]
        assert call["function"] == {"name": "get_time", "arguments": arguments}
        assert found.messages[2] == {
            "role": "tool", "content": "now", "tool_call_id": "call_1", "name": "get_time",
        }  # fmt: skip
    found = template_input(request, style("mistral"), KNOWS, {})
    (call,) = found.messages[1]["tool_calls"]
    assert len(call["id"]) == 9 and found.messages[2]["tool_call_id"] == call["id"]


def test_reasoning_goes_back_by_the_name_that_the_template_has() -> None:
    request = replace(chat("auto"), turns=HISTORY)
    message = template_input(request, style("harmony", "harmony"), KNOWS, {}).messages[1]
    assert message["thinking"] == "hm" and "reasoning_content" not in message
    # gpt-oss's own template fails for thoughts and a text beside a call.
    said = replace(HISTORY[1], content="I look")
    for calls, kept in ((CALLS, False), ([], True)):
        turns = [HISTORY[0], replace(said, calls=calls)]
        request = replace(chat("auto"), turns=turns)
        message = template_input(request, style("harmony", "harmony"), KNOWS, {}).messages[1]
        assert message["content"] == "I look" and ("thinking" in message) == kept


LATE = (
    Turn(role="system", content="s"),
    Turn(role="user", content="u"),
    Turn(role="system", content=[{"type": "text", "text": "l1"}, {"type": "text", "text": "l2"}]),
    Turn(role="assistant", content="a"),
    Turn(role="system", content="l3"),
    Turn(role="user", content="w"),
    Turn(role="user", content="x"),
)


def test_what_the_system_says_late_is_said_by_the_user_where_it_must_be() -> None:
    request = replace(chat(None, ()), turns=LATE)
    first = ToolShape(True, True, late_system=False)
    for asked, shape in (
        (request, first),  # chat completions: the template's own word
        (replace(request, moves_system=True), KNOWS),
    ):
        found = template_input(asked, style("hermes"), shape, {})
        assert [m["role"] for m in found.messages] == [turn.role for turn in LATE]
    for shape in (first, ToolShape(late_system=False)):
        found = template_input(replace(request, moves_system=True), style("hermes"), shape, {})
        assert [(m["role"], m["content"]) for m in found.messages] == [
            ("system", "s"),
            ("user", [{"type": "text", "text": text} for text in ("u", "l1", "l2")]),
            ("assistant", "a"),
            ("user", [{"type": "text", "text": text} for text in ("l3", "w", "x")]),
        ]


def test_history_for_templates_that_know_none() -> None:
    request = replace(chat("auto"), turns=HISTORY)
    found = template_input(request, style("json"), PLAIN, {})
    assert found.tools == () and [m["role"] for m in found.messages] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    assert all(name in found.messages[0]["content"] for name in SCHEMAS)
    assert '"get_time", "arguments": {"a": 1}' in found.messages[2]["content"]
    assert "now" in found.messages[3]["content"]
    found = template_input(request, style("json"), ToolShape(system=False), {})
    assert [m["role"] for m in found.messages] == ["user", "assistant", "user"]
    assert all(word in found.messages[0]["content"] for word in (*SCHEMAS, "when?"))
    found = template_input(request, style("json"), ToolShape(True), {})
    assert len(found.tools) == len(TOOLS) and found.messages[0]["role"] == "user"
    found = template_input(replace(chat("none"), turns=HISTORY), style("json"), PLAIN, {})
    assert found.messages[0]["role"] == "user"  # of no tools, since none may be called
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    some = chat({"type": "allowed_tools", "allowed_tools": allowed})
    found = template_input(some, style("hermes"), KNOWS, {})
    assert [tool["function"]["name"] for tool in found.tools] == ["get_time"]
