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
from functools import partial
from typing import Any, NoReturn

from ds_cp.errors import CommError, DsCpError, OutputError
from ds_cp.log_stream import say, take_over, write_json_lines
from ds_cp.process import die_with_parent, importing, leave_process, settle_heap
from ds_cp.serve.channel import Channel, Failed, Ready, Take, WorkerSpec


def main(argv: list[str]) -> NoReturn:
    """Run until the stop plan, and exit the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    take_over("stdout", "stderr")
    channel = Channel(socket.socket(fileno=int(argv[0])))
    try:
        spec: WorkerSpec = channel.receive(WorkerSpec)
        die_with_parent(spec.supervisor_pid)()
        tempfile.tempdir = spec.folder
        if spec.config["server"]["log_format"] == "json":
            write_json_lines()
        _work(channel, spec)
    except DsCpError as err:
        _report(channel, Failed(err.exit_code, str(err), not isinstance(err, CommError)))
        if err.__cause__ is not None and not isinstance(err.__cause__, DsCpError):
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
        from ds_cp.startup.alone import build_alone, prepare
        from ds_cp.startup.build import build_worker
        from ds_cp.startup.join import join_job
        from ds_cp.startup.report import summary

    config = Config.model_validate_json(_json(spec.config))
    fields: dict[str, Any] = dict(spec.job)
    if fields["hosts"] is not None:
        fields["hosts"] = tuple(fields["hosts"])
    listener = socket.socket(fileno=spec.listen_fd) if spec.listen_fd >= 0 else None
    job = Job(**fields, store_socket=listener)
    orders = None
    if spec.orders_fd >= 0:
        orders = Orders(socket.socket(fileno=spec.orders_fd), partial(end_deaf, job.rank))
    if spec.waits:
        assert orders is not None
        prepare(config)
        take: Take = channel.receive(Take)
        worker, facts = build_alone(job, config, take.facts), take.facts
        life = WorkerLife(channel, orders, job, config, facts, worker)
        orders.tell(Loaded())
        life.meet()
    else:
        world, threads = join_job(job, config)
        worker, facts = build_worker(world, config, None, threads)
        life = WorkerLife(channel, orders, job, config, facts, worker)
        life.begin()
    try:
        settle_heap()
        if not spec.waits:
            with worker.failing():
                channel.send(Ready(facts, tuple(summary(config, facts))))
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
