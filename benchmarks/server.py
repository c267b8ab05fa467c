"""A real server for what speaks HTTP: a job of ``ds-cp serve`` that ends with the block."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.jobs import Job, command

QUICKSTART = Path("configs/quickstart.json")
END_S = 30.0  # seconds from SIGTERM to the last process, on a busy machine


@contextmanager
def serving(ranks: int = 1, **sections: Mapping[str, Any] | str | int) -> Iterator[tuple[str, Job]]:
    """Start the quick start's server with ``sections`` over its config; yields its address."""
    config = json.loads(QUICKSTART.read_text())
    del config["$schema"]
    for name, value in sections.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, Mapping) else value
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "config.json"
        file.write_text(json.dumps(config))
        args = ["--config", str(file), "--port", "0"]
        job = Job(command("ds-cp", "serve", ranks, args), folder)
        try:
            yield job.ready(), job
            job.process.send_signal(signal.SIGTERM)
            job.gone(END_S)
        finally:
            job.close()


def front_of(url: str) -> psutil.Process:
    """The process of this machine that listens where ``url`` says."""
    port = int(url.rsplit(":", 1)[1])
    for process in psutil.process_iter():
        try:
            listening = [c for c in process.net_connections("tcp") if c.status == "LISTEN"]
        except psutil.Error:
            continue
        if any(connection.laddr.port == port for connection in listening):
            return process
    raise RuntimeError(f"nothing on this machine listens at {url}")
