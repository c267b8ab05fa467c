"""Typed errors. The message is one line: what is wrong, the numbers, and the way out."""

from __future__ import annotations

import errno


class DsCpError(Exception):
    """Base of every error that ds_cp raises on purpose.

    ``exit_code`` is what the command line returns: 2 when the user's input is at fault, 1 when we
    are.
    """

    exit_code = 1


class UserError(DsCpError):
    """Something the user can correct: a config, a path, a launch command."""

    exit_code = 2


class ConfigError(UserError):
    """The JSON config is not valid, or asks for what this machine or model cannot give."""


class TopologyError(UserError):
    """Ranks, hosts or groups do not fit together; the message says how to launch."""


class ModelError(UserError):
    """A model cannot be loaded: missing, truncated, unsafe format."""


class UnsupportedModelError(ModelError):
    """The architecture (named in the message) is outside what exact attention over ranks covers."""


class LaunchError(UserError):
    """The job cannot start here: a port in use, a missing file, a bad address."""


class OutputError(UserError):
    """Results cannot be written: stdout is closed, its reader has left, or the disk is full."""


class RequestError(UserError):
    """One request is not acceptable; all others go on. ``param`` names the field, as in
    OpenAI's API."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ChatTemplateError(RequestError):
    """The model's chat template gives no text for a conversation; the message names the template
    and the reason. ``code`` is for programs."""

    def __init__(self, message: str, code: str = "chat_template_error") -> None:
        super().__init__(message, "messages")
        self.code = code


class CapacityError(RequestError):
    """A request that can never fit, with the numbers (all in tokens).

    ``need``: what the request needs, ``have``: the sum of all ranks' KV, ``largest``: the largest
    request possible here.
    """

    def __init__(
        self, message: str, *, need: int, have: int, largest: int, param: str = "max_tokens"
    ) -> None:
        super().__init__(message, param)
        self.need = need
        self.have = have
        self.largest = largest


class NoServerError(UserError):
    """Nothing answers at the address of a server; the message says how to start or name one."""


class ServerError(DsCpError):
    """A server that a command talks to has failed, is full, or does not speak the protocol."""


class QueueFullError(DsCpError):
    """The waiting queue is at its bound; try again later (HTTP 429): after ``retry_after_s``
    seconds, by when there should be room."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LongWaitError(QueueFullError):
    """A request would wait longer to begin than the config allows; try again later (HTTP 429)."""


class GrammarBusyError(DsCpError):
    """Other grammars are being compiled; try again later (HTTP 503)."""


class CommError(DsCpError):
    """A peer did not answer in time, or is gone. The message names the group, the exchange and the
    limit."""


class RankFailedError(DsCpError):
    """A step failed on one rank. The message names the rank, its host and the cause; every rank
    raises it."""


class EngineDeadError(DsCpError):
    """The engine has stopped; no request can be served any more."""


class StoppingError(EngineDeadError):
    """The server is being stopped on purpose; ask another one, or this one after its restart."""


class IntegrityError(EngineDeadError):
    """A fault of ds_cp: the KV ledger does not balance, so no result can be trusted."""


# Of errors that torch and Triton raise as RuntimeError.
_NO_MEMORY = (
    "can't allocate memory", "bad_alloc", "CUDA error: out of memory", "[CUDA]: out of memory",
)  # fmt: skip


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an allocation failed. torch's own class is known by its name."""
    if isinstance(err, MemoryError):
        return True
    if isinstance(err, OSError):
        return err.errno == errno.ENOMEM
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(err).__mro__):
        return True
    return isinstance(err, RuntimeError) and any(said in str(err) for said in _NO_MEMORY)
