"""Ports for servers that want others above their own, and that no connection takes by chance."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rlx.sync import ports


def test_a_port_can_be_had_and_lies_below_what_connections_are_given() -> None:
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(50):
        port = ports.free_port()
        assert 20_000 <= port < min(first_given, 30_001)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_where_all_of_those_are_taken_a_higher_one_that_leaves_room_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_is_free", lambda host, port: port > 30_000)
    assert 30_000 < ports.free_port(room_above=10_000) <= 55_535


def test_none_to_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_is_free", lambda host, port: False)
    with pytest.raises(OSError, match=r"no free port up to 55535 on 127\.0\.0\.1"):
        ports.free_port(room_above=10_000)
