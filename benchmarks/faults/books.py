"""What a server holds, before and after."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.load import gauge
from tests.helpers.jobs import Job

SHARED = Path("/dev/shm")


def books(job: Job, url: str) -> dict[str, Any]:
    """What is the same whenever no request runs: processes, descriptors of supervisors, used
    blocks, files in shared memory."""
    processes = job.processes()
    names = Counter(
        "worker" if "worker_process" in " ".join(p.cmdline()) else "other" for p in processes
    )
    supervisors = {worker.ppid() for worker in job.matching("serve.worker_process")}
    return {
        "processes": dict(names),
        "descriptors": sum(psutil.Process(pid).num_fds() for pid in supervisors),
        "used_blocks": gauge(url, "ds_cp:kv_blocks", 'state="used"'),
        "shared_files": shared_files(),
    }


def shared_files() -> int:
    """Of this user, of any job."""
    return sum(entry.stat().st_uid == os.getuid() for entry in os.scandir(SHARED))
