"""The directory of a journal: ours alone, one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from ds_cp.errors import LaunchError

FIELD = "fault_tolerance.journal_dir"
NAME, FRESH, LOCK = "journal", "journal.new", "lock"


class Place:
    """A directory that nobody else can read, locked up to ``close`` or the end of this process.

    Raises ``LaunchError`` where it cannot be made, is open to others, or another server has it.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser().absolute()
        self.fd = -1
        self._lock = -1
        try:
            if not self.path.exists():
                self.path.mkdir(mode=0o700)
            self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._check_private()
            self._take()
            self._probe()
        except OSError as err:
            self.close()
            raise self.cannot(err) from None
        except BaseException:
            self.close()
            raise

    @property
    def file(self) -> Path:
        """Where the journal is."""
        return self.path / NAME

    def cannot(self, err: OSError, what: str = "cannot be used") -> LaunchError:
        """The error of a directory that the system refuses."""
        way_out = {
            errno.ENOSPC: "make room, or name a directory on another disk",
            errno.ENOENT: "make the folder that it is to be in",
        }.get(err.errno or 0, "name a directory that this user may write to, on a local disk")
        return LaunchError(f"{FIELD} {self.path} {what}: {err.strerror or err}; {way_out}")

    def open(self, name: str, flags: int) -> int:
        """A descriptor of a file in it, 0600 if it is made; never through a link."""
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(name, flags, 0o600, dir_fd=self.fd)
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_mode & 0o077 or facts.st_uid != os.geteuid():
            os.close(fd)
            raise LaunchError(
                f"{self.path / name} must be a file of this user that nobody else may read: it may "
                f"hold what users wrote; chmod 600 it, or remove it"
            )
        return fd

    def sync(self) -> None:
        """Have names that were made or replaced survive a power cut."""
        os.fsync(self.fd)

    def close(self) -> None:
        """Give the lock back."""
        for fd in (self._lock, self.fd):
            if fd >= 0:
                os.close(fd)
        self._lock = self.fd = -1

    def _check_private(self) -> None:
        facts = os.fstat(self.fd)
        if facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise LaunchError(
                f"{FIELD} {self.path} is open to others (owner {facts.st_uid}, mode "
                f"{stat.S_IMODE(facts.st_mode):o}): what users wrote will be in it; chmod 700 it, "
                "or name a directory of this user's own"
            )

    def _take(self) -> None:
        self._lock = self.open(LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            if err.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise LaunchError(
                f"{FIELD} {self.path} is in use by another ds-cp; end that one, or name another "
                "directory"
            ) from None

    def _probe(self) -> None:
        """Write and sync a file: what fails here fails before anybody relies on it."""
        fd = self.open(FRESH, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            os.write(fd, b"\0" * 4096)
            os.fsync(fd)
        finally:
            os.close(fd)
            os.unlink(FRESH, dir_fd=self.fd)
        self.sync()
