"""The ``server`` section of the config."""

from __future__ import annotations

import ipaddress
import string
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ds_cp.config.addresses import canonical_host, canonical_origin
from ds_cp.config.fields import (
    ApiKeys,
    Auto,
    ByteSize,
    MemorySize,
    ModelNames,
    Names,
    Section,
    Timeout,
    unit_of,
)
from ds_cp.errors import ConfigError
from ds_cp.parsing.choose import AUTO, NONE
from ds_cp.parsing.registry import REASONING_FAMILIES, TOOL_FAMILIES, checked_name
from ds_cp.text import show

_HOST_LETTERS = frozenset(string.ascii_lowercase + string.digits + ".-_:")


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
    allowed_hosts: Names = Field(
        default=(),
        description="host names, without scheme and port, that clients may reach the server by, "
        "beside localhost, 127.0.0.1, [::1] and host; others get HTTP 421. Without api_key this is "
        "always checked; with api_key only when names are listed here",
    )
    cors_origins: Names = Field(
        default=(),
        description='origins of web pages, as "https://app.example:8443", whose scripts may use '
        'the server from a browser; ["*"]: every page, which without api_key is every page that a '
        "browser on this machine opens",
    )
    served_model_name: ModelNames = Field(
        default=None,
        description="model name in the API, or list of names, each of which a request may give; "
        "null: the last part of model",
    )
    unknown_fields: Literal["warn", "refuse"] = Field(
        default="warn",
        description="what becomes of a field that no part of the protocol knows: warn ignores it "
        "with a header that names it, refuse answers HTTP 400",
    )
    log_format: Literal["text", "json"] = Field(
        default="text",
        description="how the server's log lines look: text, or json: one object a line; of each "
        "answer there is a line with its ids, tokens and times, never with its text",
    )
    tool_parser: Annotated[str, Field(json_schema_extra={"enum": [AUTO, NONE, *TOOL_FAMILIES]})] = (
        Field(
            default=AUTO,
            description="how the model writes tool calls; auto: as its chat template says, none: "
            "calls are text",
        )
    )
    reasoning_parser: Annotated[
        str, Field(json_schema_extra={"enum": [AUTO, NONE, *REASONING_FAMILIES]})
    ] = Field(
        default=AUTO,
        description="how the model marks reasoning; auto: as its chat template says, none: "
        "reasoning is text",
    )
    chat_template_kwargs: Annotated[
        dict[Annotated[str, Field(min_length=1, max_length=64)], bool | int | float | str],
        Field(max_length=64),
    ] = Field(
        default_factory=dict,
        description="values that the chat template reads, such as enable_thinking, unless a "
        "request gives others",
    )
    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = Field(
        default=8 << 20, description="largest HTTP request body", json_schema_extra=unit_of("bytes")
    )
    max_connections: Auto | Annotated[int, Field(ge=1, le=65536)] = Field(
        default="auto",
        description="connections open at once, below the limit of open files; beyond it the one "
        "that is idle longest is closed, or HTTP 503; auto: 1024",
    )
    max_buffered_bytes: MemorySize = Field(
        default="auto",
        description="memory that bodies and answers of all requests together may hold; requests "
        "beyond it are refused with HTTP 503; auto: an eighth of the machine's memory, "
        "at most 8 GiB",
        json_schema_extra=unit_of("bytes"),
    )
    max_stored_responses: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=1000,
        description="answers of /v1/responses that are kept for previous_response_id and GET; the "
        "oldest of the API key that has most make room for new ones; 0 keeps none",
    )
    max_stored_response_bytes: ByteSize = Field(
        default=256 << 20,
        description="memory that kept answers and their inputs may hold together",
        json_schema_extra=unit_of("bytes"),
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
        description="time that an answer waits for its client to read on; its connection is "
        "closed and its request aborted then",
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

    @property
    def model_names(self) -> tuple[str, ...]:
        """The configured names of the model; empty for the model's own."""
        name = self.served_model_name
        return (name,) if isinstance(name, str) else name or ()

    @property
    def answered_hosts(self) -> frozenset[str] | None:
        """The hosts of requests that are answered, each in its canonical spelling; None for all.

        With an API key a page that gets here under a name of its own (DNS rebinding) has no key.
        """
        if self.api_keys and not self.allowed_hosts:
            return None
        named = {canonical_host(name) for name in (self.host, *self.allowed_hosts)}
        return frozenset({"localhost", "127.0.0.1", "::1"} | {name for name in named if name})

    @field_validator("tool_parser", "reasoning_parser")
    @classmethod
    def _parser(cls, value: str, info: ValidationInfo) -> str:
        families = TOOL_FAMILIES if info.field_name == "tool_parser" else REASONING_FAMILIES
        if value in (AUTO, NONE):
            return value
        try:
            return checked_name(value, families, f"server.{info.field_name}")
        except ConfigError as err:
            raise ValueError(str(err)) from None

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            host = canonical_host(name)
            if host is None or not set(host) <= _HOST_LETTERS:
                raise ValueError(
                    f"server.allowed_hosts has {show(name)}, which is no host name or IP address; "
                    'write each as "gpu1.example", without scheme, port and wildcard'
                )
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value == ("*",):
            return value
        for origin in value:
            written = canonical_origin(origin.removesuffix("/"))
            if written != origin:
                hint = f"write {show(written)}" if written else 'write "https://app.example:8443"'
                raise ValueError(
                    f"server.cors_origins has {show(origin)}, which no browser sends as an origin; "
                    f'{hint}, or ["*"] alone for every page'
                )
        return value

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
