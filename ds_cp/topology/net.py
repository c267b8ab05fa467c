"""Network interfaces of this host, and which of them reaches the others."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from ds_cp.errors import LaunchError, TopologyError


@dataclass(frozen=True)
class Address:
    """One IPv4 address of an interface that is up."""

    interface: str
    ip: str
    prefix: int

    @property
    def network(self) -> ipaddress.IPv4Network:
        return ipaddress.ip_network(f"{self.ip}/{self.prefix}", strict=False)  # type: ignore[return-value]

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.ip).is_loopback


def local_addresses() -> tuple[Address, ...]:
    """IPv4 addresses of this host's interfaces that are up, loopback included."""
    import psutil  # only launching needs it

    stats = psutil.net_if_stats()
    found = []
    for name, entries in psutil.net_if_addrs().items():
        if name not in stats or not stats[name].isup:
            continue
        for entry in entries:
            if entry.family == socket.AF_INET:
                mask = ipaddress.ip_network(f"0.0.0.0/{entry.netmask or '255.255.255.255'}")
                found.append(Address(name, entry.address, mask.prefixlen))
    return tuple(found)


def loopback_interface(addresses: Sequence[Address]) -> str | None:
    """Name of the interface that has 127.0.0.1 (``lo``; ``lo0`` on macOS), ``None`` without one."""
    return next((a.interface for a in addresses if a.ip == "127.0.0.1"), None)


def address_of(interface: str, addresses: Sequence[Address], host: str) -> Address:
    """First address of a named interface; ``TopologyError`` lists what there is."""
    for address in addresses:
        if address.interface == interface:
            return address
    there = ", ".join(f"{a.interface} {a.ip}" for a in addresses) or "none"
    raise TopologyError(
        f"comm.interface {interface!r} is not up with an IPv4 address on host {host} "
        f"(there: {there}); name one of those or set it to auto"
    )


def resolve(name: str) -> str:
    """IP address of a host name, IPv4 where it has one. ``LaunchError`` when it has none."""
    try:
        infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise LaunchError(
            f"the store's host {name!r} (MASTER_ADDR) cannot be resolved: "
            f"give an address, or a name that every host knows"
        ) from None
    infos.sort(key=lambda info: info[0] != socket.AF_INET)
    return str(infos[0][4][0])


def shared_address(mine: Sequence[Address], others: Sequence[Sequence[Address]]) -> Address | None:
    """The address of ``mine`` to give to the other hosts.

    The first in whose subnet every other host has an address too; else the first. An address that
    another host has as well (a container bridge) reaches nobody and is left out.
    """
    taken = {address.ip for host in others for address in host}
    usable = [a for a in mine if not a.is_loopback and a.ip not in taken]
    for address in usable:
        if all(any(a.network == address.network for a in host) for host in others):
            return address
    return usable[0] if usable else None


def route_to(ip: str, addresses: Sequence[Address]) -> Address | None:
    """The own address from which packets to ``ip`` would leave. Sends nothing."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ip, 9))
        except OSError:
            return None
        source = probe.getsockname()[0]
    return next((a for a in addresses if a.ip == source), None)


def listen(ip: str, port: int, way_out: str) -> socket.socket:
    """A TCP socket that listens on one address; port 0 takes a free one.

    ``LaunchError`` says what is wrong; ``way_out`` is how this launch chooses another port.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((ip, port))
        sock.listen(1024)
    except OSError as err:
        sock.close()
        raise LaunchError(
            f"cannot listen for the job's store on {ip} port {port} "
            f"({err.strerror or err}): {way_out}"
        ) from None
    return sock
