"""Mistral's calls: ``[TOOL_CALLS][{...}]``, and since 2025 ``[TOOL_CALLS]name[ARGS]{...}``."""

from __future__ import annotations

from ds_cp.parsing.calls import Toolbox
from ds_cp.parsing.machine import WAIT, Markers
from ds_cp.parsing.marked_json import MarkedJson

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_AFTER_NAME = Markers(ARGS, CALL_ID, "{")
_AFTER_ID = Markers(ARGS, "{")


class Mistral(MarkedJson):
    """Both forms, the newer one with or without ``[CALL_ID]...`` and ``[ARGS]``."""

    def __init__(self, tools: Toolbox) -> None:
        super().__init__(tools, CALLS)
        self._name = ""

    def _opening(self) -> bool:
        if not self._hold_space():
            return True
        if self._at_end():
            return False
        if self._text[self._pos] in "{[" or self._in_list:
            return super()._opening()
        self._header = ""
        self._state = self._in_name
        return True

    def _in_name(self) -> bool:
        marker = self._hold_header(_AFTER_NAME)
        if marker is None or marker == WAIT:
            return marker is None
        self._name, self._header = self._header.strip(), ""
        if not self._may_begin(self._name):
            return self._give_up(marker)
        self._hold(marker)
        if marker == CALL_ID:
            self._state = self._in_id
        else:
            self._announce(marker)
        return True

    def _in_id(self) -> bool:
        marker = self._hold_header(_AFTER_ID)
        if marker is None or marker == WAIT:
            return marker is None
        self._announce(marker)
        return True

    def _announce(self, marker: str) -> None:
        if marker == "{":
            self._pos -= 1
        self._begin(self._name, self._header.strip() or None)
        self._read_arguments(self._outside)

    def _after_arguments(self, marker: str | None) -> None:
        if marker is None:
            self._state = self._start
        else:
            self._marked(marker)
