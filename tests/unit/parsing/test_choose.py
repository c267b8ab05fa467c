"""Which parsers a chat template asks for."""

from __future__ import annotations

import pytest

from ds_cp.errors import ConfigError
from ds_cp.parsing.choose import choose

LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"
WITH_TOOLS = LOOP + "{% if tools %}{{ tools | tojson }}{% endif %}"


@pytest.mark.parametrize(
    ("marks", "tokens", "tool", "reasoning"),
    [
        ("<tool_call> {\"name\": } </tool_call> <think>", [], "hermes", "think"),
        ("<tool_call><function=x><parameter=y> <think>", [], "qwen3_coder", "think"),
        ("<tool_call>{n}<arg_key>k</arg_key> <think></think>", [], "glm45", "think"),
        ("<minimax:tool_call> <think>", [], "minimax_m2", "think"),
        ("<seed:tool_call><function=a><parameter=b> <seed:think>", [], "seed_oss", "seed_oss"),
        ("<｜tool▁call▁begin｜>```json <｜Assistant｜> </think>", [], "deepseek_v3", "deepseek_r1"),
        ("<｜tool▁call▁begin｜> <｜Assistant｜></think>", [], "deepseek_v31", "deepseek_r1"),
        ("<｜DSML｜invoke <｜Assistant｜> <think> </think>", [], "deepseek_v32", "deepseek_r1"),
        ("", ["<|tool_calls_section_begin|>"], "kimi_k2", None),
        ("[TOOL_CALLS] [", [], "mistral", None),
        ("[TOOL_CALLS]{{n}}[ARGS] [THINK]", [], "mistral_args", "magistral"),
        ("<|tool_call>call: <|channel>thought", [], "gemma4", "gemma4"),
        ("<start_function_call>", [], "functiongemma", None),
        ("<|channel|>analysis<|message|>", ["<|call|>"], "harmony", "harmony"),
        ("Environment: ipython {\"name\": , \"parameters\": }", [], "llama3_json", None),
        ("<|python_tag|>", [], "llama3_json", None),
        ("", ["<|python_tag|>"], "llama3_json", None),
        ("<tool_call>", ["<|python_tag|>"], "hermes", None),
        ("Here is my thought process <|tool_call|>", [], "granite", "granite"),
        ("<TOOLCALL>", [], "nemotron", None),
        ("<｜DSML｜ invoke ", [], "deepseek_v41", None),
        ("<|START_THINKING|> <|START_ACTION|>", [], "cohere", "cohere"),
        ("<tool_calls>", [], "jamba", None),
        ("", [], "json", None),
    ],
)  # fmt: skip
def test_marks_of_a_template_name_its_family(
    marks: str, tokens: list[str], tool: str, reasoning: str | None
) -> None:
    found = choose(WITH_TOOLS + marks, tokens)
    assert (found.tool, found.reasoning, found.renders_tools) == (tool, reasoning, True)
    assert found.notes[0].startswith(f"tool calls are read as {tool}: ")


def test_a_template_that_knows_no_tools_is_said_to() -> None:
    found = choose(LOOP, ["<tool_call>", "<|python_tag|>"])  # tokens alone mean nothing
    assert (found.tool, found.reasoning, found.renders_tools) == ("json", None, False)
    assert found.notes == ("tool calls are read as json: the chat template knows no tools",)
    assert choose(None).tool is None


def test_a_name_in_the_config_overrides() -> None:
    found = choose(WITH_TOOLS + "<tool_call>", tool="mistral", reasoning="none")
    assert (found.tool, found.reasoning) == ("mistral", None)
    assert choose(WITH_TOOLS, tool="none").tool is None
    with pytest.raises(ConfigError, match="server.tool_parser: .*did you mean .hermes.?"):
        choose(WITH_TOOLS, tool="hermess")
    with pytest.raises(ConfigError, match="server.reasoning_parser: no parser is called"):
        choose(WITH_TOOLS, reasoning="x" * 10_000)
