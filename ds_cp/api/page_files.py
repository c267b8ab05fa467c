"""The page at /: files of the package, served as they are under a strict policy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ds_cp.api.errors import ApiError

FOLDER = Path(__file__).with_name("page")
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Scripts and styles come from files here alone, and no script can turn text into markup.
POLICY = "; ".join((
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
))  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=()",
    "Cache-Control": "no-cache",  # ask each time; ETag makes that cheap
}


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    tag: str


def page_paths() -> frozenset[str]:
    """The paths of the page. They hold no secret and are served without an API key: the page asks
    for the key."""
    return frozenset({"/", *(f"/page/{name}" for name in _names() if name != "index.html")})


def page_routes() -> APIRouter:
    """GET / and its files under /page/, read once and kept in memory."""
    files = {name: _read(FOLDER / name) for name in _names()}
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page(request: Request) -> Response:
        """The page: a chat, and the live picture."""
        return _answer(files["index.html"], request)

    @router.get("/page/{name}")
    async def part(name: str, request: Request) -> Response:
        """A file of the page."""
        if name not in files or name == "index.html":
            raise ApiError(404, f"the page has no file {name[:100]!r}")
        return _answer(files[name], request)

    return router


def _names() -> list[str]:
    return sorted(file.name for file in FOLDER.iterdir() if file.suffix in MEDIA_TYPES)


def _read(file: Path) -> _File:
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:32]
    return _File(content, MEDIA_TYPES[file.suffix], f'"{digest}"')


def _answer(file: _File, request: Request) -> Response:
    headers = HEADERS | {"ETag": file.tag}
    known = ",".join(request.headers.getlist("if-none-match"))
    if file.tag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(file.content, 200, headers, file.media_type)
