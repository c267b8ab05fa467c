"""The job's secret, by which its processes on several hosts know each other."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from ds_cp.errors import LaunchError

VARIABLE = "DS_CP_JOB_SECRET"
LEAST, MOST = 16, 4096  # bytes of a secret
_MAKE = "(umask 077; openssl rand -hex 32 > FILE)"


def find_secret(env: Mapping[str, str], file: str | None) -> bytes:
    """The secret from the environment, or else from ``file``; empty without either.

    Raises ``LaunchError`` for one that is too short to be one, or a file that others may read.
    """
    if env.get(VARIABLE):
        return _checked(env[VARIABLE].strip().encode(), VARIABLE)
    if file is None:
        return b""
    try:
        fd = os.open(Path(file).expanduser(), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise LaunchError(f"comm.secret_file {file} is not a file: make one, {_MAKE}")
            if found.st_mode & 0o077 or found.st_uid not in (os.geteuid(), 0):
                raise LaunchError(
                    f"comm.secret_file {file} has mode {stat.S_IMODE(found.st_mode):04o} and owner "
                    f"{found.st_uid}: others may know the secret; chmod 600 it, or make a new one, "
                    f"{_MAKE}"
                )
            return _checked(os.read(fd, MOST + 2).strip(), f"comm.secret_file {file}")
        finally:
            os.close(fd)
    except OSError as err:
        raise LaunchError(
            f"comm.secret_file {file} cannot be read ({err.strerror}): every host needs the same "
            f"file, {_MAKE}"
        ) from None


def _checked(secret: bytes, source: str) -> bytes:
    if not LEAST <= len(secret) <= MOST:
        raise LaunchError(
            f"{source} has {len(secret)} bytes; a secret has from {LEAST} to {MOST}: "
            "make one with openssl rand -hex 32"
        )
    return secret
