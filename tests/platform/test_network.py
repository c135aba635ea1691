"""Addresses, interfaces and ports of this machine."""

from __future__ import annotations

import socket

import pytest

from rloop_mcore.errors import UserError
from rloop_mcore.platform.network import address_of, address_towards, addresses, free_port, interface_of


def test_an_interface_and_its_address_name_each_other() -> None:
    assert addresses()["127.0.0.1"] == "lo"
    for address, interface in addresses().items():
        assert interface_of(address) == interface
    assert address_of("lo") == "127.0.0.1"


def test_the_route_decides() -> None:
    for address in addresses():
        assert address_towards(address) == address


def test_others_addresses_and_interfaces_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match=r"203\.0\.113\.9 is no address of"):
        interface_of("203.0.113.9")
    with pytest.raises(UserError, match=r"cluster\.interface=ib7 has no IPv4 address on .*: it has .*lo"):
        address_of("ib7")


def test_a_port_follows_from_the_seed_unless_it_is_taken() -> None:
    port = free_port("127.0.0.1", 4711)
    assert free_port("127.0.0.1", 4711) == port
    assert free_port("127.0.0.1", 4712) != port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert free_port("127.0.0.1", 4711) != port
