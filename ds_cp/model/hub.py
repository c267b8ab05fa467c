"""Fetch the files of a hub id that ds_cp reads: by name, and no others."""

from __future__ import annotations

from pathlib import Path

from ds_cp.errors import ModelError
from ds_cp.model.checkpoint import INDEX, WHOLE, read_index
from ds_cp.model.private_folder import (
    CONFIG,
    GENERATION,
    TEMPLATES,
    TOKENIZER_DATA,
    TOKENIZER_JSON,
)


def fetch_config(name: str) -> Path:
    """The snapshot's folder, with its config.json. Raises ``ModelError`` when it cannot be had."""
    from transformers.utils.hub import cached_file

    try:
        config = cached_file(name, CONFIG)
    except (OSError, ValueError) as err:
        raise _failure(name, err) from err
    assert config is not None  # its absence is an OSError
    return Path(config).parent


def fetch_weights(name: str) -> Path:
    """The snapshot's folder, with the config and all safetensors files of the model."""
    from transformers.utils.hub import cached_file

    optional = {"_raise_exceptions_for_missing_entries": False}
    folder = fetch_config(name)
    try:
        cached_file(name, GENERATION, **optional)
        index = cached_file(name, INDEX, **optional)
        files = [WHOLE]
        if index is not None:
            files = sorted(set(read_index(Path(index)).values()))
        for file in files:
            cached_file(name, file)
    except (OSError, ValueError) as err:
        raise _failure(name, err) from err
    return folder


def fetch_tokenizer(name: str) -> Path:
    """The snapshot's folder, with the config and the files of the tokenizer."""
    from huggingface_hub import snapshot_download

    wanted = [CONFIG, *TOKENIZER_JSON, *TOKENIZER_DATA, f"{TEMPLATES}/*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as err:  # the hub's errors have no base but OSError and ValueError
        raise _failure(name, err) from err


def _failure(name: str, err: BaseException) -> ModelError:
    lines = str(err).strip().splitlines()
    return ModelError(
        f"model {name} cannot be loaded: {lines[0][:300] if lines else type(err).__name__}"
    )
