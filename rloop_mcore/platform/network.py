"""By which address and interface this machine talks to another, and ports that are free there."""

from __future__ import annotations

import contextlib
import socket

import psutil

from rloop_mcore.errors import UserError

_PORTS = range(20000, 32000)  # below those that kernels give away


def address_towards(host: str) -> str:
    """The address of this machine that `host` reaches it by: of the interface that the route to it takes.

    Raises OSError where the name is unknown or there is no route. Nothing is sent.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def addresses() -> dict[str, str]:
    """The IPv4 addresses of this machine, with their interfaces."""
    return {
        entry.address: interface
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }


def interface_of(address: str) -> str:
    """The interface of an address of this machine. Raises UserError where it is none of its own."""
    interface = "lo" if address.startswith("127.") else addresses().get(address)
    if interface is None:
        raise UserError(f"{address} is no address of {socket.gethostname()}, which has {', '.join(addresses())}.")
    return interface


def address_of(interface: str) -> str:
    """The IPv4 address of an interface. Raises UserError where there is none."""
    for address, name in addresses().items():
        if name == interface:
            return address
    known = ", ".join(sorted(set(addresses().values())))
    raise UserError(f"cluster.interface={interface} has no IPv4 address on {socket.gethostname()}: it has {known}.")


def free_port(address: str, seed: int) -> int:
    """A port of `address` that nobody listens on, the same for the same `seed` while it is free. Raises OSError."""
    first = usual_port(seed)
    for port in (*range(first, _PORTS.stop), *range(_PORTS.start, first)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            return port
    raise OSError(f"no port of {address} from {_PORTS.start} to {_PORTS.stop - 1} is free")


def usual_port(seed: int) -> int:
    """The one that `free_port` tries first."""
    return _PORTS[seed * 101 % len(_PORTS)]  # jobs that follow each other do not collide when one takes the next port
