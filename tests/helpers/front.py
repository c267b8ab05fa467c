"""The HTTP front in a process of its own over the fake engine, so that a test can attack it and
measure it: its memory, its descriptors, the gaps of honest streams beside the attack.

``python -m tests.helpers.front SETTINGS`` serves, drains after SIGTERM and hurries after a second
one. SETTINGS is a JSON object of the config's ``server`` section, and under "engine" attributes of
the fake engine (``delay_s``, ...), its ``max_model_len``, its ``chat_template`` and the seconds
that this may compute, ``template_cpu_s``. It prints the port.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Front:
    """A front under attack. ``log`` collects its stderr."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def memory(self) -> int:
        """Resident bytes of the front and of the processes it started; a page that several of them
        share is counted once."""
        ours = psutil.Process(self.process.pid)
        everyone = [ours, *ours.children(recursive=True)]
        total = 0
        for process in everyone:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # it has ended meanwhile
                total += process.memory_full_info().pss
        return total

    @property
    def descriptors(self) -> int:
        """Open descriptors."""
        return psutil.Process(self.process.pid).num_fds()


@contextmanager
def front(folder: Path, files: int | None = None, **settings: Any) -> Iterator[Front]:
    """Start a front and end it by SIGTERM. ``files``: its limit of open files, soft and hard."""

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    log = folder / "front.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.front", json.dumps(settings)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            preexec_fn=limit,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Front(process, int(line), log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError("the front did not end within 60 s of SIGTERM") from None
        finally:
            process.stdout.close()


def load(looks: int) -> float:
    """Processes that run or wait for a core, for each core: of others, while this one waits."""
    seen = []
    for _ in range(looks):
        time.sleep(0.05)
        running = Path("/proc/loadavg").read_text().split()[3].partition("/")[0]
        seen.append(int(running) - 1)  # this one, which reads
    return sum(seen) / len(seen) / (os.cpu_count() or 1)


@dataclass
class Honest:
    """What honest streams met: the longest time between two events of one stream, and until the
    first one, in seconds; the streams that ended well and those that did not. ``bound_s``: how long
    a gap may be, a second, and more where others have their share of the cores."""

    gap_s: float = 0.0
    bound_s: float = 1.0
    first_s: float = 0.0
    whole: int = 0
    lost: int = 0
    why: str = ""


@contextmanager
def honest_streams(url: str, streams: int) -> Iterator[Honest]:
    """Keep ``streams`` streams open, each followed by another, in a process of their own. What they
    met is in the result once the block has ended."""
    met = Honest()
    busy = load(5)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "helpers" / "honest.py"), url, str(streams)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == b"running\n"
        yield met
        process.stdin.close()
        for name, value in json.loads(process.stdout.read()).items():
            setattr(met, name, value)
        met.bound_s *= max(1.0, busy, load(5) if met.gap_s >= met.bound_s else 0.0)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def serve(settings: Mapping[str, Any]) -> None:
    """Serve until SIGTERM; the port is printed once connections are taken."""
    from ds_cp.api.app import create_app
    from ds_cp.api.transport.listen import bind
    from ds_cp.api.transport.server import serve_until
    from ds_cp.config import Server
    from ds_cp.templates.chat import ChatTemplate
    from tests.helpers.fake_engine import (
        CHAT_TEMPLATE,
        FakeEngine,
        make_tokenizer,
        template_processes,
    )

    values = {"port": 0, "drain_timeout_s": 1.0} | dict(settings)
    values.setdefault("allowed_hosts", ["x"])  # what requests written as bytes say
    knobs = dict(values.pop("engine", {}))
    template = knobs.pop("chat_template", CHAT_TEMPLATE)
    length = knobs.pop("max_model_len", 4096)
    engine = FakeEngine(make_tokenizer(template), length)
    engine.info = replace(engine.info, kv_capacity_tokens=2 * length, largest_request_tokens=length)
    engine.open_tokens = 100  # as many as an honest stream that sets max_tokens has
    if cpu_s := knobs.pop("template_cpu_s", None):
        engine.chat_template = ChatTemplate(engine.tokenizer, template_processes(), cpu_s)
    for name, value in knobs.items():
        setattr(engine, name, value)
    server = Server(**values)
    listeners = bind(server.host, server.port)

    async def main() -> None:
        stop, hurry = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            (hurry if stop.is_set() else stop).set()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, on_signal)
        serving = asyncio.create_task(
            serve_until(create_app(engine, server), listeners, server, stop, hurry)
        )
        await asyncio.sleep(0.2)
        print(listeners[0].getsockname()[1], flush=True)
        await serving

    asyncio.run(main())
    if any(not thread.daemon for thread in threading.enumerate()[1:]):
        os._exit(0)  # a thread that works on must not hold up the test


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
