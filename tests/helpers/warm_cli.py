"""``ds-cp`` from a process that has torch and transformers loaded: each command runs in a fork of
it, so that it costs what it does and not what it imports.

``python -m tests.helpers.warm_cli`` reads commands as JSON lines (argv, env, out, err) and answers
each with its exit code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers.jobs import END_S, MARK, ROOT, busy, clean_environment, marked


@dataclass(frozen=True)
class Ended:
    """What a command left: its words, and the processes that it started and that go on."""

    argv: Sequence[str]
    code: int
    out: str
    err: str
    left: list[psutil.Process]

    def story(self) -> str:
        """For the message of a failed check."""
        said = f"exit code {self.code}\n{self.out}\n{self.err}\n{self.left}"
        return f"\n$ ds-cp {' '.join(self.argv)}\n{said}"


class WarmCli:
    """``run`` one command after another."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self._process = process
        self._folder = folder

    def run(self, argv: Sequence[str], env: Mapping[str, str]) -> Ended:
        """``ds-cp`` with these arguments, and ``env`` beside the environment of a user."""
        out, err = self._folder / "out", self._folder / "err"
        mark = uuid.uuid4().hex
        marks = {**env, MARK: mark}
        command = {"argv": list(argv), "env": marks, "out": str(out), "err": str(err)}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())  # the test's own limit ends a wait in vain
        end = time.monotonic() + END_S * busy()
        while (left := marked(mark)) and time.monotonic() < end:
            time.sleep(0.05)
        said = [file.read_text(errors="replace") for file in (out, err)]
        return Ended(argv, code, said[0], said[1], left)


@contextmanager
def warm_cli(folder: Path) -> Iterator[WarmCli]:
    """Start the process, which ends with the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.warm_cli"],
        cwd=ROOT,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            yield WarmCli(process, folder)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(30)
            finally:
                process.kill()


def serve() -> None:
    """Run the commands of stdin."""
    from ds_cp.process import importing

    with importing(for_good=True):
        import transformers.models.llama.modeling_llama  # noqa: F401

        import ds_cp.engine.llm  # noqa: F401
        from ds_cp.cli.main import run

    for line in sys.stdin:
        command = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.environ.update(command["env"])
            streams = (os.devnull, os.O_RDONLY), *((command[x], _NEW) for x in ("out", "err"))
            for target, (path, flags) in enumerate(streams):
                os.dup2(os.open(path, flags, 0o600), target)
            sys.argv = ["ds-cp", *command["argv"]]
            run(command["argv"])
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC

if __name__ == "__main__":
    serve()
