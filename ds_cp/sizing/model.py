"""The shape of a model from its config.json: parameters, and what each layer asks of attention."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ds_cp.errors import ModelError, UnsupportedModelError
from ds_cp.sizing.config_json import MAX_BYTES, MAX_LAYERS, ConfigJson, read_json_object
from ds_cp.sizing.families import FAMILIES, LLAMA_LIKE, Family
from ds_cp.sizing.layers import LayerShape, layer_shapes

# As config.json names them.
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of one element


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes. ``embedding``, ``head``, ``final``: parameters of the token table (with
    positions), of the output head (0 where it is the same matrix) and of what follows the layers;
    ``head_size``: parameters that the last token passes, shared or not; ``widest``: of a
    feed-forward part; ``dtype``: as the checkpoint has it; ``splits``: whether the
    server takes tensor parallelism for the family; ``notes``: what was assumed."""

    name: str
    model_type: str
    hidden: int
    vocab: int
    widest: int
    max_len: int | None
    embedding: int
    head: int
    head_size: int
    final: int
    layers: tuple[LayerShape, ...]
    dtype: str
    splits: bool = True
    notes: tuple[str, ...] = field(default=())

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.head + self.final + sum(each.total for each in self.layers)

    @property
    def active(self) -> int:
        """Parameters that a token passes: of routed experts those that it is sent to."""
        return self.total - sum(each.experts - each.active_experts for each in self.layers)

    def of_rank(self, tp: int) -> int:
        """Parameters on one of ``tp`` ranks that share the layers: what the tensor-parallel plan
        splits by rows and columns is shared, the rest is whole on each."""
        whole = self.embedding + self.head + self.final
        return whole + sum(each.of_rank(tp) for each in self.layers)

    def active_of_rank(self, tp: int) -> int:
        """Parameters of the layers alone, on one of ``tp`` ranks, that a token passes there."""
        return sum(each.of_rank(tp) - each.experts + each.active_experts for each in self.layers)

    def kv_bytes(self, element: int, tp: int) -> int:
        """KV bytes of one token over all layers on one of ``tp`` ranks."""
        return sum(
            each.num_kv_heads // tp * (each.head_dim + each.v_dim) for each in self.layers
        ) * element  # fmt: skip


def read_model(model: str) -> ModelShape:
    """The shape of a model: a directory with config.json, or that file.

    Raises ``ModelError`` when it cannot be read or a size is missing or out of bounds,
    ``UnsupportedModelError`` when its layers are not softmax attention.
    """
    if not model:
        raise ModelError("--model is empty: give a model's directory, or its config.json")
    path = Path(model).expanduser()
    try:
        file = path / "config.json" if path.is_dir() else path
    except (OSError, ValueError):
        file = path
    if not model.endswith(".json") and file == path and not path.exists():
        raise ModelError(
            f"no directory or config.json at {model[:200]}: a model of the hub is downloaded "
            "first, its config.json is enough"
        )
    found = read_json_object(file, MAX_BYTES, "a model's directory, or its config.json")
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return shape_of(found, name, str(file))


def shape_of(values: dict[str, object], name: str, where: str) -> ModelShape:
    """The shape that the object of a config.json describes; raises as ``read_model`` does."""
    notes: list[str] = []
    if values.get("is_encoder_decoder") is True:
        raise UnsupportedModelError(f"{where} is of an encoder-decoder; ds_cp serves decoders only")
    text = values.get("text_config")
    if isinstance(text, dict):
        outer = {k: values[k] for k in ("dtype", "torch_dtype") if values.get(k) is not None}
        values = {**outer, **text}
        notes.append("only the text part of the model is counted")
    config = ConfigJson(values, where)
    model_type = config.get("model_type")
    model_type = model_type[:60] if isinstance(model_type, str) else ""
    family = FAMILIES.get(model_type)
    if family is None:
        notes.append(
            f"model_type {model_type or 'is not said, it'} is read as Llama's: "
            "biases and norms of its own are not counted"
        )
        family = LLAMA_LIKE
    if values.get("quantization_config") is not None:
        notes.append("quantization_config is not applied: weights are counted in the dtype below")
    shape = _shape(config, family, name, model_type)
    return replace(shape, notes=tuple(notes))


def _shape(config: ConfigJson, family: Family, name: str, model_type: str) -> ModelShape:
    hidden = config.number("hidden_size", "n_embd")
    vocab = config.number("vocab_size")
    count = config.number("num_hidden_layers", "n_layer", "num_layers", most=MAX_LAYERS)
    layers, widest = layer_shapes(config, family, hidden, count)
    longest = config.maybe("max_position_embeddings", "n_positions")
    positions = 0
    if family.positions is not None:
        positions = ((longest or 0) + family.positions) * hidden
    tied = config.get("tie_word_embeddings")
    tied = family.tied if tied is None else config.flag("tie_word_embeddings")
    bias = vocab if family.head_bias else 0
    stated = config.get("dtype") or config.get("torch_dtype")
    return ModelShape(
        name=name,
        model_type=model_type,
        hidden=hidden,
        vocab=vocab,
        widest=widest,
        max_len=longest,
        embedding=vocab * hidden + positions,
        head=(0 if tied else vocab * hidden) + bias,
        head_size=vocab * hidden + bias,
        final=family.final_norm * hidden,
        layers=layers,
        dtype=DTYPES.get(str(stated), "bf16"),
        splits=family.tp,
    )
