"""Memory of a rank against the pool that the server allocates, and against torch's own peak."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ds_cp.attention import pages
from ds_cp.config import load_config
from ds_cp.errors import ConfigError
from ds_cp.kv.pool import KVPool, bytes_per_token
from ds_cp.model.wiring import probe_layers
from ds_cp.scheduler.build import AUTO_BATCHED_TOKENS
from ds_cp.sizing import job as job_module
from ds_cp.sizing import memory as memory_module
from ds_cp.sizing.device import read_device
from ds_cp.sizing.job import BLOCK, Job, counts, parse_context
from ds_cp.sizing.memory import activation_bytes, block_bytes, largest_context, memory_of
from ds_cp.sizing.model import ModelShape, read_model, shape_of
from ds_cp.startup.kv_budget import AUTO_GPU_SHARE, AUTO_MEMORY_SHARE
from tests.helpers.engines import tiny_llama
from tests.helpers.shapes import config_of, model_of
from tests.unit.sizing.llama import LLAMA_8B, SMALL

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shape_case(case: str, folder: Path) -> tuple[ModelShape, Any]:
    config = config_of(case)
    config.save_pretrained(folder)
    return read_model(str(folder)), config


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["llama", "qwen3_moe", "gpt_oss", "DeepseekV3", "MiMoV2Flash"])
def test_kv_is_what_the_pool_takes(case: str, dtype: str, tmp_path: Path) -> None:
    shape, config = shape_case(case, tmp_path)
    specs = probe_layers(model_of(case, config, "cpu"))
    pool = KVPool(specs, 3, BLOCK, DTYPES[dtype], torch.device("cpu"))
    element = DTYPES[dtype].itemsize
    assert pool.nbytes == 3 * block_bytes(shape, element, 1)
    assert bytes_per_token(specs, DTYPES[dtype]) == shape.kv_bytes(element, 1)


def test_weights_are_torch_s_bytes(tmp_path: Path) -> None:
    shape, config = shape_case("mixtral", tmp_path)
    model = model_of("mixtral", config).to(torch.bfloat16)
    memory = memory_of(shape, read_device("h100"), Job(1, 1, 100, "bf16"))
    assert memory.weights == sum(p.nbytes for p in model.parameters())


class Peak(TorchDispatchMode):
    """Within: the most bytes that tensors which operators made held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr():
                self._note(each.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def test_activations_are_about_what_torch_needs(tmp_path: Path) -> None:
    """transformers' own forward call of as many tokens, whose attention keeps no partial in fp32
    and whose feed-forward part and attention are the same."""
    rows, wide = 512, {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
    model = tiny_llama(**wide).to(torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    shape = read_model(str(tmp_path))
    ids = torch.arange(rows)[None] % 50
    with torch.inference_mode(), Peak() as peak:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    said = activation_bytes(shape, Job(1, 1, rows, "bf16"))
    assert peak.most > 200_000
    assert 0.6 * peak.most < said < 2.0 * peak.most


def test_the_server_s_own_numbers() -> None:
    assert job_module.CHUNK == AUTO_BATCHED_TOKENS
    assert load_config({"model": "m"}).kv_cache.block_size == BLOCK
    assert memory_module.ALIGN == pages.ALIGN
    assert read_device("h100").memory.kv_share == AUTO_GPU_SHARE
    assert read_device("cpu").memory.kv_share == AUTO_MEMORY_SHARE


def test_eight_billion_parameters_on_one_card() -> None:
    """By hand: 8.03e9 x 2 bytes, 2 x 8 x 128 x 2 x 32 bytes a token, 85 % of what is left."""
    device = read_device("h100")
    memory = memory_of(LLAMA_8B, device, Job(1, 1, 128 * 1024, "bf16"))
    assert round(LLAMA_8B.total / 1e9, 2) == 8.03
    assert memory.weights == 2 * LLAMA_8B.total and memory.kv == 128 * 1024 * 131_072
    assert memory.fits and memory.free > 0
    room = 0.85 * (77.5 * 2**30 - memory.weights)
    [(ranks, tokens)] = largest_context(LLAMA_8B, device, Job(1, 1, 1000, "bf16"))
    assert ranks == 1 and tokens == room // (131_072 * BLOCK) * BLOCK


def test_a_model_that_is_too_large_does_not_fit() -> None:
    huge = shape_of({**SMALL, "num_hidden_layers": 2000}, "m", "x")
    memory = memory_of(huge, read_device("h100"), Job(1, 8, 1000, "bf16"))
    assert not memory.fits and memory.free < 0 and memory.kv_room == 0
    assert {
        tokens for _, tokens in largest_context(huge, read_device("h100"), Job(1, 8, 9, "bf16"))
    } == {0}


def test_a_windowed_layer_keeps_its_kv_whole() -> None:
    windowed = shape_of({**SMALL, "model_type": "mistral", "sliding_window": 4096}, "m", "x")
    job = Job(1, 2, 100_000, "bf16")
    assert memory_of(windowed, read_device("a100"), job).kv == (
        memory_of(LLAMA_8B, read_device("a100"), job).kv
    )


@given(st.integers(1, 64), st.integers(1, 1 << 22), st.sampled_from([1, 2, 4, 8]))
def test_more_ranks_hold_more(groups: int, context: int, tp: int) -> None:
    device = read_device("h100")
    job = Job(groups, tp, context, "bf16", tp)
    more = replace(job, hosts=groups + 1)
    one, two = (memory_of(LLAMA_8B, device, each) for each in (job, more))
    assert two.kv <= one.kv
    if groups > 1:  # the second rank brings the ring's two shards
        assert two.activations <= one.activations
    assert one.kv * groups >= LLAMA_8B.kv_bytes(2, tp) * context
    rows = largest_context(LLAMA_8B, device, job)
    assert [ranks for ranks, _ in rows] == [n * tp for n in counts(groups)]
    per_group = {tokens * tp // ranks for ranks, tokens in rows}
    assert len(per_group) == 1, "the sum of the ranks, at any number of them"
    longest = rows[-1][1]
    if 1 <= longest <= job_module.MAX_CONTEXT:
        at = replace(job, context=longest)
        assert memory_of(LLAMA_8B, device, at).kv <= memory_of(LLAMA_8B, device, at).kv_room


@pytest.mark.parametrize(
    ("text", "tokens"), [("5000", 5000), ("128K", 131072), ("1M", 1 << 20), (" 2k ", 2048)]
)
def test_contexts(text: str, tokens: int) -> None:
    assert parse_context(text) == tokens


@pytest.mark.parametrize("text", ["", "1G", "1.5M", "-1", "K", "1e6", "1" * 30, "１"])
def test_bad_contexts(text: str) -> None:
    with pytest.raises(ConfigError, match="--context is"):
        parse_context(text)


def test_host_memory_keeps_whole_blocks_of_every_group() -> None:
    device = read_device("h100")
    rate = device.memory.host_gb_per_s
    assert rate is not None
    block = block_bytes(LLAMA_8B, 2, 2)
    job = Job(2, 4, 100_000, "bf16", 2, host_memory=10 * block + block - 1)
    room = memory_module.host_room(LLAMA_8B, device, job)
    assert room.tokens == 10 * BLOCK * 4
    blocks = math.ceil(math.ceil(100_000 / BLOCK) / 4)
    assert room.back_s == pytest.approx(blocks * block / (rate * 1e9))
    unknown = memory_module.host_room(LLAMA_8B, read_device("cpu"), replace(job, host_memory=0))
    assert unknown == memory_module.HostRoom(0, None)


@pytest.mark.parametrize(("text", "size"), [("0", 0), ("64GiB", 64 << 30), ("4096", 4096)])
def test_host_memory_is_a_size(text: str, size: int) -> None:
    assert job_module.parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "-1", "64XB", "1" * 17, "auto"])
def test_what_is_no_host_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="--host-memory is "):
        job_module.parse_memory(text)
    with pytest.raises(ConfigError, match="--host-memory is -1 bytes"):
        Job(1, 1, 100, "bf16", 1, -1)
