"""A worker that records its steps: the pieces that are put in place of its own while a trace is
taken. Without a trace nothing of this is in the way.

On a CUDA device spans are those of the thread that launches: the device works on behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ds_cp.attention import LayerSpec, LocalAttention, Mode, PagedKernel, Pages, Partial
from ds_cp.attention.ring import RingPassKV, RingPassQ
from ds_cp.attention.tree import TreeAttention
from ds_cp.comm.traced import TracedTransport
from ds_cp.comm.wire import Group
from ds_cp.kv.host_store import HostStore
from ds_cp.trace.recorder import Kind, Recorder
from ds_cp.worker.state import StepWork
from ds_cp.worker.step_context import Layers, StepContext
from ds_cp.worker.trace_output import TraceOutput
from ds_cp.worker.traced_kernel import TracedKernel

if TYPE_CHECKING:
    from ds_cp.worker.worker import Worker


NAMES: dict[type, str] = {
    LocalAttention: "local",
    RingPassKV: "ring pass-KV",
    RingPassQ: "ring pass-Q",
    TreeAttention: "tree",
}


class Tracing:
    """What a worker asks while it is traced."""

    def __init__(self, recorder: Recorder, output: TraceOutput) -> None:
        self.recorder = recorder
        self._output = output

    def step(self, number: int) -> AbstractContextManager[None]:
        """Around a step."""
        return self.recorder.step(number)

    def context(self, work: StepWork, layers: Layers) -> StepContext:
        """The step's attention."""
        return TracedContext(work, layers, self.recorder)

    def lost(self) -> str:
        """What to say of a job that has failed; see ``TraceOutput``."""
        return self._output.lost()

    def write(self) -> str:
        """Write what was recorded; see ``TraceOutput``."""
        return self._output.write()


def trace_steps(worker: Worker, file: str, limit: int) -> Tracing:
    """Let ``worker`` record its steps from now on, up to ``limit`` spans, for ``file`` on rank 0's
    host. Collective."""
    recorder = Recorder(limit)
    output = TraceOutput(worker.world, recorder, file)
    for group in (worker.cp, worker.tp, worker.world.everybody):
        _trace_group(group, recorder)
    if worker.mover.store is not None:
        nbytes = worker.pool.block_elements * worker.pool.dtype.itemsize
        worker.mover.store = TracedStore(worker.mover.store, recorder, nbytes)
    model = worker.model

    def forward(*args: Any, **kwargs: Any) -> Any:
        with recorder.span(Kind.MODEL, "model"):
            return model(*args, **kwargs)

    worker.model = Forwarding(model, forward)  # type: ignore[assignment]
    worker.tracing = Tracing(recorder, output)
    return worker.tracing


class TracedStore:
    """Host memory whose copies are recorded. On a CUDA device a span is of the launch alone."""

    def __init__(self, inner: HostStore, recorder: Recorder, block_bytes: int) -> None:
        self._inner = inner
        self._recorder = recorder
        self._bytes = block_bytes

    @property
    def num_slots(self) -> int:
        """As ``HostStore``."""
        return self._inner.num_slots

    @property
    def num_failed(self) -> int:
        """As ``HostStore``."""
        return self._inner.num_failed

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """As ``HostStore``."""
        with self._span("to the host", len(slots)):
            self._inner.save(blocks, slots)

    def load(self, slots: Sequence[int], blocks: Sequence[int], later: bool = False) -> None:
        """As ``HostStore``."""
        with self._span("from the host, later" if later else "from the host", len(slots)):
            self._inner.load(slots, blocks, later)

    def read(self, slots: Sequence[int]) -> torch.Tensor:
        """As ``HostStore``."""
        with self._span("from the host, for another rank", len(slots)):
            return self._inner.read(slots)

    def settle(self) -> None:
        """As ``HostStore``."""
        self._inner.settle()

    def close(self) -> None:
        """As ``HostStore``."""
        self._inner.close()

    @contextmanager
    def _span(self, name: str, count: int) -> Iterator[None]:
        began = self._recorder.now
        yield
        self._recorder.add(Kind.HOST, name, began, count * self._bytes, count)


def _trace_group(group: Group, recorder: Recorder) -> None:
    if group.transport is not None:
        group.transport = TracedTransport(group.transport, recorder, group.rank, group.size)
    if group.on_device is not None:
        group.on_device = TracedTransport(group.on_device, recorder, group.rank, group.size)


class Forwarding:
    """An object with another call."""

    def __init__(self, inner: Any, call: Callable[..., Any]) -> None:
        self._inner = inner
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class TracedContext(StepContext):
    """A ``StepContext`` that records each layer, and what the modes do in it."""

    def __init__(self, work: StepWork, layers: Layers, recorder: Recorder) -> None:
        super().__init__(work, layers)
        self._recorder = recorder
        kernel = TracedKernel(layers.kernel, recorder)
        self._modes = [TracedMode(mode, kernel, recorder) for mode in self._modes]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As ``StepContext``."""
        with self._recorder.span(Kind.LAYER, "attention", layer):
            return super().attend(layer, q, k, v)

    def _store(self, pages: Pages, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> None:
        with self._recorder.span(Kind.STORE, "store keys and values"):
            super()._store(pages, k_TGD, v_TGD)


class TracedMode:
    """A mode over a kernel that records. See ``Mode``."""

    def __init__(self, inner: Mode, kernel: TracedKernel, recorder: Recorder) -> None:
        self._inner = inner
        self._kernel = kernel
        self._recorder = recorder
        self._name = NAMES[type(inner)]

    def __call__(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        kernel: PagedKernel,
        spec: LayerSpec,
        into: Partial,
    ) -> None:
        """As in ``Mode``."""
        with self._recorder.in_mode(self._name):
            self._inner(q_THD, q_positions, pages, self._kernel, spec, into)
