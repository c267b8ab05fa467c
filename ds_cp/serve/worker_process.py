"""The compute worker of one rank, child of that rank's supervisor.

``python -m ds_cp.serve.worker_process FD``.

It receives its config over the inherited socket and ignores signals, which are the supervisor's. It
ends after the stop plan, when its peers are gone, or with its supervisor.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from ds_cp.errors import CommError, DsCpError, OutputError
from ds_cp.log_stream import say, take_over, write_json_lines
from ds_cp.process import die_with_parent, importing, leave_process, settle_heap
from ds_cp.serve.channel import Channel, Failed, Ready, Take, WorkerSpec
from ds_cp.startup.resources import choose_threads

if TYPE_CHECKING:
    from ds_cp.config import Config
    from ds_cp.serve.worker_life import WorkerLife
    from ds_cp.startup.preload import Preloaded
    from ds_cp.topology.job import Job
    from ds_cp.worker.worker import Worker


def main(argv: list[str]) -> NoReturn:
    """Run until the stop plan, and exit the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    take_over("stdout", "stderr")
    channel = Channel(socket.socket(fileno=int(argv[0])))

    def work() -> None:
        spec: WorkerSpec = channel.receive(WorkerSpec)
        die_with_parent(spec.supervisor_pid)()
        tempfile.tempdir = spec.folder
        if spec.config["server"]["log_format"] == "json":
            write_json_lines()
        _work(channel, spec)

    _run(channel, work)


def _run(channel: Channel, work: Callable[[], None]) -> NoReturn:
    """Do ``work``, say how it failed if it does, and exit the process."""
    try:
        work()
    except DsCpError as err:
        is_lost_peer = isinstance(err, CommError)  # whose message has the library's words
        _report(channel, Failed(err.exit_code, str(err), not is_lost_peer))
        if not (is_lost_peer or err.__cause__ is None or isinstance(err.__cause__, DsCpError)):
            traceback.print_exception(err.__cause__)  # raised on this rank
        leave_process(err.exit_code)
    except BaseException as err:
        message = f"{type(err).__name__}: {err} (this is a fault of ds_cp)"
        _report(channel, Failed(1, message))
        traceback.print_exc()
        leave_process(1)
    leave_process(0)


def _work(channel: Channel, spec: WorkerSpec) -> None:
    from ds_cp.config import Config
    from ds_cp.serve.orders import Loaded, Orders
    from ds_cp.serve.worker_life import WorkerLife, end_deaf
    from ds_cp.topology.job import Job

    with importing(for_good=True):
        from ds_cp.startup.alone import as_agreed, build_alone, prepare
        from ds_cp.startup.build import build_worker
        from ds_cp.startup.join import choose_device, join_job
        from ds_cp.startup.preload import Preloaded
        from ds_cp.startup.report import summary

    config = Config.model_validate_json(_json(spec.config))
    fields: dict[str, Any] = dict(spec.job)
    if fields["hosts"] is not None:
        fields["hosts"] = tuple(fields["hosts"])
    job = Job(**fields)
    take = None
    if spec.waits:
        prepare(config)
        take = channel.receive(Take)
    preloaded = None
    if spec.forks_fd >= 0:
        sock = socket.socket(fileno=spec.forks_fd)
        if choose_device(config, job.local_rank).type == "cpu":
            with importing(for_good=True):
                prepare(config)
            agreed = as_agreed(config, take.facts, job.rank) if take is not None else config
            preloaded = Preloaded(agreed, job, choose_threads(config, job.local_world_size or 1))
            _leave_server(sock, spec, config, job, preloaded)
        sock.close()
    listener = socket.socket(fileno=spec.listen_fd) if spec.listen_fd >= 0 else None
    job = replace(job, store_socket=listener)
    orders = None
    if spec.orders_fd >= 0:
        orders = Orders(socket.socket(fileno=spec.orders_fd), partial(end_deaf, job.rank))
    if take is not None:
        assert orders is not None
        worker, facts = build_alone(job, config, take.facts, preloaded), take.facts
        life = WorkerLife(channel, orders, job, config, facts, worker)
        orders.tell(Loaded())
        life.meet()
    else:
        world, threads = join_job(job, config)
        worker, facts = build_worker(world, config, preloaded, threads)
        life = WorkerLife(channel, orders, job, config, facts, worker)
        life.begin()
    settle_heap()
    if take is None:
        with worker.failing():
            channel.send(Ready(facts, tuple(summary(config, facts))))
    _live(life, worker)


def _leave_server(
    sock: socket.socket, spec: WorkerSpec, config: Config, job: Job, preloaded: Preloaded
) -> None:
    """Fork the server of this rank, which has its supervisor at the other end of ``sock``."""
    from ds_cp.serve.fork_server import ForkServer, Seated
    from ds_cp.serve.orders import Loaded, Orders
    from ds_cp.serve.worker_life import WorkerLife, end_deaf

    def begin(seated: Seated) -> NoReturn:
        channel = Channel(seated.channel)

        def work() -> None:
            tempfile.tempdir = seated.folder
            orders = Orders(seated.orders, partial(end_deaf, job.rank))
            worker = seated.worker
            life = WorkerLife(channel, orders, seated.job, config, seated.facts, worker)
            orders.tell(Loaded())
            life.meet()
            _live(life, worker)

        _run(channel, work)

    server = ForkServer(sock, spec.supervisor_pid, config, job, begin)
    mine = [int(sys.argv[1]), spec.orders_fd, spec.listen_fd]
    server.leave_behind(preloaded, [fd for fd in mine if fd >= 0])


def _live(life: WorkerLife, worker: Worker) -> None:
    """Up to the end of the job."""
    try:
        life.run()
    except BaseException:
        worker.give_up_trace()
        raise
    try:
        worker.leave()
    except OutputError as err:
        say(f"error: {err}")
        raise


def _json(config: dict[str, Any]) -> str:
    import json

    return json.dumps(config)


def _report(channel: Channel, failed: Failed) -> None:
    """Tell the supervisor, if it lives."""
    with contextlib.suppress(DsCpError):
        channel.send(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
