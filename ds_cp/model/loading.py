"""Load weights, config and tokenizer through transformers: safetensors or GGUF, never code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ds_cp.errors import ModelError, UnsupportedModelError
from ds_cp.model.checkpoint import INDEX, WHOLE, Checkpoint, read_checkpoint, read_index
from ds_cp.model.consumed import (
    Loaded,
    check_consumed,
    check_finite,
    check_index,
    count_elements,
)
from ds_cp.model.gguf import check_gguf_consumed, read_gguf
from ds_cp.model.source import ModelSource
from ds_cp.model.wiring import Decoder
from ds_cp.text import shorten

# By the name in the config.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(asked: str, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype to serve in.

    ``asked``: the config's ``dtype``. "auto" is ``stored``, the dtype that the model's config.json
    states, but fp32 for fp16 on CPU, where fp16 products run at about 1 GFLOP/s.
    """
    if asked != "auto":
        return DTYPES[asked]
    if stored is None or (device.type == "cpu" and stored == torch.float16):
        return torch.float32
    return stored


def _where(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """The path or hub id that transformers gets, and the keyword that names a GGUF file."""
    if source.kind == "gguf":
        path = Path(source.where)
        return str(path.parent), {"gguf_file": path.name}
    return source.where, {}


def load_config(source: ModelSource) -> Any:
    """The model's transformers config.

    Raises ``UnsupportedModelError``, naming the architecture, when transformers does not know it or
    it is an encoder-decoder, and ``ModelError`` when the config cannot be read.
    """
    from transformers import AutoConfig

    where, extra = _where(source)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(where, trust_remote_code=False, **extra)
    except (ValueError, KeyError) as err:
        first = " ".join(str(err).split()).split(". ")[0][:300]
        raise UnsupportedModelError(
            f"model {source.where}: {first}; choose a decoder that this transformers knows"
        ) from err
    except (OSError, ImportError) as err:
        raise ModelError(f"model {source.where} cannot be read: {_first_line(err)}") from err
    except Exception as err:  # whatever the config classes raise for a value is about that value
        reason = shorten(" ".join(str(err).split()), 300)
        raise ModelError(
            f"model {source.where}: transformers cannot use its config "
            f"({type(err).__name__}: {reason}); fetch the model again, or correct config.json"
        ) from err
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model {source.where}: {config.model_type} is an encoder-decoder; "
            "ds_cp serves decoders only"
        )
    return config


def load_model(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    note: Callable[[str], None] = lambda line: None,
) -> Decoder:
    """The decoder with its language-model head, in ``dtype`` on ``device``, ready for inference.

    Safetensors of the same dtype are mapped, not copied, so ranks of one host share their pages.
    ``note`` gets one line on each part of the checkpoint that is not used. Raises ``ModelError``
    when a tensor is missing, misshaped, not finite or has no place in the model,
    ``UnsupportedModelError`` when transformers has no causal decoder for it, and torch's own error
    when there is not enough memory.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    checkpoint = None if source.kind == "gguf" else read_checkpoint(_folder(source))
    stored = checkpoint.tensors if checkpoint else {}
    packed = read_gguf(Path(source.where)) if checkpoint is None else {}
    quantized = checkpoint is not None and _is_quantized(source.where, checkpoint.config)
    view = ""
    try:
        with _only_the_model(source, checkpoint) as (view, extra), _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                view, dtype=dtype, trust_remote_code=False, output_loading_info=True,
                use_safetensors=True if checkpoint else None, ignore_mismatched_sizes=True,
                **extra,
            )  # fmt: skip
    except SafetensorError as err:
        raise ModelError(f"model {source.where}: damaged weights: {_first_line(err)}") from err
    except (OSError, ImportError) as err:
        raise ModelError(
            f"model {source.where} cannot be loaded: {_first_line(err, view)}"
        ) from err
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as err:
        if "can't allocate memory" in str(err):  # torch's RuntimeError; the caller knows a way out
            raise
        raise UnsupportedModelError(
            f"model {source.where} is not a causal decoder that transformers can build: "
            f"{_first_line(err, view)}"
        ) from err
    built, info = loaded
    built.config.name_or_path = source.where
    if checkpoint:
        check_index(built, source.where, checkpoint)
    lines = check_consumed(built, source.where, stored, Loaded.of(info), quantized)
    if packed:
        check_gguf_consumed(Path(source.where), packed, count_elements(built))
    model: Decoder = built.eval().to(device)
    check_finite(model, source.where, stored)
    for line in [*(checkpoint.notes if checkpoint else ()), *lines]:
        note(line)
    return model


def _folder(source: ModelSource) -> Path:
    """The directory that holds the model; for a hub id, its snapshot after fetching the files."""
    if source.kind == "directory":
        return Path(source.where)
    from transformers.utils.hub import cached_file

    optional = {"_raise_exceptions_for_missing_entries": False}
    try:
        config = cached_file(source.where, "config.json")
        cached_file(source.where, "generation_config.json", **optional)
        index = cached_file(source.where, INDEX, **optional)
        files = [WHOLE]
        if index is not None:
            files = sorted(set(read_index(Path(index)).values()))
        for name in files:
            cached_file(source.where, name)
    except (OSError, ValueError) as err:
        raise ModelError(f"model {source.where} cannot be loaded: {_first_line(err)}") from err
    assert config is not None  # its absence is an OSError
    return Path(config).parent


@contextmanager
def _only_the_model(
    source: ModelSource, checkpoint: Checkpoint | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A directory of links to what was checked, with an index of what the files hold, and nothing
    else, so that this is what transformers loads: it would prefer a whole file to an index, and
    apply an adapter that lies beside."""
    with TemporaryDirectory(prefix="ds_cp-model-") as name:
        view = Path(name)
        if checkpoint is None:
            file = Path(source.where)
            (view / file.name).symlink_to(file.resolve())
            yield name, {"gguf_file": file.name}
            return
        if checkpoint.index:
            placed = {tensor: stored.file for tensor, stored in checkpoint.tensors.items()}
            text = json.dumps({"metadata": {}, "weight_map": placed})
            (view / checkpoint.index).write_text(text, encoding="utf-8")
        for part in ("config.json", "generation_config.json", *checkpoint.files):
            if (checkpoint.folder / part).is_file():
                (view / part).symlink_to((checkpoint.folder / part).resolve())
        yield name, {}


def _is_quantized(where: str, config: Mapping[str, Any]) -> bool:
    """Whether config.json names a quantization; ``ModelError`` for one that transformers would skip
    with a warning."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    quantized = False
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key) if isinstance(part, Mapping) else None
            if found is None:
                continue
            stated = found if isinstance(found, Mapping) else {}
            method = stated.get("quant_method")
            if stated.get("load_in_8bit") or stated.get("load_in_4bit"):
                method = "bitsandbytes_8bit"
            if key == "compression_config":  # an old name, which transformers does not look at
                method = "compressed-tensors by an old key"
            if not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
                raise ModelError(
                    f"model {where}: config.json's {key} names the method {shorten(str(method))}, "
                    "which this transformers does not read: "
                    "serve an unquantized copy, or one whose quantization transformers knows"
                )
            quantized = True
    return quantized


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from logging while it loads; ds_cp's errors and notes say what matters."""
    from transformers.utils import logging

    hf_logging: Any = logging  # its functions state no types
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's transformers tokenizer. Raises ``ModelError`` when there is none that loads."""
    from transformers import AutoTokenizer

    where, extra = _where(source)
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **extra)
    except Exception as err:  # the tokenizers package raises plain ones for a file of a newer one
        raise ModelError(
            f"model {source.where} has no usable tokenizer: {_first_line(err)}"
        ) from err


def _first_line(err: BaseException, view: str = "") -> str:
    """One line of an error's message, without the path of the temporary directory ``view``."""
    text = str(err).replace(view, "the model's directory") if view else str(err)
    lines = text.strip().splitlines()
    return lines[0][:300] if lines else type(err).__name__
