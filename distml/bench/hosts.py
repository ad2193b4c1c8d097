"""Hosts on one machine (`network.py`) and one Ray over all: two for measurements, or a cluster with the Jobs API.

    this process ── ip, tc ──▶ namespaces a (Ray's head), b, c … (nodes that join it)      client (of a cluster: no Ray)
                 ── ray start --block in each ──▶ nodes           `distml submit` ── http ──▶ a:8265, with the token

A token in a file that only this user can read keeps others out. Whatever happens, all processes in all namespaces are
ended and the namespaces deleted when the block is left, on SIGTERM too. The hosts share the disk, shared memory and the
numbering of processes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distml.bench.contenders import EVERYWHERE, end_group, spawn, terminable
from distml.bench.network import INTERFACE, NamespaceHost, Network, network
from distml.errors import RunError

PORT, DASHBOARD_PORT = 6379, 8265
HEAD = ["--head", "--port", str(PORT)]
# As those of clusters/: a silent node has gone after 40 s, and a connection that is silent for a shorter time stays.
HEAD_SETTINGS = {"RAY_health_check_timeout_ms": "5000"}
NODE_SETTINGS = {"RAY_grpc_keepalive_timeout_ms": "40000"}
START_S = 60.0
STORE_BYTES = 512 * 2**20
CLUSTER_STORE_BYTES = 150 * 2**20
# Of another Ray, and would go first; the last is left by a private one of this process, and no node joins with it.
OTHERS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR",
          "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")  # fmt: skip
# Run on a host: until a URL answers with 200.
ANSWERS = (
    "import os, sys, time, urllib.request as r\n"
    "token = open(os.environ['RAY_AUTH_TOKEN_PATH']).read(); end = time.monotonic() + float(sys.argv[2])\n"
    "while True:\n"
    "    try: r.urlopen(r.Request(sys.argv[1], headers={'Authorization': 'Bearer ' + token}), timeout=5); break\n"
    "    except OSError as error:\n"
    "        if time.monotonic() > end: sys.exit(str(error))\n"
    "        time.sleep(0.1)\n"
)


@dataclass(frozen=True)
class Pair:
    """Two hosts and their Ray.

    Attributes:
        hosts: a, with Ray's head, and b.
        environment: what a process of either needs to use that Ray, and for gloo to find the link.
    """

    hosts: tuple[NamespaceHost, NamespaceHost]
    environment: Mapping[str, str]

    @property
    def ray(self) -> str:
        """The Ray's address."""
        return f"{self.hosts[0].address}:{PORT}"

    def bytes_sent(self) -> dict[str, float]:
        """What both have put on the link."""
        return {"link_bytes": float(sum(host.bytes_sent() for host in self.hosts))}


@dataclass
class Cluster:
    """A Ray with token, dashboard and Jobs API over several hosts, and one more host for clients.

    Nodes are numbered in the order in which they were added; 0 is the head.

    Attributes:
        folder: seen by all hosts; `runs` in it is where submitted jobs keep their runs.
        environment: what a process of any host needs to use that Ray.
        cpus: logical CPUs of a node other than the head.
    """

    network: Network
    folder: Path
    environment: Mapping[str, str]
    cpus: int
    outside: NamespaceHost
    nodes: list[tuple[NamespaceHost, subprocess.Popen[bytes]]] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Of the dashboard and the Jobs API."""
        return f"http://{self.nodes[0][0].address}:{DASHBOARD_PORT}"

    @property
    def ray(self) -> str:
        """The Ray's address, for processes on a node."""
        return f"{self.nodes[0][0].address}:{PORT}"

    @property
    def runs(self) -> Path:
        """The run directories of submitted jobs."""
        return self.folder / "runs"

    def client(self, arguments: Sequence[str], **popen: Any) -> subprocess.Popen[Any]:
        """`distml ARGUMENTS` on the host that has no Ray; it is ended with the cluster at the latest.

        Args:
            popen: of `subprocess.Popen`, such as `cwd` and `stdout`.
        """
        return self._distml(self.outside, arguments, **popen)

    def on(self, node: int, arguments: Sequence[str], **popen: Any) -> subprocess.Popen[Any]:
        """`distml ARGUMENTS` on a node."""
        return self._distml(self.nodes[node][0], arguments, **popen)

    def _distml(self, host: NamespaceHost, arguments: Sequence[str], **popen: Any) -> subprocess.Popen[Any]:
        command = host.command([*without_others(), sys.executable, "-m", "distml", *arguments])
        return subprocess.Popen(command, env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL, **popen)

    def pids(self, node: int) -> list[int]:
        """Processes on a node."""
        return self.nodes[node][0].pids()

    def kill(self, node: int, *, silently: bool = True) -> None:
        """End all processes of a node at once.

        Args:
            silently: as a power failure does: its link is dead first, and nobody is told. Else its connections are
                closed, as a kernel does that outlives them.
        """
        host, process = self.nodes[node]
        if silently:
            self.network.cut(host)
        host.kill()
        end_group(process)

    def cut(self, node: int, seconds: float) -> None:
        """Cut a node's link, and mend it after a while."""
        host, _ = self.nodes[node]
        self.network.cut(host)
        try:
            time.sleep(seconds)
        finally:
            self.network.mend(host)

    def add(self, num: int = 1) -> list[int]:
        """Start nodes, all at the same time; their numbers.

        Raises:
            RunError: Ray did not start on one.
        """
        joins = joining(self.nodes[0][0])
        return self._start([(joins, self.cpus)] * num)

    def start_head(self, cpus: int) -> None:
        """The first node, with dashboard and Jobs API on its own address alone.

        Raises:
            RunError: Ray did not start.
        """
        self._start([([*HEAD, "--dashboard-port", str(DASHBOARD_PORT)], cpus)])

    def _start(self, wanted: Sequence[tuple[Sequence[str], int]]) -> list[int]:
        first = len(self.nodes)
        for options, cpus in wanted:
            host = self.network.add()
            if options[0] == "--head":
                options = [*options, "--dashboard-host", host.address]
            node = spawn_node(host, self.environment, self.folder, cpus, CLUSTER_STORE_BYTES, options)
            self.nodes.append((host, node))
        for host, node in self.nodes[first:]:
            wait_for_node(host, node, self.folder)
        return list(range(first, len(self.nodes)))


@contextlib.contextmanager
def cluster(nodes: int = 3, rate: str = "1gbit", cpus: int = 2, head_cpus: int = 0) -> Iterator[Cluster]:
    """A cluster of `nodes` hosts, the head among them, which is kept free of work, and a host for clients.

    Args:
        rate: of each host's link, as tc has it.
        cpus: logical CPUs of each node but the head.
        head_cpus: of the head.

    Raises:
        UsageError: hosts cannot be made here.
        RunError: Ray did not start.
    """
    with terminable(), network(rate) as (net, folder):
        more = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # a job's `python` is this one
            "DISTML_RUNS": str(folder / "runs"),
            **HEAD_SETTINGS,
            **NODE_SETTINGS,
        }
        made = Cluster(net, folder, {**access(folder), **more}, cpus, outside=net.add())
        try:
            made.start_head(head_cpus)
            made.add(nodes - 1)
            wait_for_jobs(made)
            yield made
        finally:
            net.remove()  # first: what starts the nodes anew must not see them end
            for _, process in made.nodes:
                end_group(process)


def wait_for_jobs(made: Cluster) -> None:
    """Until the Jobs API answers on the clients' host.

    Raises:
        RunError: it does not.
    """
    command = made.outside.command([sys.executable, "-c", ANSWERS, f"{made.url}/api/jobs/", str(START_S)])
    environment = {**os.environ, **made.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_S + 10.0, check=False)
    if done.returncode:
        raise RunError(f"{made.url} gave no answer in {START_S:g} s: {done.stderr.strip()[-200:]}", phase="bench")


@contextlib.contextmanager
def two_hosts(rate: str, cpus: int = 1) -> Iterator[Pair]:
    """Two hosts with links of `rate` in each direction and one Ray over both.

    Args:
        rate: as tc has it, for example 100mbit.
        cpus: logical CPUs of each node; one, so that two workers are on two hosts.

    Raises:
        UsageError: they cannot be made here.
        RunError: Ray did not start.
    """
    nodes: list[subprocess.Popen[bytes]] = []
    with terminable(), network(rate) as (net, folder):
        a, b = net.add(), net.add()
        pair = Pair((a, b), access(folder))
        try:
            for host, options in ((a, [*HEAD, "--include-dashboard", "false"]), (b, joining(a))):
                nodes.append(spawn_node(host, pair.environment, folder, cpus, STORE_BYTES, options))
                wait_for_node(host, nodes[-1], folder)
            yield pair
        finally:
            net.remove()
            for node in nodes:
                end_group(node)


def access(folder: Path) -> dict[str, str]:
    """A token of this invocation alone, in a file of mode 0600, and where processes find it."""
    path = folder / "token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path), "GLOO_SOCKET_IFNAME": INTERFACE,
            "RAY_USAGE_STATS_ENABLED": "0", **EVERYWHERE}  # fmt: skip


def without_others() -> list[str]:
    """What runs a command without the variables that speak of another Ray."""
    return ["env", *(f"--unset={name}" for name in OTHERS)]


def joining(head: NamespaceHost) -> list[str]:
    """The options of `ray start` for a node that joins a head."""
    return ["--address", f"{head.address}:{PORT}"]


def spawn_node(
    host: NamespaceHost, environment: Mapping[str, str], folder: Path, cpus: int, store_bytes: int,
    options: Sequence[str],
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Begin to start a node of Ray on a host.

    Args:
        options: of `ray start`, besides those that every node has.
    """
    letter = host.name[-1]
    command = host.command(
        [*without_others(), sys.executable, "-m", "ray.scripts.scripts", "start", *options,
         "--node-ip-address", host.address, "--num-cpus", str(cpus), "--object-store-memory", str(store_bytes),
         "--temp-dir", str(folder / letter), "--disable-usage-stats", "--block"]
    )  # fmt: skip
    return spawn(command, environment, folder / f"ray-{letter}.log")


def wait_for_node(host: NamespaceHost, node: subprocess.Popen[bytes], folder: Path) -> None:
    """Until it has started.

    Raises:
        RunError: it has not after `START_S`, or has ended.
    """
    letter = host.name[-1]
    log = folder / f"ray-{letter}.log"
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in (said := log.read_text(encoding="utf-8", errors="replace")):
        ended = os.waitid(os.P_PID, node.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is not None or time.monotonic() > deadline:
            last = (said.strip() or "it said nothing").splitlines()[-1]
            raise RunError(f"Ray's node on host {letter} did not start in {START_S:g} s: {last}", phase="bench")
        time.sleep(0.1)
