"""A journal, from the look into its directory to the last word written."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence

from ds_cp.config import Config
from ds_cp.errors import LaunchError
from ds_cp.journal.file import Change, JournalFile, new_header, read_journal
from ds_cp.journal.format import Header, Kind, NotAJournalError
from ds_cp.journal.place import FIELD, Place
from ds_cp.journal.replay import Replay
from ds_cp.journal.requests import PREFIX, RequestJournal
from ds_cp.journal.responses import BACKGROUND, RESPONSE
from ds_cp.journal.stats import JournalStats
from ds_cp.journal.writer import Writer

KEEP_S = 30 * 86400.0  # seconds after which what nobody came back to is dropped
_EXPIRING = (PREFIX, RESPONSE)  # keys; what a conversation said lives as long as its responses
# Sections that do not decide tokens: where it listens, what is recorded, how ranks find each other.
_ELSEWHERE = {"schema_", "model", "server", "comm", "fault_tolerance", "trace"}


class Journal:
    """Locks a directory and reads what is there; ``start`` begins to write. ``requests``: those
    that are resumable; ``stored``: what is kept of stored responses, by key, the oldest first.

    Raises ``LaunchError`` for a directory that cannot be used, a journal that cannot be read, and
    one of another config.
    """

    def __init__(self, path: str, config: Config) -> None:
        self._max = config.fault_tolerance.journal_max_bytes
        self._config = config_digest(config)
        self._writer: Writer | None = None
        self._lock = threading.Lock()  # guards these two
        self._early: list[Sequence[Change]] = []  # submitted before ``start``
        self._stored = 0  # responses
        self._place = Place(path)
        try:
            self._found = self._read()
        except BaseException:
            self._place.close()
            raise
        entries = {} if self._found is None else self._found.entries
        least = time.time() - KEEP_S
        old = {k for k, e in entries.items() if e.at < least and k.startswith(_EXPIRING)}
        self._early += [[Change(Kind.DROP, key)] for key in old]
        kept = {key: entry.data for key, entry in entries.items() if key not in old}
        requests = {key: data for key, data in kept.items() if key.startswith(PREFIX)}
        self.requests = RequestJournal(self.submit, requests)
        self.stored = {key: data for key, data in kept.items() if key not in requests}
        self._stored = sum(key.startswith(RESPONSE) for key in self.stored)
        for entry in entries.values():
            entry.data = []  # these have it now

    def start(self, fingerprint: tuple[str, ...]) -> list[str]:
        """Begin to write, for the model of which ``fingerprint`` has the parts' digests, the
        tokenizer's last. Returns lines for the operator. Raises ``LaunchError`` for a journal of
        another model, and where it cannot be written."""
        *model, tokenizer = fingerprint or ("", "")
        header = new_header(self._config, tuple(model), tokenizer)
        if self._found is not None:
            self._check_model(self._found.header, header)
            header = self._found.header
        try:
            file = JournalFile(self._place, self._found, header)
        except OSError as err:
            raise self._place.cannot(err, "cannot be written") from None
        with self._lock:
            self._writer = Writer(file, self._max)
            for changes in self._early:
                self._writer.submit(changes)
            self._early = []
        return self._lines(file)

    def submit(self, changes: Sequence[Change]) -> None:
        """Have changes written; see ``Writer``."""
        with self._lock:
            if self._writer is None:
                self._early.append(changes)
            elif changes:
                self._writer.submit(changes)

    def when_synced(self, callback: Callable[[bool], None]) -> None:
        """See ``Writer``."""
        if self._writer is None:
            callback(False)
        else:
            self._writer.when_synced(callback)

    def resumed(self, count: int) -> None:
        """Count requests that go on."""
        if self._writer is not None:
            self._writer.resumed(count)

    def stats(self) -> JournalStats:
        """A snapshot for /metrics."""
        return JournalStats() if self._writer is None else self._writer.stats()

    def close(self) -> None:
        """Write what is left, and give the directory back."""
        self.requests.flush()
        if self._writer is not None:
            self._writer.close()
        self._place.close()

    def _read(self) -> Replay | None:
        try:
            found = read_journal(self._place)
        except NotAJournalError as err:
            raise LaunchError(
                f"{self._place.file} {err}; move it away (nothing of it is resumed then), or name "
                f"another {FIELD}"
            ) from None
        except OSError as err:
            raise self._place.cannot(err, "cannot be read") from None
        if found is not None and found.header.config != self._config:
            raise self._of_another("config (sections other than server, comm, trace)")
        return found

    def _check_model(self, theirs: Header, ours: Header) -> None:
        if theirs.model != ours.model:
            raise self._of_another("model")
        if theirs.tokenizer != ours.tokenizer:
            raise self._of_another("tokenizer")

    def _of_another(self, what: str) -> LaunchError:
        return LaunchError(
            f"{self._place.file} is the journal of another {what}, whose requests cannot go on "
            f"here; start with that one, name another {FIELD}, or move the file away"
        )

    def _lines(self, file: JournalFile) -> list[str]:
        groups = self.requests.groups
        running = sum(group.startswith(BACKGROUND) for group in groups)
        lines = [
            f"journal: {self._place.file} ({file.size} bytes): {self._stored} stored responses, "
            f"{running} of them go on, {len(groups) - running} lines of batches in the middle"
        ]
        if self._found is not None:
            lines += [f"journal: {note}" for note in self._found.notes()]
            self._found = None
        return lines


def config_digest(config: Config) -> str:
    """A digest of what decides which tokens a request gets."""
    values = config.model_dump(mode="json", exclude=_ELSEWHERE)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def open_journal(config: Config) -> Journal | None:
    """The journal that the config asks for, if it does."""
    path = config.fault_tolerance.journal_dir
    return None if path is None else Journal(path, config)
