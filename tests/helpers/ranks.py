"""Run a function on n gloo ranks on this machine, with a deadline and the child's traceback."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from ds_cp.comm.wire import Rendezvous, World, join

# Where the tensors of multi-rank tests are: DS_CP_TEST_DEVICE=cuda has them on one GPU, which all
# ranks share.
TEST_DEVICE = os.environ.get("DS_CP_TEST_DEVICE", "cpu")


class RankError(AssertionError):
    """A rank raised, died or did not end in time; the message holds its traceback."""


def run_ranks(
    fn: Callable[..., Any],
    size: int,
    *args: Any,
    hosts: Sequence[str] | None = None,
    timeout: float = 120.0,
    comm_timeout: float = 60.0,
    shared_memory: bool = True,
    device: str = "",
) -> list[Any]:
    """Call ``fn(world, *args)`` on ``size`` ranks and return their results, rank 0 first.

    ``fn`` and ``args`` must be importable and picklable (the children come from a fork server that
    has torch loaded already; for a GPU they start anew, since deepspeed asks CUDA what there is
    when it is loaded, and CUDA does not outlive a fork). ``hosts`` fakes a host name per rank;
    ``shared_memory``: between ranks of one of these. ``device``: "cpu", "cuda" (all ranks share the
    first GPU), "cuda:each" (rank r has GPU r); by default the one of ``TEST_DEVICE``.
    """
    device = device or TEST_DEVICE
    context: Any = mp.get_context("spawn" if device.startswith("cuda") else "forkserver")
    if device == "cpu":
        context.set_forkserver_preload(["tests.helpers.preloaded"])
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    hosts = list(hosts) if hosts else ["localhost"] * size
    children, pipes = [], []
    try:
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            bound = listener if rank == 0 else None
            settings = {
                "timeout_s": comm_timeout, "shared_memory": shared_memory, "device": device
            }  # fmt: skip
            child = context.Process(
                target=_child, args=(fn, rank, size, port, bound, hosts, settings, theirs, args)
            )
            child.start()
            theirs.close()
            children.append(child)
            pipes.append(mine)
        return _gather(pipes, timeout)
    finally:
        listener.close()
        for child in children:
            child.join(5)
            if child.is_alive():
                child.kill()
                child.join()


def run_ranks_briefly(
    fn: Callable[..., Any], size: int, limit: float, *args: Any, **settings: Any
) -> tuple[float, list[Any]]:
    """``run_ranks`` of ``fn(world, limit, *args)``, where ranks wait ``limit`` seconds for each
    other, which their start has to fit in: on a machine that is too busy for it, again with four
    times as long, twice. The limit that was kept, and the results."""
    for more in (1, 4, 16):
        try:
            limit_s = limit * more
            return limit_s, run_ranks(
                fn, size, limit_s, *args, timeout=120.0 * more, comm_timeout=limit_s, **settings
            )
        except RankError as err:
            if more == 16 or "CommError" not in str(err):
                raise
    raise AssertionError


def _gather(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    open_pipes = {id(pipe): (rank, pipe) for rank, pipe in enumerate(pipes)}
    while open_pipes:
        left = deadline - time.monotonic()
        if failures:
            left = min(left, 2.0)  # the others usually fail with it; the first cause is what counts
        ready = wait([pipe for _, pipe in open_pipes.values()], max(left, 0))
        if not ready:
            if not failures:
                silent = sorted(rank for rank, _ in open_pipes.values())
                raise RankError(f"ranks {silent} did not end within {timeout:g} s")
            break
        for pipe in ready:
            rank, _ = open_pipes.pop(id(pipe))
            try:
                good, value = pipe.recv()
            except EOFError:
                good, value = False, "died without a word"
            (results if good else failures)[rank] = value
    if failures:
        raise RankError("\n".join(f"--- rank {r}:\n{text}" for r, text in sorted(failures.items())))
    return [results[rank] for rank in sorted(results)]


def _child(
    fn: Callable[..., Any],
    rank: int,
    size: int,
    port: int,
    listener: socket.socket | None,
    hosts: Sequence[str],
    settings: dict[str, Any],
    pipe: Connection,
    args: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    code = 0
    name = settings["device"]
    if name.startswith("cuda"):
        device = torch.device("cuda", rank if name == "cuda:each" else 0)
        torch.cuda.set_device(device)
    else:
        device = torch.device(name)
    try:
        world = join(
            rank,
            size,
            Rendezvous("127.0.0.1", port, listener.fileno() if listener else None),
            host=hosts[rank],
            hosts=hosts,
            threads=1,
            **{**settings, "device": device},
        )
        pipe.send((True, fn(world, *args)))
        world.leave()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        code = 1
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def world_group(world: World, name: str = "cp") -> Any:
    """One group of all ranks."""
    return world.group(name, [list(range(world.size))])
