"""Whether a node has gone when processes on it were lost: Ray learns it later than a run does.

A worker's connection breaks at once when its node dies, while Ray declares the node dead only after its health checks
have failed for long enough, and places processes on it until then. So a recovery asks first: a node that accepts a
connection at its raylet lives; of one that does not, Ray's verdict is awaited, or the end of a cut.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping

import ray

from distml.errors import UsageError

CONNECT_S, LOOK_EVERY_S = 2.0, 0.5


def wait_for_verdict(nodes: Mapping[str, float], limit_s: float) -> set[str]:
    """Those of these nodes that have gone, once it is known of each.

    Args:
        nodes: node -> how long its raylet must keep a connection to count as alive, in seconds; 0: to accept it is
            enough. More where the connection to a process broke and nobody has said why: the raylet may die with it.
        limit_s: until it must be known.

    Raises:
        UsageError: it is not; with the nodes.
    """
    deadline = time.monotonic() + limit_s
    unknown, dead = dict(nodes), set[str]()
    while True:
        there = {node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes()
                 if node["Alive"]}  # fmt: skip
        for node, seconds in list(unknown.items()):
            if node not in there:
                dead.add(node)
            elif not stays(*there[node], seconds):
                continue
            del unknown[node]
        if not unknown:
            return dead
        if time.monotonic() > deadline:
            names = ", ".join(f"{there[node][0]}" for node in unknown if node in there)
            raise UsageError(f"waited {limit_s:g} s for {names}, which can neither be reached nor is declared dead by "
                             "Ray; see RAY_health_check_* on the cluster's head, or raise limits.start_s")  # fmt: skip
        time.sleep(LOOK_EVERY_S)


def stays(address: str, port: int, seconds: float) -> bool:
    """Whether somebody who listens there accepts a connection and keeps it for so long."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError), socket.create_connection((address, port), CONNECT_S) as connection:
        try:
            while (left := deadline - time.monotonic()) > 0:
                connection.settimeout(left)
                if not connection.recv(4096):  # a raylet's greeting is read over
                    return False
        except TimeoutError:
            pass
        return True
    return False
