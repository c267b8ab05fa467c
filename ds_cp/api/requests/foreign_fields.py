"""Fields of OpenAI's and vLLM's protocol that are not served: those that are harmless, and those
that would change the answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unsupported:
    """A field that would change the answer: refused by name unless its value asks for nothing.

    ``neutral``: values that ask for nothing, besides those of ``is_nothing``. ``hint``: why the
    others are refused. ``false_asks``: false is a wish here, because it is not what is done anyway.
    ``names``: served fields that mean the same; where one has the same value, this one passes.
    """

    neutral: tuple[Any, ...]
    hint: str
    false_asks: bool = False
    names: tuple[str, ...] = ()

    def accepts(self, value: object, beside: Mapping[str, Any] = {}) -> bool:
        """Whether the value changes nothing. ``beside``: the fields that were sent with it."""
        if value is False and self.false_asks:
            return False
        if is_nothing(value) or is_one_of(value, self.neutral):
            return True
        said = [beside[name] for name in self.names if name in beside]
        return is_one_of(value, [*said, *([text] for text in said if isinstance(text, str))])


def is_nothing(value: object) -> bool:
    """Whether a value is null, false, or empty: it asks for nothing whatever its field means."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def is_one_of(value: object, plain: Iterable[Any]) -> bool:
    """Whether a value is one of these; true is not 1."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in plain)


# Where they stand -> fields that do not change the answer, whatever their value: read and dropped.
HARMLESS: dict[str, frozenset[str]] = {
    "body": frozenset(
        "user store metadata service_tier safety_identifier prompt_cache_key prompt_cache_options "
        "prompt_cache_retention verbosity".split()
    ),
    "message": frozenset({"cache_control"}),
    "part": frozenset({"cache_control", "prompt_cache_breakpoint", "annotations", "citations"}),
    "stream_options": frozenset({"include_obfuscation"}),
}
# What front ends send to every server: no slips of the pen. -> values that ask for nothing; with
# another it is an unknown field like any other.
FRONT_ENDS: dict[str, tuple[Any, ...]] = {
    "mode": ("instruct",),
    "models": (),
    "do_sample": (True,),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "typical_p": (1,),
    "tfs": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "dynatemp_range": (0,),
    "smoothing_factor": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "mirostat_mode": (0,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
}

_NO_MEDIA = Unsupported((), "this server reads and writes text only")
_NO_TEMPLATE = Unsupported((), "templates come with the model; a request cannot bring one")
_NO_BEAMS = Unsupported((), "beam search is not supported")
_MAX_TOKENS = Unsupported((), "say max_tokens", names=("max_tokens", "max_completion_tokens"))
_MIN_TOKENS = Unsupported((0,), "say min_tokens", names=("min_tokens",))
_STOP = Unsupported((), "say stop", names=("stop",))
# Fields of both kinds of completion; below, of one kind.
BOTH: dict[str, Unsupported] = {
    "use_beam_search": _NO_BEAMS,
    "length_penalty": Unsupported((1,), "beam search is not supported"),
    "early_stopping": _NO_BEAMS,
    "bad_words": Unsupported((), "use logit_bias"),
    "allowed_token_ids": Unsupported((), "use logit_bias"),
    "include_stop_str_in_output": Unsupported((), "answers end before the stop string"),
    "truncate_prompt_tokens": Unsupported((), "prompts are read whole"),
    "spaces_between_special_tokens": Unsupported((True,), "it is always true", false_asks=True),
    "detokenize": Unsupported((True,), "answers are text", false_asks=True),
    # What other servers call a field that is served.
    "max_new_tokens": _MAX_TOKENS,
    "max_length": _MAX_TOKENS,
    "num_predict": _MAX_TOKENS,
    "n_predict": _MAX_TOKENS,
    "min_new_tokens": _MIN_TOKENS,
    "min_length": _MIN_TOKENS,
    "stop_sequence": _STOP,
    "stop_sequences": _STOP,
    "repeat_penalty": Unsupported((1,), "say repetition_penalty", names=("repetition_penalty",)),
}
COMPLETION_ONLY: dict[str, Unsupported] = {
    "suffix": Unsupported((), "inserting before a suffix is not supported"),
    "messages": Unsupported((), "messages go to /v1/chat/completions"),
    "max_completion_tokens": Unsupported((), "say max_tokens", names=("max_tokens",)),
    "top_logprobs": Unsupported((0,), "say logprobs"),
    "add_special_tokens": Unsupported((True,), "it is always true", false_asks=True),
}
CHAT_ONLY: dict[str, Unsupported] = {
    "functions": Unsupported((), "say tools"),
    "function_call": Unsupported(("none", "auto"), "say tool_choice"),
    "modalities": Unsupported((["text"],), "this server reads and writes text only"),
    "audio": _NO_MEDIA,
    "prediction": Unsupported((), "predicted outputs are not supported"),
    "moderation": Unsupported((), "this server does not judge what it reads and writes"),
    "web_search_options": Unsupported((), "this server makes no outbound connection"),
    "chat_template": _NO_TEMPLATE,
    "documents": _NO_TEMPLATE,
    "prompt": Unsupported((), "send messages, or use /v1/completions"),
    "best_of": Unsupported((1,), "n answers are made and all are returned; say n"),
    "echo": Unsupported((), "use /v1/completions"),
}
MESSAGE: dict[str, Unsupported] = {
    "function_call": Unsupported((), "say tool_calls"),
    "refusal": Unsupported((), "refusals cannot be sent back"),
    "annotations": Unsupported((), "annotations cannot be sent back"),
    "audio": _NO_MEDIA,
}
STREAM_OPTIONS: dict[str, Unsupported] = {}
TOKENIZE: dict[str, Unsupported] = {
    "chat_template": _NO_TEMPLATE,
    "return_token_strs": Unsupported((), "/detokenize says what token ids spell"),
}
