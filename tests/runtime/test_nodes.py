"""Whether a node has gone: what its raylet's port tells."""

from __future__ import annotations

import socket
import threading

import pytest

from distml.runtime.nodes import Cuts, stays


@pytest.mark.parametrize(
    ("greeting", "closes", "seconds", "there"),
    [(b"", False, 0.2, True), (b"hello", False, 0.2, True), (b"hello", True, 5.0, False), (b"hello", True, 0.0, True)],
)
def test_who_keeps_a_connection_is_there(greeting, closes, seconds, there):
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def accept():
            connection, _ = server.accept()
            connection.sendall(greeting)
            if closes:
                connection.close()
            kept.append(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        assert stays("127.0.0.1", server.getsockname()[1], seconds) is there
        thread.join(5.0)


def test_nobody_is_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert not stays("127.0.0.1", port, 0.0)


def silence(reached, heard_at, patience_s=30.0, seconds=80):
    """When a process is given up that says nothing from 0 until `heard_at`; None: it is not. A look every second."""
    now = 0.0
    cuts = Cuts(lambda node: reached(now))
    for second in range(seconds):
        now = float(second)
        if not cuts.excuses("rank 0", "node", 0.0 if now < heard_at else now, now, patience_s):
            return now
    return None


def test_who_was_cut_off_may_be_silent_for_longer():
    def cut_for_20_s(now):
        return now > 20.0

    assert silence(cut_for_20_s, heard_at=38.0) is None
    assert silence(lambda now: True, heard_at=38.0) == 31.0  # the control: nothing was cut, it is stopped
    assert silence(cut_for_20_s, heard_at=1e9) == 45.0  # it was not the cut's fault alone
    assert silence(lambda now: False, heard_at=1e9) == 31.0  # a cut that lasts
    assert silence(lambda now: now > 29.0, heard_at=1e9) == 61.0


def test_a_cut_of_former_days_excuses_nobody():
    now = 0.0
    cuts = Cuts(lambda node: now < 2.0 or now > 25.0)
    for now in (2.0, 14.0, 26.0):
        assert cuts.excuses("rank 0", "node", 0.0, now, 30.0)  # it would be excused until 52
    for now in (27.0, 40.0):
        assert cuts.excuses("rank 0", "node", 27.0 if now == 27.0 else 28.0, now, 10.0) is (now == 27.0)
