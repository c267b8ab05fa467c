"""One server: its address, a client for it, and its failures as typed errors."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from ds_cp.errors import LaunchError, NoServerError, RequestError, ServerError
from ds_cp.text import parse_json, shorten

CONNECT_S = 10.0  # seconds to reach a server
MAX_ANSWER_BYTES = 1 << 24  # bytes of an answer that is no stream
MAX_ERROR_CHARS = 1000  # characters of a server's message that are shown
MAX_URL_CHARS = 2000


@dataclass(frozen=True)
class Server:
    """``url``: without ``/v1``. ``timeout_s``: seconds without a byte after which it is given
    up."""

    url: str
    api_key: str | None
    timeout_s: float

    @classmethod
    def of(cls, url: str, api_key: str | None, timeout_s: float) -> Server:
        """Checked and in one spelling. ``LaunchError`` says what is wrong."""
        try:
            if len(url) > MAX_URL_CHARS:
                raise ValueError
            parsed = httpx.URL(url.strip())
            fine = parsed.scheme in ("http", "https") and parsed.host and not parsed.query
            fine = fine and (parsed.port is None or 0 < parsed.port < 1 << 16)
        except (httpx.InvalidURL, ValueError):
            fine = False
        if not fine:
            raise LaunchError(f"--url is {shorten(url)}; it must be like http://127.0.0.1:8000")
        if parsed.userinfo:
            raise LaunchError("--url has a password in it; give the key by --api-key")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise LaunchError("--api-key must be of printable ASCII characters")
        if not 0 < timeout_s <= 86400:
            raise LaunchError(f"--timeout is {timeout_s:g}; it must be above 0, at most 86400 s")
        plain = str(parsed.copy_with(fragment=None)).rstrip("/")
        return cls(plain.removesuffix("/v1").rstrip("/"), api_key or None, timeout_s)

    def client(self, connections: int = 8) -> httpx.AsyncClient:
        """A client with ``connections`` to this server at most. It follows no redirect, so that the
        key goes nowhere else, and a server on this machine is not asked through a proxy."""
        headers = {"Accept-Encoding": "identity"}  # what is bounded is what is received
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(self.timeout_s, connect=min(CONNECT_S, self.timeout_s)),
            limits=httpx.Limits(max_connections=connections),
            trust_env=not _is_here(httpx.URL(self.url).host),
        )


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@asynccontextmanager
async def answered(
    server: Server, client: httpx.AsyncClient, method: str, path: str, body: Any = None
) -> AsyncIterator[httpx.Response]:
    """A 2xx answer whose body is still to be read.

    ``NoServerError`` when nothing answers, ``RequestError`` for a 4xx answer, ``ServerError`` for
    any other and for a connection that breaks.
    """
    with translated(server):
        async with client.stream(method, path, json=body) as response:
            if not response.is_success:
                raise await _refusal(server, response)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise ServerError(f"{server.url} compresses its answers, though asked not to")
            yield response


@contextlib.contextmanager
def translated(server: Server) -> Iterator[None]:
    """Inside the block, errors of httpx become those of ``ds_cp.errors``."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as err:
        reason = shorten(str(err), 200) or type(err).__name__
        raise NoServerError(
            f"no server answers at {server.url} ({reason}); "
            "start one with ds-cp serve, or name another with --url"
        ) from None
    except httpx.TimeoutException:
        raise ServerError(
            f"{server.url} sent nothing for {server.timeout_s:g} s; --timeout waits longer"
        ) from None
    except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as err:
        reason = shorten(str(err), 200) or type(err).__name__
        raise ServerError(f"the connection to {server.url} broke: {reason}") from None


async def read(response: httpx.Response, limit: int = MAX_ANSWER_BYTES) -> bytes:
    """The body of an answer. ``ServerError`` beyond ``limit`` bytes."""
    body = bytearray()
    async for data in response.aiter_raw():
        body += data
        if len(body) > limit:
            raise ServerError(f"the server's answer has more than {limit} bytes")
    return bytes(body)


async def get_json(server: Server, client: httpx.AsyncClient, path: str) -> Any:
    """What GET ``path`` answers. ``ServerError`` when that is not JSON."""
    async with answered(server, client, "GET", path) as response:
        return as_json(await read(response))


def as_json(data: bytes) -> Any:
    """JSON from a server. ``ServerError`` when it is none."""
    try:
        return parse_json(data.decode("utf-8", "strict"))
    except ValueError as err:
        raise ServerError(f"the server's answer is {shorten(str(err))}") from None


async def _refusal(server: Server, response: httpx.Response) -> Exception:
    """The error of an answer that is not 2xx, in the server's own words where there are some."""
    status = response.status_code
    body = await read(response, MAX_ANSWER_BYTES)
    message = body[:MAX_ERROR_CHARS].decode("utf-8", "replace")
    with contextlib.suppress(ServerError):
        message = error_of(as_json(body)) or message
    said = shorten(message.strip(), MAX_ERROR_CHARS) or response.reason_phrase or "no reason given"
    if status == 401:
        said = f"{said}; give its key by --api-key"
    if 400 <= status < 500 and status != 429:
        return RequestError(f"HTTP {status}: {said}")
    if 300 <= status < 400:
        return ServerError(f"{server.url} redirects (HTTP {status}); name its new address by --url")
    return ServerError(f"HTTP {status}: {said}")


def error_of(found: Any) -> str | None:
    """The message of an error in OpenAI's shape, None for what is not one."""
    error = found.get("error") if isinstance(found, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return shorten(error, MAX_ERROR_CHARS) if isinstance(error, str) and error else None
