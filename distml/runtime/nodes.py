"""Whether a node has gone when processes on it were lost: Ray learns it later than a run does.

A worker's connection breaks at once when its node dies, while Ray declares the node dead only after its health checks
have failed for long enough, and places processes on it until then. So a recovery asks first: a node that accepts a
connection at its raylet lives; of one that does not, Ray's verdict is awaited, or the end of a cut.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping

import ray

from distml.errors import UsageError

CONNECT_S, LOOK_EVERY_S = 2.0, 0.5
GLANCE_S, GLANCE_EVERY_S, PAUSE_S = 0.2, 2.0, 0.5


def wait_for_verdict(
    nodes: Mapping[str, float], limit_s: float, is_over: Callable[[], bool] = lambda: False
) -> set[str]:
    """Those of these nodes that have gone, once it is known of each.

    Args:
        nodes: node -> how long its raylet must keep a connection to count as alive, in seconds; 0: to accept it is
            enough. More where the connection to a process broke and nobody has said why: the raylet may die with it.
        limit_s: until it must be known.
        is_over: whether the run was asked to end.

    Raises:
        UsageError: it is not, with the nodes; or the run was asked to end.
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
        if is_over():
            raise UsageError("asked to end while it waited to hear whether a node lives")
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


class Cuts:
    """How much longer a silent process may be silent because its node could not be reached for a while.

    TCP doubles the time between two attempts to send something again: after a cut of 20 s the next one is up to 40 s
    after its beginning, whereas a new connection is made as soon as the link is there again. So a node that could not
    be reached and then could is given as long as the silence had lasted by then.

    Args:
        reaches: whether a node can be reached now.
    """

    def __init__(self, reaches: Callable[[str], bool] | None = None) -> None:
        self._reaches = reaches or Raylets().reaches
        self._seen: dict[str, tuple[float, bool]] = {}  # node -> when it was last tried, and whether it was reached
        self._paused_until = 0.0
        self._cut: set[str] = set()
        self._until: dict[str, float] = {}

    def excuses(self, role: str, node: str, since: float, now: float, patience_s: float) -> bool:
        """Whether a process there may still be silent.

        Args:
            since: when its silence began.
            patience_s: how long any silence may last; after a cut at most twice as long.
        """
        if now - since < GLANCE_EVERY_S:
            self._cut.discard(role)
            self._until.pop(role, None)
            return True
        self._glance(node, now)
        at, reached = self._seen.get(node, (0.0, True))
        if at > since and not reached:
            self._cut.add(role)
            self._until.pop(role, None)
        elif at > since and role in self._cut:
            self._cut.remove(role)
            self._until[role] = now + min(now - since, patience_s)
        return now - since <= patience_s or now <= self._until.get(role, 0.0)

    def _glance(self, node: str, now: float) -> None:
        """Try to reach it, but not often: the driver waits meanwhile."""
        if now < max(self._paused_until, self._seen.get(node, (-GLANCE_EVERY_S, True))[0] + GLANCE_EVERY_S):
            return
        reached = self._reaches(node)
        self._seen[node] = now, reached
        if not reached:
            self._paused_until = now + PAUSE_S


class Raylets:
    """Where the nodes listen; asked for once for each node."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[str, int]] = {}

    def reaches(self, node: str) -> bool:
        """Whether a new connection is accepted there now."""
        if node not in self._places:
            self._places = {one["NodeID"]: (one["NodeManagerAddress"], one["NodeManagerPort"]) for one in ray.nodes()}
        if node not in self._places:
            return False
        with contextlib.suppress(OSError), socket.create_connection(self._places[node], GLANCE_S):
            return True
        return False
