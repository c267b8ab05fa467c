"""How the served model writes chats: its parsers, its special tokens, what its template reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ds_cp.api.chat.request import Effort
from ds_cp.api.errors import ApiError, shown
from ds_cp.api.requests.foreign_fields import is_nothing
from ds_cp.config import Server
from ds_cp.engine.interface import EngineInterface
from ds_cp.parsing.choose import AUTO, Chosen, choose
from ds_cp.parsing.forced import PLAIN
from ds_cp.parsing.ids import OPENAI
from ds_cp.parsing.registry import REASONING_FAMILIES, TOOL_FAMILIES, markers
from ds_cp.templates.chat import Choice

EFFORT = "reasoning_effort"  # what templates that grade it call the effort of reasoning
SWITCHES = ("enable_thinking", "thinking")  # and what those do that turn it on and off
# Names of a template that no request may set: what it is given anyway, and what it calls.
_RESERVED = frozenset(
    "tools documents add_generation_prompt continue_final_message chat_template tokenize "
    "conversations messages return_assistant_tokens_mask raise_exception strftime_now range dict "
    "namespace cycler joiner lipsum tojson self caller varargs kwargs".split()
)
_SHOWN = 8  # names that an error lists


@dataclass(frozen=True)
class ChatStyle:
    """Of one model. ``special``: the ids of tokens that are in no text, by their names. ``reads``:
    names that a request may set for the chat template; ``told``: those that it does not set itself.
    """

    chosen: Chosen
    special: Mapping[str, int]
    reads: frozenset[str]
    told: frozenset[str] = frozenset()
    overridden: bool = False  # the operator named the parser of tool calls

    @property
    def ids(self) -> str:
        """How the family spells ids of calls (``parsing.ids``)."""
        return TOOL_FAMILIES[self.chosen.tool].ids if self.chosen.tool else OPENAI

    @property
    def reasoning_field(self) -> str:
        """What the template calls the reasoning of an earlier answer."""
        named = self.chosen.reasoning
        return REASONING_FAMILIES[named].field if named else "reasoning_content"

    def parser(self, offers: bool) -> str | None:
        """The name of the parser of calls. ``offers``: the template writes tools; where not, the
        prompt asks for calls as plain JSON."""
        return self.chosen.tool if offers or self.overridden else PLAIN

    def kept(self, tool: str | None, reasoning: str | None) -> dict[str, int]:
        """The special tokens that these parsers must see."""
        names = markers(tool, reasoning)
        return {name: self.special[name] for name in names if name in self.special}

    def template_values(
        self,
        defaults: Mapping[str, Any],
        given: Mapping[str, Any],
        effort: Effort | None,
        param: str,
        effort_param: str = EFFORT,
    ) -> dict[str, Any]:
        """What the template is told: the operator's ``defaults``, then what ``effort`` means to it,
        then what the request gives.

        Raises ``ApiError`` 400 for a name that the template does not read, unless its value is
        false or nothing; for one that is not the request's to set; and for effort "none" where the
        model reasons and its template cannot tell it not to.
        """
        values = {name: defaults[name] for name in defaults if name in self.reads}
        values |= self._of_effort(effort, effort_param)
        for name, value in given.items():
            if name in self.reads:
                if value is not None:
                    values[name] = value
            elif is_nothing(value):
                continue
            elif name in _RESERVED:
                raise _refused(f"{shown(name)} is not a request's to set", param)
            else:
                have = _listed(self.told)
                raise _refused(f"this model's template does not read {shown(name)}; {have}", param)
        return values

    def _of_effort(self, effort: Effort | None, param: str) -> dict[str, Any]:
        if effort is None:
            return {}
        switches = [name for name in SWITCHES if name in self.reads]
        if effort == "none" and self.chosen.reasoning and not switches and EFFORT not in self.reads:
            raise ApiError(
                400,
                f"{param}: this model always reasons, since its chat template has no switch for "
                "it; leave it out",
                param=param,
                code="invalid_value",
            )
        values: dict[str, Any] = dict.fromkeys(switches, effort != "none")
        return values | ({EFFORT: effort} if EFFORT in self.reads else {})


class ChatStyles:
    """The style of an engine's model, found once the engine has one."""

    def __init__(self, engine: EngineInterface, server: Server) -> None:
        self._engine = engine
        self._server = server
        self._known: tuple[Any, ChatStyle] | None = None  # with the template that it is of

    def now(self) -> ChatStyle:
        """The style. The engine must be ready. Raises ``ConfigError``."""
        template = self._engine.chat_template
        if self._known is None or self._known[0] is not template:
            style = style_of(self._engine.tokenizer, template.choice, self._server)
            self._known = template, style
        return self._known[1]


def style_of(tokenizer: Any, template: Choice, server: Server) -> ChatStyle:
    """The style of a model with this transformers tokenizer and chat template. Raises
    ``ConfigError`` for an unknown parser."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token): number for number, token in added.items() if token.special}
    chosen = choose(
        template.text,
        [str(token) for token in added.values()],
        tool=server.tool_parser,
        reasoning=server.reasoning_parser,
    )
    own = set(getattr(tokenizer, "special_tokens_map", {}))
    reads = frozenset(template.names()) - _RESERVED - own
    told = reads - template.own_names()
    return ChatStyle(chosen, special, reads, told, server.tool_parser != AUTO)


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"it reads {', '.join(found[:_SHOWN])}{more}" if found else "it reads no values"


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
