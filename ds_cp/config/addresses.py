"""How hosts and origins are written (RFC 3986 3.2.2, RFC 9110 4.3.1), each in one spelling so that
they can be compared."""

from __future__ import annotations

import ipaddress
import re

MAX_HOST_CHARS = 253  # characters of a host name
# A registered name or an IPv4 address, or an IPv6 address in brackets; a port may follow.
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]+)(?::([0-9]*))?")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#@\\\s]+)", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}


def split_authority(text: str) -> tuple[str, int | None] | None:
    """``HOST[:PORT]`` as ``(host, port)``, the host in its canonical spelling; None when it is not
    valid. Userinfo, an empty host, a zone id and ports above 65535 are not."""
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return None
    host, digits = found.groups()
    name = canonical_host(host)
    port = int(digits[-6:]) if digits else None  # int() of many digits is slow
    if name is None or (digits and len(digits.lstrip("0")) > 5) or (port or 0) > 65535:
        return None
    return name, port


def canonical_host(text: str) -> str | None:
    """The one spelling of a host: small letters, no dot at the end, IP addresses as ``ipaddress``
    writes them and without brackets, IPv4 in IPv6 as IPv4. None when it is not a host."""
    bracketed = text.startswith("[") and text.endswith("]")
    try:
        address = ipaddress.ip_address(text[1:-1] if bracketed else text)
    except ValueError:
        name = text.lower().removesuffix(".")
        if bracketed or ":" in name or name.endswith(".") or not text.isascii():
            return None
        return name if len(name) <= MAX_HOST_CHARS and _AUTHORITY.fullmatch(name) else None
    if bracketed and address.version == 4:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return None
        return str(address.ipv4_mapped or address)
    return str(address)


def canonical_origin(text: str) -> str | None:
    """``SCHEME://HOST[:PORT]`` as browsers write it in ``Origin``: small letters, no default port.
    None when it is not an origin, as "null" is."""
    found = _ORIGIN.fullmatch(text)
    if found is None:
        return None
    scheme = found[1].lower()
    authority = split_authority(found[2])
    if authority is None:
        return None
    host, port = authority
    if ":" in host:
        host = f"[{host}]"
    if port is None or port == _DEFAULT_PORTS.get(scheme):
        return f"{scheme}://{host}"
    return f"{scheme}://{host}:{port}"
