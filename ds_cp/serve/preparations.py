"""What a supervisor has at hand before its worker runs: the model's files watched, sockets for
HTTP, the tokenizer, a word on what launchers let others reach."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

from ds_cp.config import Config
from ds_cp.errors import ModelError
from ds_cp.journal.journal import Journal, open_journal
from ds_cp.log_stream import say
from ds_cp.model.source import ModelSource, find_model
from ds_cp.model.watch import FilesWatch, watch_model
from ds_cp.process import importing
from ds_cp.topology.job import Job
from ds_cp.topology.launcher_process import LauncherProcess


def watch_files(config: Config, job: Job) -> FilesWatch | None:
    """One process of each host looks after the model's files there."""
    if job.rank != 0 and job.local_rank != 0:
        return None
    try:
        return watch_model(find_model(config.model), lambda line: say(f"warning: {line}"))
    except ModelError:  # the worker says it
        return None


def bind_http(config: Config) -> list[socket.socket]:
    """The sockets of rank 0's HTTP server."""
    from ds_cp.api.transport.listen import bind

    return bind(config.server.host, config.server.port, say)


Front = tuple[ModelSource, list[socket.socket], Journal | None]


def open_front(config: Config) -> Front:
    """What rank 0 serves, where, and the journal. Raises ``ModelError``, ``LaunchError``."""
    source, listeners = find_model(config.model), bind_http(config)
    return source, listeners, open_journal(config)


def note_launchers(job: Job, launchers: Sequence[LauncherProcess]) -> None:
    """Say what a job on one host lets other machines reach all the same."""
    if not job.one_host:
        return
    for launcher in launchers:
        if addresses := launcher.open_addresses():
            open_to = f"{launcher} listens on {' and '.join(addresses)}"
            say(f"note: {open_to}, for other machines too; see SECURITY.md")


def load_tokenizer(source: ModelSource) -> Any:
    """Rank 0 alone imports it: the supervisors of other ranks go without torch."""
    with importing():
        from ds_cp.model.loading import load_tokenizer

    return load_tokenizer(source)
