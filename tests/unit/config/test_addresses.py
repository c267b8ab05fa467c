"""Hosts and origins have one spelling each."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.config import Server, canonical_host, canonical_origin, load_config, split_authority
from ds_cp.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("localhost", "localhost"),
        ("LocalHost.", "localhost"),
        ("GPU-1.lab_a.example", "gpu-1.lab_a.example"),
        ("127.0.0.1", "127.0.0.1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("[0:0:0:0:0:0:0:1]", "::1"),
        ("[::FFFF:127.0.0.1]", "127.0.0.1"),
        ("[2001:DB8::0:1]", "2001:db8::1"),
        ("[127.0.0.1]", None),
        ("[fe80::1%eth0]", None),
        ("[localhost]", None),
        ("[::1", None),
        ("", None),
        (".", None),
        ("localhost..", None),
        ("\u212a", None),  # its small letter is a k
        ("a b", None),
        ("user@localhost", None),
        ("localhost:80", None),
        ("http://localhost", None),
        ("localhost/", None),
        ("h\u00f6st", None),
        ("a" * 254, None),
        ("a" * 100_000, None),
    ],
)
def test_hosts(text: str, host: str | None) -> None:
    assert canonical_host(text) == host


def test_other_numbers_are_names() -> None:
    """What only some programs read as an address is no address here."""
    for text in ("127.1", "2130706433", "0x7f.0.0.1", "0177.0.0.1", "127.0.0.01"):
        with pytest.raises(ValueError):
            ipaddress.ip_address(text)
        assert canonical_host(text) not in ("127.0.0.1", "::1")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("localhost", ("localhost", None)),
        ("localhost:", ("localhost", None)),
        ("localhost:8000", ("localhost", 8000)),
        ("localhost:0008000", ("localhost", 8000)),
        ("[::1]:8000", ("::1", 8000)),
        ("127.0.0.1.:65535", ("127.0.0.1.", 65535)),
        ("localhost:65536", None),
        ("localhost:" + "9" * 5000, None),
        ("localhost:80a", None),
        ("localhost:-1", None),
        ("::1", None),
        ("::1:80", None),
        ("a:b@localhost", None),
        (":8000", None),
        ("localhost:80:80", None),
        ("localhost\r", None),
    ],
)
def test_authorities(text: str, found: tuple[str, int | None] | None) -> None:
    if found is not None:
        found = (found[0].removesuffix("."), found[1])
    assert split_authority(text) == found


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://app.example", "https://app.example"),
        ("HTTPS://App.Example:443", "https://app.example"),
        ("http://app.example:80", "http://app.example"),
        ("http://app.example:443", "http://app.example:443"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("app://obsidian.md", "app://obsidian.md"),
        ("null", None),
        ("", None),
        ("http://", None),
        ("http://[", None),
        ("app.example", None),
        ("https://app.example/", None),
        ("https://app.example/path", None),
        ("https://user@app.example", None),
        ("https://app.example, https://b.example", None),
    ],
)
def test_origins(text: str, origin: str | None) -> None:
    assert canonical_origin(text) == origin


@given(st.text(st.sampled_from("aA1.:[]%@-_/ *\u0130\u212a\x00"), max_size=20))
def test_one_spelling(text: str) -> None:
    """Whatever is sent: no exception, the same again for what came out, and plain ASCII."""
    host, origin = canonical_host(text), canonical_origin(f"http://{text}")
    if host is not None:
        assert host.isascii() and host == host.lower() and canonical_host(host) == host
    if origin is not None:
        assert canonical_origin(origin) == origin and "@" not in origin
    found = split_authority(text)
    assert found is None or ("@" not in found[0] and canonical_host(found[0]) == found[0])


def test_the_hosts_that_are_answered() -> None:
    here = {"localhost", "127.0.0.1", "::1"}
    assert Server().answered_hosts == here
    assert Server(host="127.0.0.5").answered_hosts == here | {"127.0.0.5"}
    named = Server(allowed_hosts=("GPU1.example.", "[2001:DB8::1]", "2001:db8::2"))
    assert named.answered_hosts == here | {"gpu1.example", "2001:db8::1", "2001:db8::2"}
    assert Server(host="0.0.0.0", api_key="k").answered_hosts is None
    both = Server(host="0.0.0.0", api_key="k", allowed_hosts=("gpu1.example",))
    assert both.answered_hosts == here | {"0.0.0.0", "gpu1.example"}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("allowed_hosts", ["gpu1.example:8000"], ['"gpu1.example:8000"', "without scheme, port"]),
        ("allowed_hosts", ["http://gpu1.example"], ["without scheme, port"]),
        ("allowed_hosts", ["*.example"], ["wildcard"]),
        ("allowed_hosts", ["a,b"], ['"a,b"']),
        ("allowed_hosts", [""], ["server.allowed_hosts"]),
        ("allowed_hosts", ["a"] * 65, []),
        ("allowed_hosts", "gpu1.example", ["server.allowed_hosts"]),
        ("cors_origins", ["https://app.example/"], ['write "https://app.example"']),
        ("cors_origins", ["https://App.example:443"], ['write "https://app.example"']),
        ("cors_origins", ["app.example"], ["https://app.example:8443"]),
        ("cors_origins", ["null"], ['"null"']),
        ("cors_origins", ["*", "https://app.example"], ['["*"] alone']),
        ("cors_origins", ["https://a.example"] * 65, []),
    ],
)
def test_what_is_not_one_is_refused(key: str, value: object, says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"model": "m", "server": {key: value}})
    message = str(caught.value)
    assert f"server.{key}" in message and "\n" not in message
    assert all(part in message for part in says), message
