"""Which carrier a job takes for its devices, from what every rank says."""

from __future__ import annotations

import pytest

from ds_cp.comm.join import agree_on_backend
from ds_cp.errors import ConfigError

AB = ["a", "a", "b", "b"]


@pytest.mark.parametrize("asked", ["auto", "gloo"])
def test_ranks_on_cpus_take_gloo(asked: str) -> None:
    assert agree_on_backend(asked, AB, ["", "", "", ""]) == ("gloo", [])  # type: ignore[arg-type]


def test_one_gpu_for_each_rank_takes_nccl() -> None:
    for asked in ("auto", "nccl"):
        # Two hosts may name their devices alike.
        assert agree_on_backend(asked, AB, ["0", "1", "0", "1"]) == ("nccl", [])  # type: ignore[arg-type]
    assert agree_on_backend("gloo", AB, ["0", "1", "0", "1"]) == ("gloo", [])


def test_ranks_that_share_a_gpu_take_gloo_and_say_so() -> None:
    backend, [note] = agree_on_backend("auto", AB, ["0", "1", "2", "2"])
    assert backend == "gloo"
    assert (
        note == "host b has 2 ranks on 1 GPU: they exchange by gloo, since NCCL needs one for each"
    )
    assert agree_on_backend("gloo", AB, ["0"] * 4) == ("gloo", [])
    with pytest.raises(ConfigError) as caught:
        agree_on_backend("nccl", ["a"] * 4, ["0", "1", "0", "1"])
    assert "host a has 4 ranks on 2 GPUs" in str(caught.value)
    assert "set comm.backend to gloo" in str(caught.value)


def test_a_job_is_on_cpus_or_on_gpus() -> None:
    with pytest.raises(ConfigError, match=r"ranks \[1, 3\] compute on the CPU"):
        agree_on_backend("auto", AB, ["0", "", "0", ""])
    with pytest.raises(ConfigError, match="comm.backend nccl"):
        agree_on_backend("nccl", AB, [""] * 4)
