"""Says which request has stopped the ranks."""

from __future__ import annotations

import logging

from ds_cp.outputs import STEPS_FAIL, prompt_digest
from ds_cp.scheduler.request import Request

logger = logging.getLogger("ds_cp.engine")


def log_blame(request: Request, cause: str = "") -> str:
    """A request is ended since its steps have failed, or ended workers, the last time by ``cause``:
    its prompt by a digest alone. Returns the ``stop_reason`` of its answers."""
    logger.error(
        "request %s is ended: its steps have failed or ended workers again and again%s "
        "(%d prompt tokens, their sha256 begins with %s, %d tokens given)",
        request.request_id, f", the last time: {cause}" if cause else "",
        len(request.prompt), prompt_digest(request.prompt), len(request.output),
    )  # fmt: skip
    return STEPS_FAIL
