"""Section of ``benchmarks.gpu``: decode steps of requests that span two ranks, as graphs and eager.
The peer is not there and its messages are zeros, so that one GPU is enough: the times are those of
this rank, without the wire."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.gpu_common import llama, row, seconds, section
from ds_cp.attention.kernels.choose import find_kernels
from ds_cp.comm.device import synchronize
from ds_cp.model.wiring import probe_layers
from ds_cp.worker.decode_graph import cuda_graphs
from ds_cp.worker.span_graph import SpanGraphs
from tests.helpers.absent_peer import Steps, world_of_two

NEAR = 0.02  # largest difference of logits in bf16, relative to the largest logit


def spans(device: torch.device, quick: bool) -> None:
    """Steps of 64 streams that span."""
    if device.type == "cuda":
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    streams, length, new = (2, 40, 6) if quick else (64, 4000, 32)
    decoder, size = llama(device, dtype, quick), 64
    specs, world = probe_layers(decoder), world_of_two(device)
    kernel = find_kernels("auto", device, dtype, specs, size, check=False).kernels[0]

    def steps() -> Steps:
        return Steps(decoder, specs, kernel, world, streams, 0, length, new, size)

    notes: list[str] = []
    eager, replayed = steps(), steps()
    graphs = replayed.graphs(cuda_graphs(device), notes.append) if device.type == "cuda" else None
    slow, want = timed(eager, None, new)
    name = f"decode step, {streams} streams over 2 ranks"
    row(f"{name}, eager", value=f"{slow * 1e3:.2f} ms")
    if graphs is None:
        row("graphs", value="none on this device")
        return
    took, got = timed(replayed, graphs, new)
    if not graphs.captured:
        row(f"{name}, graphs", ok=False, against="; ".join(notes) or "nothing was captured")
        return
    wrong = float((got - want).abs().max() / want.abs().max())
    row(f"{name}, the same logits", ok=wrong <= NEAR, against=f"{wrong:.1e}")
    alone = seconds(graphs._kept[graphs.captured[-1]].graph.replay, device, 0.5)
    row(f"{name}, graphs", value=f"{took * 1e3:.2f} ms",
        against=f"{slow / took:.2f}x eager, {took / alone:.2f} of its kernels "
        f"({alone * 1e3:.2f} ms)")  # fmt: skip
    if torch.cuda.device_count() < 2:
        row("graphs over NCCL", value="needs two GPUs", against="tests/dist/test_span_graph.py")


def timed(steps: Steps, graphs: SpanGraphs | None, new: int) -> tuple[float, torch.Tensor]:
    """Median seconds of the later half of ``new`` steps, and the last one's logits in fp32."""
    times = []
    for _ in range(new):
        synchronize(steps.world.device)
        began = time.perf_counter()
        logits = steps.run(graphs)
        synchronize(steps.world.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[new // 2 :]), logits.float()


if __name__ == "__main__":
    section({"spans": spans})
