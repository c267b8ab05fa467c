"""The address at which the ranks of a job meet, and the interface of their traffic."""

from __future__ import annotations

from ds_cp.errors import LaunchError
from ds_cp.topology import net
from ds_cp.topology.environment import Place
from ds_cp.topology.net import LOOPBACK, Address


def meeting(
    place: Place, one_host: bool, chosen: str, addresses: tuple[Address, ...], host: str
) -> tuple[str, str | None]:
    """The store's host as this rank connects to it, and the interface of the job's traffic.

    On rank 0's own host its name may lead to a loopback address (Debian and Ubuntu give the host's
    name 127.0.1.1), where rank 0 does not listen. Each rank there finds the address that rank 0
    listens on by the same steps as rank 0. The ranks of other hosts connect to the name.
    """
    store_host = place.store_host
    if one_host:
        if not (place.store_shared and _resolves(store_host)):
            store_host = LOOPBACK
        return store_host, interface_of(chosen, one_host, store_host, addresses, host)
    named = named_address(chosen, addresses, host)
    ips = () if _is_own_name(store_host, host) else net.resolve(store_host)
    if ips and not any(map(net.is_loopback, ips)):
        return store_host, interface_of(chosen, one_host, ips[0], addresses, host)
    own = own_ip(store_host, named, addresses, host, place.peers)
    if not (place.store_shared and ips):  # torchrun's store listens on every address
        store_host = own
    if net.is_loopback(own):
        return store_host, net.loopback_interface(addresses)
    return store_host, interface_of(chosen, one_host, own, addresses, host)


def named_address(chosen: str, addresses: tuple[Address, ...], host: str) -> Address | None:
    """The first address of the interface that ``comm.interface`` names; ``None`` for auto."""
    return None if chosen == "auto" else net.address_of(chosen, addresses, host)


def interface_of(
    chosen: str, one_host: bool, store_ip: str, addresses: tuple[Address, ...], host: str
) -> str | None:
    """The interface of the job's traffic: the one that ``comm.interface`` names, loopback on one
    host, else the one that leads to the store."""
    named = named_address(chosen, addresses, host)
    if named is not None:
        return named.interface
    if one_host:
        return net.loopback_interface(addresses)
    towards = net.route_to(store_ip, addresses) or net.outward_address(addresses)
    return None if towards is None else towards.interface


def own_ip(
    store_host: str,
    named: Address | None,
    addresses: tuple[Address, ...],
    host: str,
    peers: tuple[str, ...] = (),
) -> str:
    """The address of this host on which rank 0 listens, for ranks that connect to ``store_host``.

    Where that leads to loopback: the first address of the interface ``named`` in the config, or the
    outward one (see ``net.outward_address``); 127.0.0.1 on a host that has no other.
    """
    ips = () if _is_own_name(store_host, host) else net.resolve(store_host)
    outward = [a for a in addresses if not a.is_loopback]
    for ip in ips:
        if any(a.ip == ip for a in outward) or ip.startswith("fe80:"):
            return ip
    if not ips or any(map(net.is_loopback, ips)):
        found = named or net.outward_address(addresses, peers)
        return LOOPBACK if found is None else found.ip
    there = ", ".join(f"{a.interface} {a.ip}" for a in outward) or "none"
    raise LaunchError(
        f"rank 0 runs on host {host}, but the store's host {store_host} ({ips[0]}) "
        f"is not an address that it shows to others (there: {there}): "
        f"set MASTER_ADDR to one of those"
    )


def _is_own_name(name: str, host: str) -> bool:
    """Whether ``name`` is this host's, and leads nowhere: this host need not know itself."""
    return name.partition(".")[0] == host.partition(".")[0] and not _resolves(name)


def _resolves(name: str) -> bool:
    try:
        return bool(net.resolve(name))
    except LaunchError:
        return False
