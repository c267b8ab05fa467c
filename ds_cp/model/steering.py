"""How a model is loaded is ours to decide, not its directory's: the keys that steer loading are
left out of the copies of its JSON files that transformers reads.

A key steers when it names code, another file or repository, a kernel or an implementation, when it
is an argument of the loading functions, or when it would take the place of a method or of a table
of the config class. Everything else describes the model, and is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ds_cp.errors import ModelError
from ds_cp.model.values import are_token_ids
from ds_cp.text import shorten

# Keys of config.json and the tokenizer's files, at any depth.
STEERING = frozenset({
    # code of the model, implementations, kernels
    "auto_map", "custom_generate", "custom_pipelines", "trust_remote_code", "code_revision",
    "attn_implementation", "experts_implementation", "use_kernels", "kernel_config",
    "allow_all_kernels", "fusion_config", "torchscript", "backend", "tokenizer_object",
    # other files and repositories
    "transformers_weights", "name_or_path", "_name_or_path", "_commit_hash",
    "base_model_name_or_path", "configuration_files", "extra_files", "extra_config_files",
    "adapter_config", "adapter_kwargs", "peft_config", "peft_type", "backbone",
    "use_pretrained_backbone", "use_timm_backbone", "backbone_kwargs", "timm_kwargs", "gguf_file",
    "subfolder", "cache_dir", "proxies", "local_files_only", "force_download", "is_local",
    "fast_tokenizer_files", "init_inputs", "offload_folder", "offload_state_dict",
    "offload_buffers", "state_dict", "weights_only",
    # where and how tensors are placed
    "device_map", "max_memory", "device_mesh", "tp_plan", "tp_size", "distributed_config",
    "low_cpu_mem_usage", "use_safetensors", "key_mapping", "base_model_tp_plan",
    "base_model_pp_plan", "base_model_ep_plan", "_auto_class",
    # the classes of a classifier, of which a list is made
    "num_labels", "id2label", "label2id", "problem_type",
    # what a forward call returns
    "output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "use_cache",
})  # fmt: skip
# Those that tools write into most files and that change nothing of what the model says, and the one
# that ``checkpoint`` follows itself.
QUIET = frozenset({
    "num_labels", "id2label", "label2id", "problem_type",
    "transformers_weights", "name_or_path", "_name_or_path", "_commit_hash", "output_attentions",
    "output_hidden_states", "return_dict", "use_return_dict", "use_cache", "torchscript",
    "is_local", "local_files_only", "low_cpu_mem_usage", "backend",
})  # fmt: skip
# Likewise in the tokenizer's files.
WRITTEN = frozenset({"special_tokens_map_file", "tokenizer_file"})
# Attributes of every config class that a config.json may state.
STATED = frozenset({
    "model_type", "torch_dtype", "rope_scaling", "per_layer_config",
})  # fmt: skip
# Keys of generation_config.json that are read.
END_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

Json = dict[str, Any]


def without_steering(config: Mapping[str, Any]) -> tuple[Json, list[str]]:
    """config.json without the keys that steer, and their paths, but for the ``QUIET`` ones."""
    dropped: list[str] = []
    top = _class_names(config.get("model_type"))
    below = _class_names(None)

    def steers(path: tuple[str, ...], key: str) -> bool:
        return _steers(key) or key in (below if path else top)

    return _copy(config, (), steers, dropped), _said(dropped)


def without_files(config: Mapping[str, Any]) -> tuple[Json, list[str]]:
    """tokenizer_config.json or special_tokens_map.json likewise; it may name no file either."""
    dropped: list[str] = []

    def steers(path: tuple[str, ...], key: str) -> bool:
        if path[:1] == ("added_tokens_decoder",):
            return False
        return _steers(key) or key.endswith(("_file", "_files"))

    kept = _copy(config, (), steers, dropped)
    # Older versions of transformers wrote null, or a path of their own machine.
    written = {key for key, value in config.items() if value is None} | WRITTEN
    return kept, [path for path in _said(dropped) if path not in written]


def end_tokens_only(where: str, generation: Mapping[str, Any]) -> Json:
    """generation_config.json: the ids of special tokens, all else being each request's. Raises
    ``ModelError`` that names the key for what is no id."""
    kept = {key: generation[key] for key in END_TOKENS if key in generation}
    for key, value in kept.items():
        if not are_token_ids(value):
            raise ModelError(
                f"model {where}: generation_config.json's {key} is {shorten(repr(value))}: "
                "it must be a token id or a list of ids; fetch the model again"
            )
    return kept


def _steers(key: str) -> bool:
    return key in STEERING or (key.startswith("_") and "implementation" in key)


def _copy(
    value: Mapping[str, Any], path: tuple[str, ...],
    steers: Callable[[tuple[str, ...], str], bool], dropped: list[str],
) -> Json:  # fmt: skip
    kept: Json = {}
    for key, inner in value.items():
        if steers(path, key):
            dropped.append(".".join((*path, key)))
        else:
            kept[key] = _inner(inner, (*path, key), steers, dropped)
    return kept


def _inner(
    value: Any, path: tuple[str, ...],
    steers: Callable[[tuple[str, ...], str], bool], dropped: list[str],
) -> Any:  # fmt: skip
    if isinstance(value, dict):
        return _copy(value, path, steers, dropped)
    if isinstance(value, list):
        return [_inner(item, path, steers, dropped) for item in value]
    return value


def _said(dropped: Collection[str]) -> list[str]:
    def quiet(path: str) -> bool:
        key = path.rpartition(".")[2]
        return key in QUIET or key.endswith("_implementation_autoset")

    return [path for path in dropped if not quiet(path)]


def _class_names(model_type: Any) -> frozenset[str]:
    """Methods and tables of a model type's config class: values must not take their place."""
    import dataclasses

    from transformers import CONFIG_MAPPING, PreTrainedConfig

    cls: Any = PreTrainedConfig
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        cls = CONFIG_MAPPING[model_type]

    stated = {field.name for field in dataclasses.fields(cls)} | STATED
    return frozenset(
        name for name in dir(cls) if name not in stated and _takes_place(name, getattr(cls, name))
    )


def _takes_place(name: str, of: Any) -> bool:
    """A default that is a plain value is there to be stated otherwise."""
    return name.startswith("__") or callable(of) or isinstance(of, dict | list | tuple)
