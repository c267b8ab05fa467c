"""Calls whose arguments are tagged one by one: Qwen3-Coder, GLM, MiniMax, Seed-OSS, DeepSeek V3.2
to V4.1. They become JSON by the schema of their tool."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from ds_cp.parsing.calls import CallsMachine, Toolbox
from ds_cp.parsing.convert import ValueText, parameter_types
from ds_cp.parsing.machine import MAX_SPACE, WAIT, Markers

MAX_KEY = 1024  # characters of a parameter's name
BETWEEN = "there is text between the arguments"
LONG_KEY = f"a parameter's name has more than {MAX_KEY} characters"


@dataclass(frozen=True)
class Style:
    """The tags of a family.

    ``sections``: what calls stand within, beginning and end; none where there is nothing.
    ``call_begin``, ``name_ends``, ``call_end``: around a call, and behind its name.
    ``key_begin``, ``key_ends``: around a parameter's name. An end may say the type of the value.
    ``value_begin``, ``value_end``: around a value; the first is empty where the key's end does it.
    ``trim``: the line breaks around a value are none of it.
    """

    sections: Mapping[str, str]
    call_begin: str
    name_ends: tuple[str, ...]
    call_end: str
    key_begin: str
    key_ends: Mapping[str, str | None]
    value_end: str
    value_begin: str = ""
    trim: bool = False


QWEN3_CODER = Style(
    {"<tool_call>": "</tool_call>"}, "<function=", (">",), "</function>",
    "<parameter=", {">": None}, "</parameter>", trim=True,
)  # fmt: skip
SEED_OSS = Style(
    {"<seed:tool_call>": "</seed:tool_call>"}, "<function=", (">",), "</function>",
    "<parameter=", {">": None}, "</parameter>",
)  # fmt: skip
MINIMAX = Style(
    {"<minimax:tool_call>": "</minimax:tool_call>"}, '<invoke name="', ('">',), "</invoke>",
    '<parameter name="', {'">': None}, "</parameter>",
)  # fmt: skip
GLM = Style(
    {}, "<tool_call>", ("\n", "<arg_key>", "</tool_call>"), "</tool_call>",
    "<arg_key>", {"</arg_key>": None}, "</arg_value>", "<arg_value>",
)  # fmt: skip


def _dsml(mark: str, *sections: str) -> Style:
    """DeepSeek's tags. ``mark``: what each begins with."""
    return Style(
        {f"<{mark}{word}>": f"</{mark}{word}>" for word in sections},
        f'<{mark}invoke name="', ('">',), f"</{mark}invoke>", f'<{mark}parameter name="',
        {'" string="true">': "string", '" string="false">': "json"}, f"</{mark}parameter>",
    )  # fmt: skip


DEEPSEEK_V32 = _dsml("｜DSML｜", "function_calls", "tool_calls")  # the second is V4's
DEEPSEEK_V41 = _dsml("｜DSML｜ ", "calls")


class Tagged(CallsMachine):
    """A state for each place between two tags."""

    def __init__(self, tools: Toolbox, style: Style) -> None:
        super().__init__(tools)
        self._style = style
        self._outside = Markers(*style.sections, style.call_begin)
        section_ends = tuple(style.sections.values())
        self._within = Markers(style.call_begin, *section_ends)
        self._name_ends = Markers(*style.name_ends)
        self._between = Markers(style.key_begin, style.call_end, *section_ends)
        self._key_ends = Markers(*style.key_ends)
        self._value_begin = Markers(*filter(None, (style.value_begin,)))
        self._value_ends = Markers(style.value_end, style.call_end, *section_ends)
        self._after_call = (style.call_begin, *style.sections, *section_ends)
        self._doubt = self._space_behind = ""  # an end of the call within a value
        self._in_section = False
        self._name = self._key = ""
        self._keys = 0  # of the call
        self._value = ValueText(frozenset(), False)

    def _start(self) -> bool:
        before, marker = self._until(self._outside)
        self._say(before)
        if marker is None:
            return False
        self._hold(marker)
        self._in_section = marker in self._style.sections
        if self._in_section:
            self._state = self._section
        else:
            self._enter()
        return True

    def _section(self) -> bool:
        """Within a section, between calls."""
        space, marker = self._expect(self._within)
        if not self._keep(space):
            return True
        if marker is None:  # text between calls
            return self._give_up()
        if marker == self._style.call_begin:
            self._hold(marker)
            self._enter()
        elif marker != WAIT:
            if self._held:  # no call was in it
                return self._give_up(marker)
            self._state = self._start
        return marker != WAIT

    def _enter(self) -> None:
        self._header = ""
        self._state = self._in_name

    def _in_name(self) -> bool:
        marker = self._hold_header(self._name_ends)
        if marker is None or marker == WAIT:
            return marker is None
        name = self._header.strip()
        if not name and marker == "\n":
            return self._hold(marker) or True
        known = self._in_section or not self._style.sections or name in self._tools.schemas
        if not self._may_begin(name) or not known:
            return self._give_up(marker)
        self._name = name
        if marker == self._style.key_begin or marker == self._style.call_end:
            self._pos -= len(marker)
        else:
            self._hold(marker)
        if self._in_section:
            self._announce()
        else:
            self._state = self._confirm
        return True

    def _confirm(self) -> bool:
        """Behind a name that nothing but a line break may have ended: a call goes on with a tag."""
        space, marker = self._expect(self._between)
        if not self._keep(space):
            return True
        if marker is None:
            return self._give_up()
        if marker != WAIT:
            self._pos -= len(marker)
            self._announce()
        return marker != WAIT

    def _announce(self) -> None:
        self._begin(self._name)
        self._keys = 0
        self._state = self._arguments

    def _arguments(self) -> bool:
        """Between arguments."""
        _, marker = self._expect(self._between)
        if marker is None:
            self._close_braces()
            self._end(BETWEEN)
            self._state = self._start
            return True
        if marker == self._style.key_begin:
            self._key = ""
            self._state = self._in_key
        elif marker != WAIT:
            self._end_call(marker)
        return marker != WAIT

    def _end_call(self, marker: str) -> None:
        """``marker``: the end of the call, or of its section."""
        self._close_braces()
        self._end()
        ends = marker in self._style.sections.values() or not self._style.sections
        self._state = self._start if ends else self._section

    def _close_braces(self) -> None:
        self._argue("}" if self._keys else "{}")

    def _in_key(self) -> bool:
        start, room = self._pos, MAX_KEY - len(self._key)
        before, marker = self._until(self._key_ends)
        self._key += before[:room]
        if len(before) > room:
            self._pos = start + room
            self._close_braces()
            self._end(LONG_KEY)
            self._say(self._key)
            self._state = self._start
            return True
        if marker is None:
            return False
        self._begin_value(self._style.key_ends[marker])
        self._state = self._before_value if self._style.value_begin else self._in_value
        return True

    def _begin_value(self, stated: str | None) -> None:
        key = self._key.strip()
        schema = self._tools.schemas.get(self._name)
        types = frozenset({"string"}) if stated == "string" else parameter_types(schema, key)
        if stated == "json":
            types -= {"string"}
        self._value = ValueText(types, self._style.trim)
        self._key = ("{" if not self._keys else ", ") + json.dumps(key, ensure_ascii=False) + ": "
        self._keys += 1

    def _before_value(self) -> bool:
        _, marker = self._expect(self._value_begin)
        if marker is None:
            self._argue(self._key + "null}")
            self._end(BETWEEN)
            self._state = self._start
        elif marker != WAIT:
            self._state = self._in_value
        return marker != WAIT

    def _in_value(self) -> bool:
        before, marker = self._until(self._value_ends)
        self._argue_value(self._value.push(before))
        if marker == self._style.value_end:
            self._argue_value(self._value.end())
            self._state = self._arguments
        elif marker is not None:
            self._doubt, self._space_behind = marker, ""
            self._state = self._in_doubt
        return marker is not None

    def _in_doubt(self) -> bool:
        """Behind an end of the call, where the value has not ended. Models forget the value's end:
        it ends here too, if what follows can follow a call. Else the end is text of the value, such
        as of a file about calls."""
        self._space_behind += self._space(MAX_SPACE - len(self._space_behind))
        if self._at_end() and not self._final:
            return False
        follows = self._ahead(self._after_call)
        if follows == WAIT:
            return False
        if follows is None and not self._at_end():
            self._argue_value(self._value.push(self._doubt + self._space_behind))
            self._state = self._in_value
            return True
        self._argue_value(self._value.end())
        self._end_call(self._doubt)
        return True

    def _argue_value(self, text: str) -> None:
        if text:
            self._argue(self._key + text)
            self._key = ""
