"""Load weights, config and tokenizer through transformers: safetensors or GGUF, never code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ds_cp.errors import ModelError, UnsupportedModelError
from ds_cp.model.source import ModelSource
from ds_cp.model.wiring import Decoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(asked: str, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype to serve in. "auto": the model's own, but fp32 for fp16 on CPU, where fp16
    crawls."""
    if asked != "auto":
        return DTYPES[asked]
    if stored is None or (device.type == "cpu" and stored == torch.float16):
        return torch.float32
    return stored


def _where(source: ModelSource) -> tuple[str, dict[str, Any]]:
    if source.kind == "gguf":
        path = Path(source.where)
        return str(path.parent), {"gguf_file": path.name}
    return source.where, {}


def load_config(source: ModelSource) -> Any:
    """The model's transformers config. ``UnsupportedModelError`` names an unknown architecture."""
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
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model {source.where}: {config.model_type} is an encoder-decoder; ds_cp serves "
            "decoders only"
        )
    return config


def load_model(source: ModelSource, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The decoder with its language-model head, in ``dtype`` on ``device``, ready for inference.

    Safetensors of the same dtype are mapped, not copied, so ranks of one host share their pages.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    where, extra = _where(source)
    safe = source.kind != "gguf" or None
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, trust_remote_code=False, use_safetensors=safe,
                output_loading_info=True, **extra,
            )  # fmt: skip
    except SafetensorError as err:
        raise ModelError(f"model {source.where}: damaged weights: {_first_line(err)}") from err
    except (OSError, ImportError) as err:
        raise ModelError(f"model {source.where} cannot be loaded: {_first_line(err)}") from err
    except (ValueError, KeyError, RuntimeError) as err:
        raise UnsupportedModelError(
            f"model {source.where} is not a causal decoder that transformers can build: "
            f"{_first_line(err)}"
        ) from err
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers would make them up at random
        raise ModelError(
            f"model {source.where} lacks {len(missing)} of its weights, the first is {missing[0]}: "
            "fetch the model again, or check that its config.json belongs to its weights"
        )
    return model.eval().to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers would log while loading is in our own errors, or does not matter."""
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, or ``ModelError``."""
    from transformers import AutoTokenizer

    where, extra = _where(source)
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **extra)
    except (OSError, ValueError, KeyError, ImportError) as err:
        raise ModelError(
            f"model {source.where} has no usable tokenizer: {_first_line(err)}"
        ) from err


def _first_line(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return lines[0][:300] if lines else type(err).__name__
