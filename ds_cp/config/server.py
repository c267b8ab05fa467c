"""The ``server`` section of the config."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from ds_cp.config.fields import ApiKeys, Section, Timeout, unit_of
from ds_cp.text import show


class Server(Section):
    """The HTTP server on rank 0."""

    host: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        default="127.0.0.1", description="address to listen on; beyond loopback api_key must be set"
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, description="TCP port; 0 takes any free one"
    )
    api_key: ApiKeys = Field(
        default=None,
        description="key, or list of keys, that clients send as a bearer token; null: none asked",
        repr=False,
    )
    served_model_name: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="model name in the API; null: the last part of model"
    )
    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = Field(
        default=8 << 20, description="largest HTTP request body", json_schema_extra=unit_of("bytes")
    )
    drain_timeout_s: Annotated[float, Field(ge=0, le=3600)] = Field(
        default=25.0,
        description="time that running requests get to finish after SIGTERM; torchrun, deepspeed, "
        "Slurm and Kubernetes kill 30 s after theirs unless told otherwise, mpirun at once",
        json_schema_extra=unit_of("seconds"),
    )
    stall_s: Timeout = Field(
        default=60.0,
        description='time that one step may take before /health says 503 "stalled"; long '
        "prompts are cut into steps of about a second",
        json_schema_extra=unit_of("seconds"),
    )
    header_timeout_s: Timeout = Field(
        default=10.0,
        description="time that a client gets to send the head of a request; the connection is "
        "closed then",
        json_schema_extra=unit_of("seconds"),
    )
    body_timeout_s: Timeout = Field(
        default=10.0,
        description="time that a client gets to send a body, and a second more for each 64 KiB of "
        "it; HTTP 408 then",
        json_schema_extra=unit_of("seconds"),
    )
    write_timeout_s: Timeout = Field(
        default=60.0,
        description="time that a streamed answer waits for its client to read on; its request is "
        "aborted then",
        json_schema_extra=unit_of("seconds"),
    )
    tokenize_timeout_s: Timeout = Field(
        default=30.0,
        description="time to turn one text into tokens, or tokens into text; HTTP 503 then",
        json_schema_extra=unit_of("seconds"),
    )
    keep_alive_s: Timeout = Field(
        default=5.0,
        description="time without a token after which a streamed answer gets a comment line",
        json_schema_extra=unit_of("seconds"),
    )

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The accepted keys; empty when none is asked."""
        if self.api_key is None:
            return ()
        return (self.api_key,) if isinstance(self.api_key, str) else self.api_key

    @field_validator("api_key")
    @classmethod
    def _sendable(cls, value: Any) -> Any:
        keys = (value,) if isinstance(value, str) else value or ()
        if not all(33 <= ord(c) <= 126 for key in keys for c in key):
            raise ValueError("server.api_key must be printable ASCII without spaces")
        return value

    @model_validator(mode="after")
    def _open_needs_key(self) -> Server:
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(
                f"server.host {show(self.host)} is open to other machines but server.api_key is "
                f'not set; set a key, or listen on "127.0.0.1"'
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
