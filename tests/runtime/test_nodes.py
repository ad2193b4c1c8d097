"""Whether a node has gone: what its raylet's port tells."""

from __future__ import annotations

import socket
import threading

import pytest

from distml.runtime.nodes import stays


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
