"""Says which request has ended workers."""

from __future__ import annotations

import hashlib
import logging

from ds_cp.scheduler.request import Request

logger = logging.getLogger("ds_cp.engine")


def log_blame(request: Request) -> None:
    """A request is ended since its steps have ended workers: its prompt by a digest alone."""
    prompt = hashlib.sha256(",".join(map(str, request.prompt)).encode()).hexdigest()
    logger.error(
        "request %s is ended: its steps have ended workers again and again "
        "(%d prompt tokens, their sha256 begins with %s, %d tokens given)",
        request.request_id, len(request.prompt), prompt[:16], len(request.output),
    )  # fmt: skip
