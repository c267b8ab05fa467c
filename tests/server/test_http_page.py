"""The page's files as HTTP: its policy, its caching, no key, nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from ds_cp.api.page_files import FOLDER, MEDIA_TYPES, page_paths
from ds_cp.engine import picture
from tests.server.conftest import Running, error_of

TYPES = {"": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
FILES = sorted(FOLDER.iterdir())
FORBIDDEN = (
    "innerHTML outerHTML insertAdjacentHTML document.write eval( Function( localStorage "
    "sessionStorage indexedDB document.cookie"
).split()


def test_every_file_is_served_under_the_policy(launch: Callable[..., Running]) -> None:
    """Without the key too: the page has to ask for it."""
    served = launch(api_key=("sesame",))
    assert "/" in page_paths() and len(page_paths()) == len(FILES)
    for path in sorted(page_paths()):
        reply = served.get(path)
        suffix = path[path.rindex(".") :] if "." in path else ""
        assert reply.status_code == 200, path
        assert reply.headers["content-type"].partition(";")[0] == TYPES[suffix]
        policy = dict(
            rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; ")
        )
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["frame-ancestors"] == policy["trusted-types"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert "unsafe" not in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert reply.headers["cross-origin-opener-policy"] == "same-origin"
        assert "set-cookie" not in reply.headers


def test_it_is_not_sent_again_while_it_is_the_same(served: Running) -> None:
    tag = served.get("/").headers["etag"]
    for given in (tag, f'"old", W/{tag}'):
        reply = served.get("/", headers={"If-None-Match": given})
        assert reply.status_code == 304 and reply.content == b""
        assert "content-security-policy" in reply.headers
    assert served.get("/", headers={"If-None-Match": '"old"'}).status_code == 200


@pytest.mark.parametrize("name", ["no.js", "index.html", "..%2fapp.py", "%2e%2e/app.py", "a/b.js"])
def test_there_is_nothing_else(served: Running, name: str) -> None:
    error_of(served.get(f"/page/{name}"), 404)


def test_other_methods(served: Running) -> None:
    assert error_of(served.post("/"), 405)
    assert "/" not in served.get("/openapi.json").json()["paths"]


def test_nothing_comes_from_elsewhere() -> None:
    names = {"http://www.w3.org/2000/svg"}  # a name, never fetched
    for file in FILES:
        assert file.suffix in MEDIA_TYPES
        text = file.read_text("utf-8")
        assert set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w/.-]*", text)) <= names, file.name
        for word in FORBIDDEN:
            assert word not in text, f"{file.name}: {word}"


def test_no_script_or_style_is_inline() -> None:
    class Walk(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            names = dict(attrs)
            if tag == "style" or (tag == "script" and not (names.get("src") or "").startswith("/")):
                self.found.append(tag)
            self.found += [name for name in names if name.startswith("on") or name == "style"]

    walk = Walk()
    walk.feed((FOLDER / "index.html").read_text("utf-8"))
    assert walk.found == []


def test_cells_mean_the_same_to_the_page_as_to_the_engine() -> None:
    script = (FOLDER / "kvmap.js").read_text("utf-8")
    said = dict(re.findall(r"\b(FREE|CACHED|SHARED|RESERVED) = (-?\d+)", script))
    assert said == {
        name: str(getattr(picture, name)) for name in ("FREE", "CACHED", "SHARED", "RESERVED")
    }
    kinds = re.findall(r"\[(-\d), ", (FOLDER / "live.js").read_text("utf-8"))
    assert kinds == [
        str(picture.FREE),
        str(picture.CACHED),
        str(picture.SHARED),
        str(picture.OTHER),
    ]


def test_letters_can_be_read_on_every_colour() -> None:
    """WCAG's contrast of black or white letters on the fill of each request."""
    script = (FOLDER / "kvmap.js").read_text("utf-8")
    fills = re.findall(r'^  \["#(\w{6})", "#\w{6}", ', script, re.M)
    light = set(
        map(int, re.findall(r"\d+", re.findall(r"LIGHT = new Set\(\[(.*?)\]\)", script)[0]))
    )
    assert len(fills) == len(set(fills)) == 8

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for slot, fill in enumerate(fills):
        ink = 1.0 if slot in light else 0.0
        low, high = sorted((luminance(fill), ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5, fill


def test_every_id_that_scripts_use_is_in_the_page() -> None:
    markup = (FOLDER / "index.html").read_text("utf-8")
    ids = set(re.findall(r'id="([\w-]+)"', markup))
    assert len(ids) == markup.count(' id="'), "an id occurs twice"
    for file in FOLDER.glob("*.js"):
        used = set(re.findall(r'byId\("([\w-]+)"\)', file.read_text("utf-8")))
        assert used <= ids, file.name
