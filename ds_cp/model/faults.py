"""A fault of a model's files is said with the model and the key, whatever a library raises for it.

Config classes, layers and tokenizers raise plain errors for a value that cannot be. The line of
source that failed names what it read, so the keys of config.json among its words are named.
"""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ds_cp.errors import DsCpError, ModelError, UnsupportedModelError, is_out_of_memory
from ds_cp.text import shorten, show

REASON = 300  # characters of a library's message
NAMED_KEYS = 3  # keys that a message names
# What torch's layers call a value of config.json.
NAMES = {"Padding_idx": "pad_token_id", "padding_idx": "pad_token_id"}
WORD = re.compile(r"[A-Za-z_]\w*")


@contextmanager
def model_at_fault(
    where: str, config: Mapping[str, Any], doing: str, kind: type[ModelError] = ModelError
) -> Iterator[None]:
    """Within, an error that is not ours becomes a ``kind`` of one line: the model, what was
    done, the keys of ``config`` that the failing line reads, with their values, and the cause.

    Errors of ds_cp and lack of memory pass: they say more, or have a way out of their own.
    """
    try:
        yield
    except DsCpError:
        raise
    except Exception as err:
        if is_out_of_memory(err):
            raise
        values = {key: value for key, value in _flat(config)}
        keys = _keys_read(err, values)
        named = ", ".join(f"{key} = {show(values[key])}" for key in keys)
        named = f" with config.json's {named}" if named else ""
        raise kind(
            f"model {where} {doing}{named} ({reason(err)}): "
            "correct its config.json, fetch the model again, or choose a decoder "
            "that this transformers knows"
        ) from err


def decoder_at_fault(decoder: Any, doing: str) -> AbstractContextManager[None]:
    """Within, what the layers of a model of transformers raise is the model's fault, with the key;
    an ``UnsupportedModelError``."""
    where = decoder.config.name_or_path or type(decoder).__name__
    return model_at_fault(where, decoder.config.to_dict(), doing, UnsupportedModelError)


def reason(err: BaseException) -> str:
    """An error's type and message in one line."""
    text = shorten(" ".join(str(err).split()), REASON)
    return f"{type(err).__name__}: {text}" if text else type(err).__name__


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys of the config and of its parts; those of the decoder last, so that they count."""
    for value in config.values():
        if isinstance(value, dict):
            yield from value.items()
    yield from config.items()
    text = config.get("text_config")
    if isinstance(text, dict):
        yield from text.items()


def _keys_read(err: BaseException, values: Mapping[str, Any]) -> list[str]:
    """Keys among the words of the error's message, or else of the innermost line of source that
    has any."""
    frames = traceback.extract_tb(err.__traceback__)
    if said := _among(str(err), values):
        return said
    if any("rope" in frame.name for frame in frames):
        if rope := [key for key in ("rope_parameters", "rope_scaling") if key in values]:
            return rope
    for frame in reversed(frames):
        line = " ".join(
            linecache.getline(frame.filename, number)
            for number in range(
                frame.lineno or 0, (getattr(frame, "end_lineno", None) or frame.lineno or 0) + 1
            )
        )
        if read := _among(line, values):
            return read
    return []


def _among(text: str, values: Mapping[str, Any]) -> list[str]:
    words = dict.fromkeys(NAMES.get(word, word) for word in WORD.findall(text))
    return [word for word in words if word in values and "_" in word][:NAMED_KEYS]
