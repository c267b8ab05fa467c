"""The tokens that end an answer: what generation_config, config and tokenizer name, together.

They often differ: a chat model's fine-tune keeps the base model's generation_config, while its
template ends a turn with the tokenizer's end token. Any of them ends an answer. No torch here.
"""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_cp.model.wiring import Decoder


def model_end_tokens(model: Decoder) -> tuple[int, ...]:
    """The ids that the model's generation_config and config name, ascending.

    A config class has an end token of its own (2 for Llama), which stands in where config.json
    names none. It does not count when generation_config names others: 2 may be any token there.
    """
    generation = token_ids(getattr(model, "generation_config", None))
    found = set(generation)
    stated = _stated(model.config.name_or_path) if generation else None
    for config in (model.config, model.config.get_text_config()):
        stand_in = set() if stated is None else set(token_ids(_defaults(config))) - stated
        found.update(set(token_ids(config)) - stand_in)
    return tuple(sorted(found))


def describe_tokenizer(tokenizer: Any | None) -> tuple[tuple[int, ...], int | None]:
    """The end tokens that a tokenizer names, and its number of tokens where it states one."""
    return token_ids(tokenizer), len(tokenizer) if isinstance(tokenizer, Sized) else None


def token_ids(owner: Any) -> tuple[int, ...]:
    """``owner.eos_token_id`` of a config or tokenizer: none, one id or a list of ids."""
    return _ids(getattr(owner, "eos_token_id", None))


def _ids(named: Any) -> tuple[int, ...]:
    listed = named if isinstance(named, list | tuple) else [named]
    return tuple(i for i in listed if isinstance(i, int) and not isinstance(i, bool))


def _defaults(config: Any) -> Any:
    try:
        return type(config)()
    except (TypeError, ValueError):  # a class without defaults names no end token by itself
        return None


def _stated(where: str | None) -> set[int] | None:
    """The end tokens in the config.json that a model came from; ``None`` when there is none to
    read, as for a model made in memory or from a GGUF file."""
    from transformers import PreTrainedConfig

    if not where or Path(where).is_file():  # a file of gigabytes would be read as if it were JSON
        return None
    try:
        found, _ = PreTrainedConfig.get_config_dict(where, local_files_only=True)
    except (OSError, ValueError):
        return None
    parts = [found, *(part for part in found.values() if isinstance(part, dict))]
    return {i for part in parts for i in _ids(part.get("eos_token_id"))}
