"""Which kernel is taken, what is said of those before it, and that all ranks take the same."""

from __future__ import annotations

import sys

import pytest
import torch

from ds_cp import native
from ds_cp.attention import LayerSpec, choose_kernel
from ds_cp.attention.kernels import choose
from ds_cp.attention.kernels.choose import (
    Candidates,
    KernelUnavailableError,
    Maker,
    Told,
    agree_on_kernel,
    find_kernels,
    makers,
)
from ds_cp.attention.kernels.cpu import CpuKernel
from ds_cp.attention.kernels.cuda import CudaKernel
from ds_cp.attention.kernels.dense import Candidate
from ds_cp.attention.kernels.kernel import PagedKernel
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.attention.kernels.torch_ops import TorchKernel
from ds_cp.errors import ConfigError
from tests.helpers import flash_attn
from tests.helpers.native import native_library
from tests.helpers.paged import kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LAYERS = [LayerSpec(4, 2, 16, 0.25)]
ABSENT = "the native library is not built; run `python -m ds_cp.native`"
SLOWER = (
    "attention runs on torch's operators, which are slower, in bfloat16 about 2.5 times: "
    "`ds-cp doctor` says what the native kernel needs"
)


class Wrong(ReferenceKernel):
    """Right but for the scale."""

    name = "cpu"

    def paged_attention(self, q_THD, *given, **named):  # type: ignore[no-untyped-def]
        return super().paged_attention(q_THD * 1.5, *given, **named)


class Narrow(ReferenceKernel):
    name = "cpu"

    def refuses(self, spec: LayerSpec, block_size: int, dtype: torch.dtype) -> str:
        return f"head_dim {spec.head_dim} is too large" if spec.head_dim > 8 else ""


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: ABSENT)


def test_names_by_device_the_preferred_one_first() -> None:
    assert list(makers(CPU)) == ["cpu", "sdpa", "reference"]
    assert list(makers(CUDA)) == ["cuda", "triton", "sdpa", "reference"]


def test_a_name_of_another_device() -> None:
    for name, device in (("triton", CPU), ("flash_attn", CPU), ("cpu", CUDA)):
        with pytest.raises(ConfigError, match=f"'{name}' is not for {device.type}: set") as caught:
            choose_kernel(name, device, torch.float32, LAYERS, 16)
        assert "set attention.backend to auto or to one of " in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_takes_the_best_that_runs(dtype: torch.dtype) -> None:
    choice = choose_kernel("auto", CPU, dtype, LAYERS, 16)
    assert choice.kernel.name == next(iter(kernels()))
    assert bool(choice.notes) == (choice.kernel.name != "cpu")


@pytest.mark.usefixtures("not_built")
def test_without_the_native_library() -> None:
    """auto goes on with torch's operators and says so; asked for by name it is the user's error."""
    choice = choose_kernel("auto", CPU, torch.bfloat16, LAYERS, 16)
    assert isinstance(choice.kernel, TorchKernel)
    assert choice.notes == (f"kernel cpu is not used: {ABSENT}", SLOWER)
    with pytest.raises(ConfigError, match="attention.backend is cpu, but") as caught:
        choose_kernel("cpu", CPU, torch.bfloat16, LAYERS, 16)
    assert ABSENT in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("set attention.backend to auto")
    assert choose_kernel("sdpa", CPU, torch.bfloat16, LAYERS, 16).notes == ()


@pytest.mark.parametrize(
    ("kernel", "why"),
    [(Wrong(), "it is wrong by"), (Narrow(), "head_dim 16 is too large")],
    ids=["wrong", "narrow"],
)
def test_a_kernel_that_is_wrong_or_refuses_is_named_and_the_next_one_taken(
    monkeypatch: pytest.MonkeyPatch, kernel: PagedKernel, why: str
) -> None:
    monkeypatch.setattr(choose, "_cpu", lambda *_: kernel)
    choice = choose_kernel("auto", CPU, torch.float32, LAYERS, 16)
    assert choice.kernel.name == "sdpa"
    assert choice.notes[0].startswith(f"kernel cpu is not used: {why}")
    with pytest.raises(ConfigError, match=why):
        choose_kernel("cpu", CPU, torch.float32, LAYERS, 16)


def test_the_baseline_comes_after_torchs_operators_but_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = native_library()
    monkeypatch.setattr(choose, "_cpu", lambda *_: CpuKernel(library, "baseline"))
    choice = choose_kernel("auto", CPU, torch.float32, LAYERS, 16)
    assert choice.kernel.name == "sdpa" and "this processor has no AVX2" in choice.notes[0]
    assert choose_kernel("cpu", CPU, torch.float32, LAYERS, 16).kernel.name == "cpu"


class Raises(ReferenceKernel):
    """Raises in ``refuses`` or, with ``late``, in the self-test."""

    name = "cpu"

    def __init__(self, err: Exception, late: bool) -> None:
        self._err, self._late = err, late

    def refuses(self, spec: LayerSpec, block_size: int, dtype: torch.dtype) -> str:
        if not self._late:
            raise self._err
        return ""

    def merge_rows(self, *given: object) -> None:
        raise self._err


def maker_of(err: Exception, where: str) -> Maker:
    def make(device: torch.device, dtype: torch.dtype) -> PagedKernel:
        if where == "cause":
            raise KernelUnavailableError("triton fails here") from err
        if where == "maker":
            raise err
        return Raises(err, where == "self-test")

    return make


@pytest.mark.parametrize("where", ["maker", "refuses", "self-test"])
def test_whatever_a_kernel_raises_is_its_problem(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "_cpu", maker_of(ZeroDivisionError("first\nsecond"), where))
    choice = choose_kernel("auto", CPU, torch.float32, LAYERS, 16)
    assert choice.kernel.name == "sdpa"
    assert choice.notes[0] == (
        "kernel cpu is not used: it fails in the check at start (ZeroDivisionError: first)"
    )


@pytest.mark.parametrize("where", ["maker", "refuses", "self-test", "cause"])
@pytest.mark.parametrize(
    "err",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_a_lack_of_memory_is_no_kernels_problem(
    err: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "_cpu", maker_of(err, where))
    with pytest.raises(type(err)) as caught:
        choose_kernel("auto", CPU, torch.float32, LAYERS, 16)
    assert caught.value is err


def test_no_kernel_at_all_names_the_first_reason_and_a_way_out() -> None:
    for order, way in (
        (
            ("cuda", "triton", "sdpa", "reference"),
            "set device to cpu, or attention.backend to sdpa",
        ),
        (("triton", "reference"), "set device to cpu, or attention.deterministic to false"),
        (ORDER, "run `ds-cp doctor`, or set attention.backend to sdpa"),
    ):
        problems = {name: f"no {name}" for name in order}
        none = Candidates((), problems, order)
        with pytest.raises(ConfigError) as caught:
            agree_on_kernel("auto", none, [Told((), problems)] * 2, ["a", "b"])
        text = str(caught.value)
        assert f"(kernel {order[0]} is not used: no {order[0]})" in text and text.endswith(way)


def test_deterministic_takes_no_kernel_that_cuts_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(
        device: torch.device, dtype: torch.dtype, deterministic: bool = False
    ) -> PagedKernel:
        raise KernelUnavailableError("no compiler")

    monkeypatch.setattr(choose, "_triton", broken)
    found = find_kernels("auto", CUDA, torch.bfloat16, LAYERS, 16, check=False, deterministic=True)
    assert [kernel.name for kernel in found.kernels] == ["reference"]
    assert found.problems == {"triton": "no compiler"}
    for name in ("sdpa", "cuda", "flash_attn"):
        with pytest.raises(ConfigError, match="to auto or to one of triton, reference$"):
            find_kernels(name, CUDA, torch.bfloat16, LAYERS, 16, deterministic=True)
    some = find_kernels("sdpa", CPU, torch.float32, LAYERS, 16, check=False, deterministic=True)
    assert [kernel.name for kernel in some.kernels] == ["sdpa"]


def test_without_the_check_no_dense_operator_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_triton", lambda *_: Narrow())
    monkeypatch.setattr(choose, "_cuda", lambda *_: pytest.fail("tried"))
    found = find_kernels("auto", CUDA, torch.bfloat16, LAYERS, 16, check=False)
    assert found.order[0] == "triton" and found.kernels[0].name == "sdpa"


def test_operators_passed_over_are_told_for_the_models_own_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not for the head counts of the self-test."""

    def no_groups(q: torch.Tensor, k: torch.Tensor, *given: object) -> object:
        if q.shape[1] != k.shape[1]:
            raise ValueError("no groups of heads")
        return flash_attn.fa2(q[None], k[None], given[0][None], *given[1:], True)  # type: ignore

    kernel = CudaKernel(ReferenceKernel(), [Candidate("fa", lambda: no_groups)], CPU)  # type: ignore
    monkeypatch.setattr(choose, "_cpu", lambda *_: kernel)
    layers = [LayerSpec(2, 2, 100, 0.1)], [LayerSpec(4, 2, 16, 0.25)]
    notes = [choose_kernel("cpu", CPU, torch.bfloat16, some, 16).notes for some in layers]
    assert notes == [(), ("fa is not used: it fails here: no groups of heads",)]


def test_without_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_cpu", lambda *_: Wrong())
    assert choose_kernel("auto", CPU, torch.float32, LAYERS, 16, check=False).kernel.name == "cpu"


def test_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ds_cp.attention.kernels.triton_kernel", None)
    with pytest.raises(KernelUnavailableError, match="triton cannot be imported"):
        makers(CUDA)["triton"](CUDA, torch.bfloat16)


@pytest.mark.parametrize("deterministic", [False, True])
def test_triton_is_tried_in_the_models_dtype(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def make(device: torch.device, dtype: torch.dtype, *more: object) -> PagedKernel:
        asked.append(dtype)
        return ReferenceKernel()

    module = pytest.importorskip(
        "ds_cp.attention.kernels.triton_kernel", reason="no Triton: pip install 'ds_cp[cuda]'"
    )
    monkeypatch.setattr(module, "make_triton", make)
    for dtype in (torch.float16, torch.float32):
        find_kernels("triton", CUDA, dtype, LAYERS, 16, check=False, deterministic=deterministic)
    assert asked == [torch.float16, torch.float32]


def test_a_dtype_that_triton_lacks_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip(
        "ds_cp.attention.kernels.triton_kernel", reason="no Triton: pip install 'ds_cp[cuda]'"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(KernelUnavailableError, match="it has no torch.float64"):
        module.make_triton(CUDA, torch.float64)


def test_as_many_as_are_asked_for() -> None:
    found = find_kernels("auto", CPU, torch.float32, LAYERS, 16, check=False, enough=9)
    assert [kernel.name for kernel in found.kernels] == list(kernels())
    one = find_kernels("sdpa", CPU, torch.float32, LAYERS, 16, check=False, enough=9)
    assert [kernel.name for kernel in one.kernels] == ["sdpa"]


# --- over ranks

ORDER = ("cpu", "sdpa", "reference")


class Fast(ReferenceKernel):
    name = "cpu"


def mine(*kernels: PagedKernel, **problems: str) -> Candidates:
    return Candidates(kernels, problems, ORDER)


def test_all_ranks_have_the_same() -> None:
    ranks = [Told(("cpu",), {})] * 3
    choice = agree_on_kernel("auto", mine(Fast()), ranks)
    assert choice.kernel.name == "cpu" and choice.notes == ()


def test_a_rank_that_lacks_the_best_is_named_with_its_reason() -> None:
    """The same choice and the same lines on every rank, also on the one that lacks it."""
    full, less = Told(ORDER, {}), Told(("sdpa", "reference"), {"cpu": ABSENT})
    ranks, hosts = [full, full, less, less], ["a", "a", "b", "b"]
    everything = mine(Fast(), TorchKernel(), ReferenceKernel())
    lines = []
    for candidates in (everything, mine(TorchKernel(), ReferenceKernel(), cpu=ABSENT)):
        choice = agree_on_kernel("auto", candidates, ranks, hosts)
        assert choice.kernel.name == "sdpa"
        lines.append(choice.notes)
    assert lines[0] == lines[1]
    assert lines[0] == (f"kernel cpu is not used: rank 2 on b: {ABSENT}", SLOWER)


def test_all_ranks_lack_the_best() -> None:
    ranks = [Told(("sdpa",), {"cpu": ABSENT})] * 2
    choice = agree_on_kernel("auto", mine(TorchKernel(), cpu=ABSENT), ranks, ["a", "b"])
    assert choice.notes[0] == f"kernel cpu is not used: {ABSENT}"


def test_ranks_that_have_nothing_in_common() -> None:
    """As when one is asked for by name."""
    ranks = [Told(("cpu",), {}), Told((), {"cpu": ABSENT})]
    with pytest.raises(ConfigError, match="rank 1 on b: the native library is not built"):
        agree_on_kernel("cpu", Candidates((Fast(),), {}, ("cpu",)), ranks, ["a", "b"])
    with pytest.raises(ConfigError, match="rank 1 on b: the native library is not built"):
        agree_on_kernel("cpu", Candidates((), {"cpu": ABSENT}, ("cpu",)), ranks, ["a", "b"])


def test_a_kernel_that_is_asked_for_by_another_name() -> None:
    """``flash_attn`` is the kernel ``cuda`` with that package or not at all."""
    asked = Candidates((Fast(),), {}, ("flash_attn",))
    choice = agree_on_kernel("flash_attn", asked, [Told(("cpu",), {})] * 2, ["a", "b"])
    assert choice.kernel.name == "cpu" and choice.notes == ()
    ranks = [Told(("cpu",), {}), Told((), {"flash_attn": "it is not installed"})]
    with pytest.raises(ConfigError, match="flash_attn is not used.*it is not installed"):
        agree_on_kernel("flash_attn", asked, ranks, ["a", "b"])
