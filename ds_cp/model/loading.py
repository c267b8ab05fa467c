"""Load weights, config and tokenizer through transformers: safetensors or GGUF, never code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ds_cp.errors import DsCpError, ModelError, UnsupportedModelError, is_out_of_memory
from ds_cp.log_stream import say
from ds_cp.model import private_folder
from ds_cp.model.checkpoint import Checkpoint, read_checkpoint, read_config, some
from ds_cp.model.consumed import (
    Loaded,
    check_consumed,
    check_finite,
    check_index,
    count_elements,
)
from ds_cp.model.data_only import data_only
from ds_cp.model.faults import model_at_fault
from ds_cp.model.gguf import check_gguf_consumed, read_gguf
from ds_cp.model.hub import fetch_config, fetch_tokenizer, fetch_weights
from ds_cp.model.source import ModelSource
from ds_cp.model.steering import without_steering
from ds_cp.model.values import check_parameters, check_sizes, check_values
from ds_cp.model.watch import describe_change, look_at
from ds_cp.model.wiring import Decoder
from ds_cp.text import shorten, show

# By the name in the config.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What every call of transformers gets: nothing is fetched, and no code of the model's is run.
OURS = {"trust_remote_code": False, "local_files_only": True}


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


@contextmanager
def _config_folder(
    source: ModelSource, stated: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A private folder to read the config from, and the keyword that names a GGUF file."""
    if source.kind == "gguf":
        with private_folder.gguf_folder(Path(source.where)) as view:
            yield view, {"gguf_file": private_folder.GGUF}
    else:
        with private_folder.config_folder(stated) as view:
            yield view, {}


def _folder(source: ModelSource, fetch: Callable[[str], Path]) -> Path:
    return Path(source.where) if source.kind == "directory" else fetch(source.where)


def load_config(source: ModelSource) -> Any:
    """The model's transformers config.

    Raises ``UnsupportedModelError``, naming the architecture, when transformers does not know it or
    it is an encoder-decoder, and ``ModelError`` when the config cannot be read or states a value
    that cannot be, which it names.
    """
    stated: Mapping[str, Any] = {}
    if source.kind != "gguf":
        stated = read_config(_folder(source, fetch_config))
        check_values(source.where, stated)
    with _config_folder(source, stated) as (view, extra):
        config = _config_of(source.where, stated, view, extra)
    check_values(source.where, config.to_dict())  # with what the class makes of it
    config.name_or_path = source.where
    if not hasattr(config.get_text_config(), "to_dict"):
        keys = [key for key in ("text_config", "decoder", "generator") if key in stated]
        raise ModelError(
            f"model {source.where}: config.json's {' and '.join(keys)} is not a part that "
            f"{config.model_type} has: correct it, or fetch the model again"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model {source.where}: {config.model_type} is an encoder-decoder; "
            "ds_cp serves decoders only (is_encoder_decoder)"
        )
    return config


def _config_of(where: str, stated: Mapping[str, Any], view: str, extra: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = stated.get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"model {where}: config.json's model_type is {show(kind)}, "
            "which this transformers does not know; choose a decoder that it knows"
        )
    with model_at_fault(where, stated, "has a config that transformers cannot use"):
        try:
            with data_only(where), _quiet():
                return AutoConfig.from_pretrained(view, **OURS, **extra)
        except (ValueError, KeyError) as err:
            first = _first_line(err, view, where).split(". ")[0][:300]
            raise UnsupportedModelError(
                f"model {where}: {first}; choose a decoder that this transformers knows"
            ) from err
        except (OSError, ImportError) as err:
            raise ModelError(
                f"model {where} cannot be read: {_first_line(err, view, where)}"
            ) from err


def load_family(source: ModelSource) -> None:
    """Import what transformers has for models like this one. Raises as ``load_config``."""
    from transformers import AutoModelForCausalLM

    mapping: Any = AutoModelForCausalLM._model_mapping  # it imports a family when it is asked
    with contextlib.suppress(KeyError):
        mapping[type(load_config(source))]


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
    checkpoint = packed = None
    if source.kind == "gguf":
        packed = read_gguf(Path(source.where))
    else:
        checkpoint = read_checkpoint(_folder(source, fetch_weights))
        check_values(source.where, checkpoint.config)
    files = _files(source, checkpoint)
    before = look_at(files)
    stored = checkpoint.tensors if checkpoint else {}
    stated = checkpoint.config if checkpoint else {}
    quantized = checkpoint is not None and _is_quantized(source.where, stated)
    check_sizes(source.where, stated, stored, quantized)
    with _weights_folder(source, checkpoint) as (view, extra):
        _check_size(source.where, stated, stored, view, extra, quantized)
        built, info = _build(source.where, stated, view, extra | {"dtype": dtype})
    if change := describe_change(before, look_at(files)):
        raise ModelError(f"model {source.where} changed while it was loaded: {change}; start again")
    built.config.name_or_path = source.where
    if checkpoint:
        check_index(built, source.where, checkpoint)
    lines = check_consumed(built, source.where, stored, Loaded.of(info), quantized)
    if packed:
        check_gguf_consumed(Path(source.where), packed, count_elements(built))
    model: Decoder = built.eval().to(device)
    check_finite(model, source.where, stored)
    lines += _steering_note(stated)
    for line in [*(checkpoint.notes if checkpoint else ()), *lines]:
        note(line)
    return model


def _files(source: ModelSource, checkpoint: Checkpoint | None) -> tuple[Path, ...]:
    if checkpoint is None:
        return (Path(source.where),)
    return tuple(checkpoint.folder / name for name in (private_folder.CONFIG, *checkpoint.files))


@contextmanager
def _weights_folder(
    source: ModelSource, checkpoint: Checkpoint | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A private folder to load the model from, and the keywords that go with it."""
    if checkpoint is None:
        with private_folder.gguf_folder(Path(source.where)) as view:
            yield view, {"gguf_file": private_folder.GGUF}
    else:
        with private_folder.checkpoint_folder(source.where, checkpoint) as view:
            yield view, {"use_safetensors": True}


def _build(where: str, stated: Mapping[str, Any], view: str, extra: dict[str, Any]) -> Any:
    """The model and what transformers reports of the load."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    unfit = "is not a causal decoder that transformers can build"
    with model_at_fault(where, stated, unfit, UnsupportedModelError):
        try:
            with data_only(where), _quiet():
                return AutoModelForCausalLM.from_pretrained(
                    view, output_loading_info=True, ignore_mismatched_sizes=True, **OURS, **extra
                )
        except SafetensorError as err:
            raise ModelError(f"model {where}: damaged weights: {_first_line(err)}") from err
        except (OSError, ImportError) as err:
            if is_out_of_memory(err):
                raise
            raise ModelError(
                f"model {where} cannot be loaded: {_first_line(err, view, where)}"
            ) from err


def _check_size(
    where: str, stated: Mapping[str, Any], stored: Mapping[str, Any], view: str,
    extra: dict[str, Any], quantized: bool,
) -> None:  # fmt: skip
    """Look at the size of the model before any memory is taken for it."""
    import transformers

    if not stored:
        return
    auto: Any = transformers.AutoModelForCausalLM  # its methods state no types
    config = _config_of(where, stated, view, {})
    unfit = "is not a causal decoder that transformers can build"
    with model_at_fault(where, stated, unfit, UnsupportedModelError), data_only(where), _quiet():
        with torch.device("meta"):
            empty = auto.from_config(config, trust_remote_code=False)
    check_parameters(where, empty, stored, quantized)


def _steering_note(stated: Mapping[str, Any]) -> list[str]:
    dropped = without_steering(stated)[1]
    if not dropped:
        return []
    return [f"how a model is loaded is not its config.json's to say: {some(dropped)} not used"]


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


def _say(line: str) -> None:
    say(f"note: {line}")


def load_tokenizer(source: ModelSource, note: Callable[[str], None] = _say) -> Any:
    """The model's transformers tokenizer. ``note`` gets a line on keys that are not used; it goes
    to stderr where no other is given.

    Raises ``ModelError`` when there is none that loads.
    """
    from transformers import AutoTokenizer

    where = source.where
    view = ""
    try:
        with _tokenizer_folder(source, note) as (view, extra), data_only(where), _quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(view, **OURS, **extra)
    except DsCpError:
        raise
    except Exception as err:  # the tokenizers package raises plain ones for a file of a newer one
        raise ModelError(
            f"model {where} has no usable tokenizer: {_first_line(err, view, where)}"
        ) from err
    tokenizer.name_or_path = where
    return tokenizer


@contextmanager
def _tokenizer_folder(
    source: ModelSource, note: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A private folder to read the tokenizer from, and the keyword that names a GGUF file."""
    if source.kind == "gguf":
        with private_folder.gguf_folder(Path(source.where)) as view:
            yield view, {"gguf_file": private_folder.GGUF}
    else:
        folder = _folder(source, fetch_tokenizer)
        with private_folder.tokenizer_folder(source.where, folder, note) as view:
            yield view, {}


def _first_line(err: BaseException, view: str = "", where: str = "") -> str:
    """One line of an error's message, without the path of the private folder ``view``."""
    text = str(err).replace(view, where) if view else str(err)
    lines = text.strip().splitlines()
    return shorten(lines[0], 300) if lines else type(err).__name__
