"""What the check at start accepts and refuses; values from transformers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf

from ds_cp.attention import PagedKernel
from ds_cp.attention.kernels.choose import Choice
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.comm.wire import World
from ds_cp.engine.llm import LLMEngine
from ds_cp.errors import ModelError, UnsupportedModelError
from ds_cp.sampling_params import SamplingParams
from ds_cp.startup import build, exactness
from ds_cp.startup.exactness import Reference, Step, compare, reference_logits
from ds_cp.topology.hosts import Topology
from tests.helpers.engines import engine_on, tiny_llama

KV: dict[str, Any] = {"kv_cache": {"tokens_per_rank": 256, "block_size": 16}}
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 128, "d_model": 64, "decoder_layers": 2, "encoder_layers": 2,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96, "max_position_embeddings": 512, "init_std": 0.3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower with more, and much so on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def engine_of(model: Any, **config: Any) -> LLMEngine:
    """An engine over this process alone."""
    alone = World(0, Topology.from_hosts(["here"]), torch.device("cpu"), 60.0, joined=False)
    return engine_on(alone, model.eval(), KV | config)


def seeded(cls: Any, config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return cls(config).to(dtype).eval()


def same_as_generate(model: Any) -> float:
    """Greedy tokens of a prompt in chunks equal transformers'; returns the check's error."""
    prompt = list(range(5, 45))
    want = model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, use_cache=False,
        pad_token_id=1, eos_token_id=None,
    )[0, 40:].tolist()  # fmt: skip
    engine = engine_of(model, scheduler={"max_num_batched_tokens": 13})
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    [output] = engine.generate([prompt], params)
    assert list(output.outputs[0].token_ids) == want
    return engine.facts.exactness


# --- decoders that ignore the positions that they are given


@pytest.mark.parametrize(
    "name", ["Bart", "Blenderbot", "BlenderbotSmall", "Marian", "MBart", "Pegasus", "PLBart"]
)
def test_decoders_that_count_positions_themselves(name: str) -> None:
    """Right for one prompt in one piece, wrong beside another or in a second chunk: refused."""
    config = getattr(hf, f"{name}Config")(**BART, pad_token_id=1)
    model = seeded(getattr(hf, f"{name}ForCausalLM"), config)
    with pytest.raises(UnsupportedModelError, match=f"{name}(ForCausalLM|Decoder)") as caught:
        engine_of(model)
    assert "chunk differ" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Roberta", "XLMRoberta", "Camembert"])
def test_decoders_whose_own_positions_begin_later(name: str) -> None:
    """Without positions they count from the padding token's id; ``generate`` gives it positions
    from 0, and so does ds_cp."""
    config = getattr(hf, f"{name}Config")(
        **SIZES | {"pad_token_id": 1}, max_position_embeddings=514, is_decoder=True,
        initializer_range=0.3,
    )  # fmt: skip
    assert same_as_generate(seeded(getattr(hf, f"{name}ForCausalLM"), config)) < 1e-5


def windowed() -> Any:
    return seeded(hf.Gemma2ForCausalLM, hf.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=16, sliding_window=5,
        max_position_embeddings=512, initializer_range=0.3))  # fmt: skip


def sinks() -> Any:
    return seeded(hf.GptOssForCausalLM, hf.GptOssConfig(
        **SIZES, num_key_value_heads=2, head_dim=16, sliding_window=5, num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=512, initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))  # fmt: skip


@pytest.mark.parametrize("make", [lambda: tiny_llama(initializer_range=0.2), windowed, sinks])
def test_decoders_that_are_served(make: Callable[[], Any]) -> None:
    assert same_as_generate(make()) < 1e-5


# --- rounding


def mixtral(layers: int, seed: int, spread: float) -> Any:
    return seeded(hf.MixtralForCausalLM, hf.MixtralConfig(
        **SIZES | {"num_hidden_layers": layers, "intermediate_size": 64}, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=512, initializer_range=spread,
    ), torch.bfloat16, seed)  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "seed", "spread"),
    [(12, 1, 0.1), (12, 2, 0.1), (12, 4, 0.1), (24, 0, 0.1), (24, 3, 0.1), (24, 1, 0.05)],
)
def test_a_deep_mixture_of_experts_in_bf16_is_served(layers: int, seed: int, spread: float) -> None:
    """Rounding flips experts: logits of transformers' own kernels differ by 2 to 28 % here, and
    ours by 1 to 26 %, not always by more where its own do."""
    facts = engine_of(mixtral(layers, seed, spread)).facts
    assert facts.dtype == "bfloat16" and facts.exactness < 0.4


def test_a_dense_model_in_bf16_is_served() -> None:
    facts = engine_of(tiny_llama(num_hidden_layers=16).to(torch.bfloat16)).facts
    assert max(facts.exactness, facts.rounding) < 0.05


def rows(error: float) -> tuple[Reference, list[Step]]:
    """A reference whose largest logit is 4, and one step that is off by ``error`` of that."""
    logits = torch.full((exactness.LENGTH, 8), -4.0)
    off = logits[:2].clone()
    off[1, 3] += 4.0 * error
    return Reference(logits, 0.0), [Step("first chunk", (0, 1), off)]


@pytest.mark.parametrize(
    ("dtype", "rounding", "limit"),
    [
        (torch.float32, 1e-6, 1e-4),
        (torch.float32, 1e-3, 3e-3),
        (torch.bfloat16, 0.0, 0.05),
        (torch.bfloat16, 0.012, 0.05),
        (torch.float16, 0.1, 0.3),
        (torch.bfloat16, 0.4, 0.45),
    ],
)
def test_the_limit(dtype: torch.dtype, rounding: float, limit: float) -> None:
    """Three times transformers' own difference, within an absolute floor and ceiling."""
    reference, below = rows(0.98 * limit)
    reference = dataclasses.replace(reference, rounding=rounding)
    assert compare("X", dtype, reference, below) == pytest.approx(0.98 * limit, rel=0.01)
    with pytest.raises(UnsupportedModelError, match="X: logits of the first chunk differ"):
        compare("X", dtype, reference, rows(1.02 * limit)[1])
    with pytest.raises(UnsupportedModelError, match="by nan"):
        compare("X", dtype, reference, rows(float("nan"))[1])


def test_a_reference_that_is_no_number_is_refused() -> None:
    model = tiny_llama()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ModelError):
        engine_of(model)
    reference = reference_logits(model, [])
    with pytest.raises(UnsupportedModelError):
        compare("X", torch.float32, reference, [Step("decode step", (0,), reference.logits[:1])])


def test_large_scores_in_bf16_are_served() -> None:
    """Eager attention rounds scores to bf16: at a size of 100 these are off by up to 0.25."""
    model = tiny_llama(num_hidden_layers=3, initializer_range=0.2)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data *= 6.0
    facts = engine_of(model.to(torch.bfloat16)).facts
    assert facts.rounding > 0.05


# --- a kernel that is wrong in one place


class WrongIn:
    """A kernel whose output is off by a share in one of the three steps of the check."""

    def __init__(self, kernel: PagedKernel, place: str, by: float) -> None:
        self.name, self.packed = kernel.name, kernel.packed
        self.write, self.merge_rows = kernel.write, kernel.merge_rows
        self.refuses = kernel.refuses
        self._kernel, self._place, self._by = kernel, place, by

    def paged_attention(self, q: Any, at: Any, pages: Any, batch: Any, *rest: Any) -> Any:
        part = self._kernel.paged_attention(q, at, pages, batch, *rest)
        first = batch.parts[0].q_runs[0][0]
        step = "decode" if batch.max_rows == 1 else "second" if first else "first"
        if step == self._place:
            part.out.mul_(1 + self._by)
        return part


@pytest.mark.parametrize(
    ("place", "step"),
    [("first", "first chunk"), ("second", "second chunk"), ("decode", "decode step")],
)
@pytest.mark.parametrize(("dtype", "by"), [(torch.float32, 0.01), (torch.bfloat16, 0.5)])
def test_a_kernel_that_is_wrong_in_one_place(
    monkeypatch: pytest.MonkeyPatch, place: str, step: str, dtype: torch.dtype, by: float
) -> None:
    choose = build.choose_for_all

    def wrong(*args: Any) -> Choice:
        return Choice(WrongIn(choose(*args).kernel, place, by))

    monkeypatch.setattr(build, "choose_for_all", wrong)
    what = "logits of" if dtype == torch.float32 else "attention of layer 0 in"
    with pytest.raises(UnsupportedModelError, match=f"{what} the {step} differ"):
        engine_of(tiny_llama(initializer_range=0.2).to(dtype))
    if dtype == torch.bfloat16:  # where logits alone would be excused by rounding
        with pytest.raises(UnsupportedModelError, match=f"layer 0 in the {step} differs"):
            engine_of(mixtral(12, 3, 0.1))


def test_a_pool_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a block are read one slot late: only later chunks and decodes can see it."""
    write = ReferenceKernel.write

    def late(self: Any, pages: Any, k: Any, v: Any, blocks: Any, places: Any) -> None:
        write(self, pages, k, v, blocks, (places + 1) % pages.shape.block_size)

    monkeypatch.setattr(build, "choose_for_all", lambda *_: Choice(ReferenceKernel()))
    monkeypatch.setattr(ReferenceKernel, "write", late)
    with pytest.raises(UnsupportedModelError, match="logits of the"):
        engine_of(tiny_llama(initializer_range=0.2))
