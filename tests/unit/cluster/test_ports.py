"""Ports for servers that want others above their own."""

from __future__ import annotations

import socket

import pytest

from rlx.processes import ports


@pytest.mark.parametrize("drawn", [65535, 55536, 55535])
def test_a_port_leaves_room_above_it(monkeypatch: pytest.MonkeyPatch, drawn: int) -> None:
    """Also where the system draws from a range that lies too high."""
    bound = ports._bound
    monkeypatch.setattr(ports, "_bound", lambda host, port: drawn if port == 0 else bound(host, port))
    found = ports.free_port(room_above=10000)
    assert found == drawn if drawn <= 55535 else 1024 <= found <= 55535
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", ports.free_port()))


def test_none_to_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_bound", lambda host, port: 60000 if port == 0 else None)
    with pytest.raises(OSError, match="no free port up to 55535"):
        ports.free_port(room_above=10000)
