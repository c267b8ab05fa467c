"""The start-up lines say what is odd about a model's chat templates; completions are served all
the same."""

from __future__ import annotations

from typing import Any

import pytest

from ds_cp.serve import async_engine
from tests.helpers.chat_templates import CHATML, PARTS
from tests.helpers.fake_engine import template_processes
from tests.unit.serve.test_end_tokens import answer, tokenizer


@pytest.mark.parametrize(
    ("templates", "line"),
    [
        (CHATML, None),
        ({"default": CHATML, "tool_use": "x"}, "of the model's chat templates (default, tool_use)"),
        ({"tool_use": "x"}, "chat is not available: this model has chat templates (tool_use)"),
        ("{% if %}", "chat is not available: the model's chat template ('default') does not comp"),
        (PARTS, "the model's chat template ('default') reads content as parts"),
    ],
)
def test_the_start_says_what_is_odd(
    templates: Any, line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shared:  # whose start takes half a second
        run = staticmethod(template_processes().run)

        def close(self) -> None:
            pass

    if line is not None:  # the first case starts and ends its own
        monkeypatch.setattr(async_engine, "TemplateProcesses", Shared)
    served = tokenizer(50, "t9")
    served.chat_template = templates
    tokens, reason, lines = answer(served)
    assert (tokens, reason) == ([7] * 5, "length")
    odd = [] if line is None else [line]
    if "not available" not in (line or ""):
        odd.append("tool calls are read as json: the chat template knows no tools")
    assert [said[: len(wanted)] for said, wanted in zip(lines, odd, strict=True)] == odd
