"""Network interfaces of this host, and which of them reaches the others."""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ds_cp.errors import LaunchError, TopologyError

LOOPBACK = "127.0.0.1"
_LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
# Addresses that no host has (RFC 5737, RFC 3849): the route to them is the default route.
_ELSEWHERE = ("203.0.113.1", "2001:db8::1")
NAME_POLL_S = 0.5  # seconds between looks for a name that will be known
_MAX_LOOKUPS = 4  # names of other hosts that are looked up for a route, at most


@dataclass(frozen=True)
class Address:
    """One address of an interface that is up."""

    interface: str
    ip: str
    prefix: int

    @property
    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        """The subnet of the address."""
        return ipaddress.ip_network(f"{self.ip}/{self.prefix}", strict=False)

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach the address."""
        return is_loopback(self.ip)


def is_loopback(ip: str) -> bool:
    """Whether an IP address is every host's own."""
    return ipaddress.ip_address(ip).is_loopback


def names_loopback(host: str) -> bool:
    """Whether ``host`` is a name or an address that means "this host" wherever it is used."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().rstrip(".") in _LOOPBACK_NAMES
    return address.is_loopback or address.is_unspecified


def local_addresses() -> tuple[Address, ...]:
    """Addresses of this host's interfaces that are up, loopback included, IPv4 first.

    IPv6 addresses that are valid on one link only (``fe80::``) are left out: other hosts would need
    the name of their own interface with them.
    """
    import psutil  # only launching needs it

    stats = psutil.net_if_stats()
    found = []
    for name, entries in psutil.net_if_addrs().items():
        if name not in stats or not stats[name].isup:
            continue
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            address = ipaddress.ip_address(entry.address.partition("%")[0])
            if not address.is_link_local or address.version == 4:
                mask = ipaddress.ip_address(entry.netmask or 2**address.max_prefixlen - 1)
                found.append(Address(name, str(address), int(mask).bit_count()))
    return tuple(sorted(found, key=lambda entry: ":" in entry.ip))


def host_key() -> str:
    """A word that two processes share when they run on one host: the same kernel since its start,
    and the same network. Where the system does not say (no /proc), it is ``-`` everywhere."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return "-"


def loopback_interface(addresses: Sequence[Address]) -> str | None:
    """Name of the interface that has 127.0.0.1 (``lo``; ``lo0`` on macOS), ``None`` without one."""
    return next((a.interface for a in addresses if a.ip == LOOPBACK), None)


def address_of(interface: str, addresses: Sequence[Address], host: str) -> Address:
    """First address of a named interface; ``TopologyError`` lists what there is."""
    for address in addresses:
        if address.interface == interface:
            return address
    there = ", ".join(f"{a.interface} {a.ip}" for a in addresses) or "none"
    raise TopologyError(
        f"comm.interface {interface!r} is not up with an address on host {host} "
        f"(there: {there}); name one of those or set it to auto"
    )


def resolve(name: str) -> tuple[str, ...]:
    """IP addresses of a host name, IPv4 first. ``LaunchError`` when it has none."""
    try:
        infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise LaunchError(
            f"the store's host {name!r} (MASTER_ADDR) cannot be resolved: "
            f"give an address, or a name that every host knows"
        ) from None
    infos.sort(key=lambda info: info[0] != socket.AF_INET)
    return tuple(dict.fromkeys(str(info[4][0]) for info in infos))


def await_name(name: str, timeout_s: float) -> None:
    """Wait until ``name`` has an address, at most ``timeout_s`` seconds; whoever resolves it then
    says what is wrong."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            resolve(name)
            return
        except LaunchError:
            time.sleep(NAME_POLL_S)


def shared_address(mine: Sequence[Address], others: Sequence[Sequence[Address]]) -> Address | None:
    """The address of ``mine`` to give to the other hosts.

    The first in whose subnet every other host has an address too; else the first. An address that
    another host has as well (a container bridge) reaches no other host and is left out.
    """
    taken = {address.ip for host in others for address in host}
    usable = [a for a in mine if not a.is_loopback and a.ip not in taken]
    for address in usable:
        if all(any(a.network == address.network for a in host) for host in others):
            return address
    return usable[0] if usable else None


def outward_address(addresses: Sequence[Address], peers: Iterable[str] = ()) -> Address | None:
    """The address of this host that other hosts most likely reach; ``None`` without any.

    In this order: the one that leads to one of ``peers`` (names or addresses of other hosts), the
    one of the default route, the first that is not a bridge's (a container bridge has the same
    address on every host), the first.
    """
    usable = [a for a in addresses if not a.is_loopback]
    for peer in list(peers)[:_MAX_LOOKUPS]:
        try:
            ips = resolve(peer)
        except LaunchError:
            continue
        for ip in ips:
            found = None if is_loopback(ip) else route_to(ip, usable)
            if found is not None:
                return found
    for ip in _ELSEWHERE:
        found = route_to(ip, usable)
        if found is not None:
            return found
    usable.sort(key=lambda a: os.path.isdir(f"/sys/class/net/{a.interface}/bridge"))
    return usable[0] if usable else None


def route_to(ip: str, addresses: Sequence[Address]) -> Address | None:
    """The own address from which packets to ``ip`` would leave. Sends nothing."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:  # a kernel without IPv6 refuses the socket itself
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((ip, 9))
            source = probe.getsockname()[0]
    except OSError:
        return None
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


def listening_address(fd: int) -> tuple[str, int]:
    """The address and port by which this host reaches its own listening socket.

    ``LaunchError`` when ``fd`` is no open socket.
    """
    try:
        with socket.socket(fileno=os.dup(fd)) as bound:
            ip, port = bound.getsockname()[:2]
    except OSError as err:
        raise LaunchError(f"the store's socket is not usable: {err}") from err
    return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(ip, ip), port
