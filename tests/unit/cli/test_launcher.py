"""Our own launcher: every rank gets its place, and none outlives the job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_cp.api.transport import server
from ds_cp.cli import launcher, serve
from ds_cp.log_stream import LAST_WORDS_S
from ds_cp.process import SAME_S
from ds_cp.serve import supervisor, worker_child

ROOT = Path(__file__).resolve().parents[3]
# On a busy machine: for what must come, and for processes that are killed to be gone.
PATIENCE_S, GONE_S = 60.0, 30.0
LAUNCH = """
import sys
from ds_cp.cli.launcher import spawn
command = [sys.executable, "-c", sys.argv[3]]
sys.exit(spawn(command, int(sys.argv[1]), {}, grace_s=float(sys.argv[2])))
"""
# A rank that writes its pid, and that of a child, to a folder and then waits.
WAIT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(f"{FOLDER}/tmp{os.environ['RANK']}", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(f"{FOLDER}/tmp{os.environ['RANK']}", f"{FOLDER}/rank{os.environ['RANK']}")
"""


def start(ranks: int, code: str, grace_s: float = 5.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(ranks), str(grace_s), textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(ranks: int, code: str, limit_s: float = 120.0) -> tuple[int, str, str]:
    process = start(ranks, code)
    out, err = process.communicate(timeout=limit_s)
    return process.returncode, out, err


def pids_in(folder: Path, ranks: int) -> list[int]:
    """Pids of all ranks and their children, once all are there."""
    deadline = time.monotonic() + PATIENCE_S
    while len(files := list(folder.glob("rank*"))) < ranks:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.02)
    return [int(pid) for file in files for pid in file.read_text().split()]


def all_gone(pids: list[int], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def waiting(folder: Path, then: str = "time.sleep(600)") -> str:
    return f"FOLDER = {str(folder)!r}\n" + WAIT + then


def test_every_rank_has_its_place() -> None:
    code = """
        import os
        names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT DS_CP_LAUNCHER"
        os.write(1, (" ".join(os.environ[n] for n in names.split()) + "\\n").encode())
    """
    rc, out, err = run(3, code)
    assert (rc, err) == (0, "")
    rows = sorted(line.split() for line in out.splitlines())
    assert [row[:4] for row in rows] == [[str(r), str(r), "3", "3"] for r in range(3)]
    assert {tuple(row[4:]) for row in rows} == {("127.0.0.1", rows[0][5], "ds-cp")}
    assert 1024 <= int(rows[0][5]) <= 65535


def test_failing_rank_ends_the_rest_with_its_code(tmp_path: Path) -> None:
    then = f"""
import glob
while len(glob.glob("{tmp_path}/rank*")) < 3: time.sleep(0.02)
if os.environ["RANK"] == "1": sys.exit(2)
time.sleep(600)
"""
    rc, _, err = run(3, waiting(tmp_path, then))  # others would be there for 600 s
    assert (rc, err) == (2, "")  # rank 0 tells the cause of a user's error
    assert all_gone(pids_in(tmp_path, 3), GONE_S)


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("os.kill(os.getpid(), 9)", 137, "rank 1 was ended by SIGKILL (out of memory?)"),
        ("os.kill(os.getpid(), 11)", 139, "rank 1 was ended by SIGSEGV"),
        ("os._exit(1)", 1, "rank 1 failed"),
    ],
)
def test_how_a_rank_died_is_reported(end: str, code: int, message: str) -> None:
    source = f"import os, time\nif os.environ['RANK'] == '1': {end}\ntime.sleep(600)"
    rc, _, err = run(2, source)
    assert rc == code
    assert err == f"ds_cp: error: {message}; the job was ended\n"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
)
def test_signal_ends_every_process(tmp_path: Path, number: int, code: int) -> None:
    process = start(3, waiting(tmp_path))
    pids = pids_in(tmp_path, 3)
    assert len(pids) == 6
    process.send_signal(number)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code
    assert all_gone(pids, GONE_S)


def test_ranks_may_end_well_on_sigterm(tmp_path: Path) -> None:
    polite = "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(0))\n"
    process = start(2, polite + waiting(tmp_path))
    pids = pids_in(tmp_path, 2)
    process.terminate()
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert all_gone(pids, GONE_S)


DEAF = "import signal, sys\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"


def test_deaf_ranks_are_killed_after_the_grace(tmp_path: Path) -> None:
    process = start(2, DEAF + waiting(tmp_path), grace_s=0.5)
    pids = pids_in(tmp_path, 2)
    process.terminate()
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 137
    assert all_gone(pids, GONE_S)


def test_a_rank_that_gets_on_has_more_than_the_grace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As long as it does, and no longer; a second signal ends that."""
    asked = 0

    def works() -> bool:
        nonlocal asked
        asked += 1
        if asked == 3 and hurried:
            os.kill(os.getpid(), signal.SIGINT)
        return asked < 10 or hurried

    def stop() -> None:
        pids_in(tmp_path, 1)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(launcher, "HURRY_GRACE_S", 0.1)
    monkeypatch.setattr("ds_cp.process.SAME_S", 0.0)
    command = [sys.executable, "-c", textwrap.dedent(DEAF + waiting(tmp_path))]
    for hurried in (False, True):
        asked = 0
        for file in tmp_path.glob("rank*"):
            file.unlink()
        threading.Thread(target=stop).start()
        assert launcher.spawn(command, 1, {**os.environ}, grace_s=0.1, works=works) == 130
        assert asked == (3 if hurried else 10)


def test_second_signal_hurries_and_a_third_kills(tmp_path: Path) -> None:
    process = start(2, DEAF + waiting(tmp_path), grace_s=60)
    pids = pids_in(tmp_path, 2)
    for _ in range(2):  # ranks get seconds to tell their clients
        for _ in range(3):  # within a moment: one signal, as the supervisors count too
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        time.sleep(2 * SAME_S)  # from when the launcher took the last one
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert all_gone(pids, GONE_S)


def test_second_sigterm_reaches_ranks_as_what_hurries_them(tmp_path: Path) -> None:
    hurried = "import signal, sys\nsignal.signal(15, signal.SIG_IGN)\n"
    hurried += "signal.signal(2, lambda *_: sys.exit(0))\n"
    process = start(2, hurried + waiting(tmp_path), grace_s=60)
    pids = pids_in(tmp_path, 2)
    process.terminate()
    time.sleep(0.3)
    process.terminate()  # the same one
    time.sleep(2 * SAME_S)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert all_gone(pids, GONE_S)


def test_the_grace_is_longer_than_what_a_rank_waits_for() -> None:
    """From its clients' end to its last words; without a process that stands still."""
    rest = 2 * supervisor.LEAVE_S + supervisor.TOLD_S + worker_child.WAIT_S + LAST_WORDS_S
    assert server._AFTER_HURRY_S + server._PAUSE_S + rest < launcher.HURRY_GRACE_S
    assert server._AFTER_CANCEL_S + server._PAUSE_S + rest < serve.STOP_S


def test_killed_launcher_leaves_no_rank(tmp_path: Path) -> None:
    process = start(2, DEAF + waiting(tmp_path))
    pids = pids_in(tmp_path, 2)
    ranks, children = pids[::2], pids[1::2]
    process.kill()
    process.wait(PATIENCE_S)
    try:
        assert all_gone(ranks, GONE_S)
    finally:
        # No process is left to end these; the real ranks' children watch their parent.
        for pid in children:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_command_that_cannot_start() -> None:
    code = "from ds_cp.cli.launcher import spawn; spawn(['/nonexistent'], 2, {}, grace_s=1)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert "LaunchError: cannot start rank 0 of 2: No such file or directory" in done.stderr


def test_a_rank_that_was_not_back_yet_is_no_failure_of_a_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is killed once, started again, and knows no way to end well when the job ends."""
    code = f"""
import os, signal, time
rank, folder = os.environ["RANK"], {str(tmp_path)!r}
first = not os.path.exists(f"{{folder}}/{{rank}}")
open(f"{{folder}}/{{rank}}", "a").close()
if rank == "1" and first: os.kill(os.getpid(), 9)
if rank == "1": open(f"{{folder}}/again", "w").close()
if rank == "0": signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
open(f"{{folder}}/up{{rank}}", "w").close()
time.sleep(60)
"""

    def stop() -> None:
        if all((tmp_path / name).exists() for name in ("again", "up0")) and not stopped:
            stopped.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    stopped: list[bool] = []
    step = launcher._Ranks.step
    monkeypatch.setattr(launcher._Ranks, "step", lambda self: (stop(), step(self))[1])
    command = [sys.executable, "-c", code]
    assert launcher.spawn(command, 2, {**os.environ}, grace_s=20.0, min_ranks=1) == 0


def test_a_killed_rank_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 2 is killed each time, then left alone; the others go on, up to rank 0's end."""
    code = f"""
import os, time
rank, folder = os.environ["RANK"], {str(tmp_path)!r}
with open(f"{{folder}}/{{rank}}", "a") as file: file.write("!")
if rank == "2": os.kill(os.getpid(), 9)
until = lambda what: os.path.exists(f"{{folder}}/{{what}}")
while not until("end"): time.sleep(0.01)
"""
    command = [sys.executable, "-c", code]

    def end() -> bool:
        tries = tmp_path / "2"
        if tries.exists() and len(tries.read_text()) == 1 + launcher.RETRIES:
            (tmp_path / "end").touch()
        return False

    step = launcher._Ranks.step
    monkeypatch.setattr(launcher._Ranks, "step", lambda self: (end(), step(self))[1])
    assert launcher.spawn(command, 3, {**os.environ}, grace_s=5.0, min_ranks=2) == 0
    assert [len((tmp_path / str(rank)).read_text()) for rank in range(3)] == [1, 1, 4]
    said = capsys.readouterr().err
    assert said.count("rank 2 was ended by SIGKILL (out of memory?); it is started again") == 3
    assert "3 times in a row; it is not started again" in said or not said.count("in a row")


@pytest.mark.parametrize(("rank", "code", "least"), [(0, -9, 1), (1, 2, 1), (1, -9, 3)])
def test_what_ends_the_job_all_the_same(rank: int, code: int, least: int) -> None:
    """Rank 0, a rank that says why it leaves, too few that are left."""
    end = f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"
    text = f"import os, sys, time\nif os.environ['RANK'] == '{rank}': {end}\ntime.sleep(600)"
    command = [sys.executable, "-c", text]
    found = launcher.spawn(command, 3, {**os.environ}, grace_s=5.0, min_ranks=least)
    assert found == (128 - code if code < 0 else code)


def test_ranks_that_fail_in_the_same_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """All have ended by the time that the launcher looks; the first failure is the job's."""
    whole, ranks, over = launcher._has_ended, dict[int, Any](), False

    def has_ended(process: Any) -> bool:
        nonlocal over
        ranks[process.pid] = process
        over = over or (len(ranks) == 4 and all(map(whole, ranks.values())))
        return over and whole(process)

    monkeypatch.setattr(launcher, "_has_ended", has_ended)
    command = [sys.executable, "-c", "import os, sys; sys.exit(3 - int(os.environ['RANK']))"]
    assert launcher.spawn(command, 4, {}, grace_s=5.0) == 3
