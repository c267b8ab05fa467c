"""A folder of our own that holds a model as it was checked, and nothing else: that is what
transformers gets, so that what is loaded is what was checked.

transformers would prefer a whole file to an index, apply an adapter or read a pickle that lies
beside, and follow what config.json says about how to load. Weights and vocabularies are links under
names of ours; JSON files are copies without the keys that steer (``steering``).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_cp.errors import ModelError
from ds_cp.model.checkpoint import INDEX, WHOLE, Checkpoint, read_object, some
from ds_cp.model.steering import end_tokens_only, without_files, without_steering
from ds_cp.text import shorten

CONFIG = "config.json"
GENERATION = "generation_config.json"
GGUF = "model.gguf"
# Files of a tokenizer. Those of the second list are copied, not linked.
TOKENIZER_DATA = (
    "added_tokens.json", "bpe.codes", "byte_maps.json", "chat_template.jinja", "dict.txt",
    "emoji.json", "entity_vocab.json", "merges.txt", "normalizer.json", "prophetnet.tokenizer",
    "sentencepiece.bpe.model", "sentencepiece.model", "spiece.model", "spm.model", "spm_char.model",
    "source.spm", "target.spm", "target_vocab.json", "tekken.json", "tiktoken.model",
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v2",
    "tokenizer.model.v3", "vocab-src.json", "vocab-tgt.json", "vocab.json", "vocab.txt",
    "word_pronunciation.json", "word_shape.json",
)  # fmt: skip
TOKENIZER_JSON = ("special_tokens_map.json", "tokenizer_config.json")
TEMPLATES = "additional_chat_templates"
VERSIONED = re.compile(r"tokenizer\..*\.json")  # the same, for some versions of transformers


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that decide how text becomes token ids, whether they are there or not."""
    names = sorted({*TOKENIZER_JSON, *TOKENIZER_DATA})
    return [*(folder / name for name in names), *sorted((folder / TEMPLATES).glob("*.jinja"))]


@contextmanager
def own_folder(fill: Callable[[Path], None] = lambda folder: None) -> Iterator[str]:
    """A new folder that nobody else reads, filled by ``fill``; it is gone afterwards, and at the
    latest when this process ends by itself. ``ModelError`` where none can be made or written."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="ds_cp-model-", ignore_cleanup_errors=True)
    except OSError as err:
        raise _unwritable(err) from err
    with folder as name:
        try:
            fill(Path(name))
        except OSError as err:
            raise _unwritable(err) from err
        yield name


def _unwritable(err: OSError) -> ModelError:
    where = f" {tempfile.tempdir}" if tempfile.tempdir else ""
    return ModelError(
        f"the folder{where} for temporary files cannot be written ({err.strerror or err}): "
        "a model is loaded through a small folder of links; "
        "make room there, or set TMPDIR to a folder that can be written"
    )


@contextmanager
def config_folder(config: Mapping[str, Any]) -> Iterator[str]:
    """A folder with a config.json alone, ``config`` without what steers."""
    with own_folder(lambda view: _write(view / CONFIG, without_steering(config)[0])) as name:
        yield name


@contextmanager
def gguf_folder(file: Path) -> Iterator[str]:
    """A folder with the GGUF file alone, under the name ``GGUF``."""
    with own_folder(lambda view: (view / GGUF).symlink_to(file.resolve())) as name:
        yield name


@contextmanager
def checkpoint_folder(where: str, checkpoint: Checkpoint) -> Iterator[str]:
    """A folder with the config, the weights and an index of what the files hold."""

    def fill(view: Path) -> None:
        folder = checkpoint.folder
        _write(view / CONFIG, without_steering(checkpoint.config)[0])
        if (folder / GENERATION).is_file():
            found = read_object(folder, GENERATION)
            _write(view / GENERATION, end_tokens_only(where, found))
        if checkpoint.index:
            placed = {tensor: stored.file for tensor, stored in checkpoint.tensors.items()}
            _write(view / INDEX, {"metadata": {}, "weight_map": placed})
        for file in checkpoint.files:
            ours = file if checkpoint.index else WHOLE
            (view / ours).symlink_to((folder / file).resolve())

    with own_folder(fill) as name:
        yield name


@contextmanager
def tokenizer_folder(
    where: str, folder: Path, note: Callable[[str], None] = lambda line: None
) -> Iterator[str]:
    """A folder with the config and the tokenizer's files. ``note`` gets a line on each file with
    keys that are left out.

    Raises ``ModelError`` when a JSON file cannot be read, or names a tokenizer that is code of the
    model's own or in a file of another name.
    """

    def fill(view: Path) -> None:
        if (folder / CONFIG).is_file():
            config = read_object(folder, CONFIG)
            _check_class(where, CONFIG, config)
            _write(view / CONFIG, without_steering(config)[0])
        for file in TOKENIZER_JSON:
            if (folder / file).is_file():
                found = read_object(folder, file)
                if file == "tokenizer_config.json":
                    _check_class(where, file, found)
                    _check_versions(where, file, found)
                kept, dropped = without_files(found)
                _write(view / file, kept)
                if dropped:
                    note(f"{file} names no code or files to load: {some(dropped)} not used")
        (view / TEMPLATES).mkdir()
        for data in tokenizer_files(folder):
            if data.name not in TOKENIZER_JSON and data.is_file():
                (view / data.relative_to(folder)).symlink_to(data.resolve())

    with own_folder(fill) as name:
        yield name


def _check_versions(where: str, file: str, found: dict[str, Any]) -> None:
    """transformers would read such a file rather than tokenizer.json: other tokens, unsaid."""
    named = found.get("fast_tokenizer_files")
    others = [n for n in named if VERSIONED.search(str(n))] if isinstance(named, list) else []
    if others:
        raise ModelError(
            f"model {where}: {file}'s fast_tokenizer_files names {some(map(str, others))}; ds_cp "
            "reads tokenizer.json alone: put the right file there and remove the key"
        )


def _check_class(where: str, file: str, found: dict[str, Any]) -> None:
    """A name that transformers knows must be a tokenizer's: it would load whatever it names."""
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    named = found.get("tokenizer_class")
    if named is not None and not isinstance(named, str):
        raise ModelError(
            f"model {where} has no usable tokenizer: {file}'s tokenizer_class is "
            f"{shorten(repr(named))}, not a name; fetch the model again"
        )
    known = None
    for name in dict.fromkeys((named, (named or "").removesuffix("Fast"))):
        known = known or (tokenizer_class_from_name(name) if name else None)
    if known is not None and not (
        isinstance(known, type) and issubclass(known, PreTrainedTokenizerBase)
    ):
        raise ModelError(
            f"model {where} has no usable tokenizer: {file}'s tokenizer_class "
            f"{shorten(repr(named))} is not a tokenizer; fetch the model again"
        )
    code = found.get("auto_map")
    of_its_own = isinstance(code, list) or (isinstance(code, dict) and "AutoTokenizer" in code)
    if named and known is None and of_its_own:
        raise ModelError(
            f"model {where} has no usable tokenizer: {shorten(repr(named))} "
            f"is code of the model's own ({file}'s auto_map), which ds_cp never runs; "
            "choose a model with a tokenizer.json that transformers knows"
        )


def _write(file: Path, found: dict[str, Any]) -> None:
    file.write_text(json.dumps(found), encoding="utf-8")
