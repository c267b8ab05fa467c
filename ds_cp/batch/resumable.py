"""The lines of a batch in the journal: one that was in the middle when the batch ended goes on from
there when the same batch is run again."""

from __future__ import annotations

import hashlib
import os

from ds_cp.batch.format import BatchRequest
from ds_cp.journal.journal import Journal

_GROUP = "batch:"  # of the names, before a digest


class ResumableLines:
    """Names for the lines of a batch whose answers go to ``target``: the same line of the same
    batch has the same name again."""

    def __init__(self, journal: Journal, target: str) -> None:
        self._journal = journal
        self._target = os.path.realpath(target).encode("utf-8", "surrogateescape")

    def name(self, request: BatchRequest) -> str:
        """Its name in the journal."""
        digest = hashlib.sha256()
        for part in (self._target, request.custom_id.encode(), request.url.encode(), request.body):
            digest.update(len(part).to_bytes(8, "little") + part)
        return _GROUP + digest.hexdigest()

    def done(self, request: BatchRequest) -> None:
        """The answer of a line is written: nothing of it is needed any more."""
        self._journal.submit(self._journal.requests.forget(self.name(request)))
