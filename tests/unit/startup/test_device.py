"""Which device a rank takes, and what is said when there is none."""

from __future__ import annotations

import pytest
import torch

from ds_cp.config import load_config
from ds_cp.errors import ConfigError
from ds_cp.startup.join import choose_device


def chosen(monkeypatch: pytest.MonkeyPatch, gpus: int, rank: int, **config: object) -> str:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    return str(choose_device(load_config({"model": "m", **config}), rank))


def test_ranks_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("auto", "cuda"):
        found = [chosen(monkeypatch, 2, rank, device=device) for rank in range(4)]
        assert found == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    # The carrier is another question than the device.
    assert chosen(monkeypatch, 1, 3, comm={"backend": "gloo"}) == "cuda:0"


def test_a_cpu_where_there_is_no_gpu_or_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, 0, 1) == "cpu"
    assert chosen(monkeypatch, 2, 1, device="cpu") == "cpu"


@pytest.mark.parametrize(
    ("gpus", "config", "words"),
    [
        (0, {"device": "cuda"}, ("device is cuda", "no CUDA device", "set device to cpu")),
        (0, {"comm": {"backend": "nccl"}}, ("comm.backend nccl", "CUDA", "has none")),
        (2, {"device": "cpu", "comm": {"backend": "nccl"}}, ("comm.backend nccl", "device is cpu")),
    ],
)
def test_a_device_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, gpus: int, config: dict[str, object], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(monkeypatch, gpus, 0, **config)
    text = str(caught.value)
    assert all(word in text for word in words) and "\n" not in text
    assert caught.value.exit_code == 2
