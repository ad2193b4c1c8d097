"""Two hosts on one machine: network namespaces with a shaped link between them, and a node of one Ray in each.

    this process ── ip, tc ──▶ namespace a ══ eth0, rate-limited both ways ══ eth0 ◀── namespace b
    ray start --head (a) ◀── joins ── ray start (b)        one CPU each, a token in a file that only this user can read

Processes in one namespace reach those in the other over the link alone. Whatever happens, all processes in both
namespaces are ended and the namespaces deleted when the block is left, on SIGTERM too. What an invocation that was
killed has left behind, the next one removes. Needs root, and `ip` and `tc` (iproute2).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distml.bench.contenders import EVERYWHERE, end_group, spawn, terminable
from distml.errors import RunError, UsageError

INTERFACE = "eth0"
ADDRESSES = ("10.213.77.1", "10.213.77.2")  # in namespaces of their own, so that nobody else's can be in the way
PORT = 6379
NAME = "distml-{pid}-{number}-{letter}"
START_S, END_S = 60.0, 10.0
STORE_BYTES = 512 * 2**20
_numbers = itertools.count()


@dataclass(frozen=True)
class NamespaceHost:
    """One of the two.

    Attributes:
        name: of the network namespace.
        address: on the link.
    """

    name: str
    address: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that runs these arguments there."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def pids(self) -> list[int]:
        """Processes in the namespace; all of them were started here, or by those that were."""
        return [int(pid) for pid in call("ip", "netns", "pids", self.name).split()]

    def bytes_sent(self) -> int:
        """Bytes that this host has put on the link, headers included."""
        [link] = json.loads(call("ip", "-j", "-s", "-n", self.name, "link", "show", "dev", INTERFACE))
        return int(link["stats64"]["tx"]["bytes"])


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


def missing() -> str | None:
    """Why two hosts cannot be made here, in one line; None: they can."""
    if os.geteuid() != 0:
        return "two hosts need root: they are network namespaces; run it with sudo"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"two hosts need {tool!r}, which is not installed; it is part of iproute2"
    name = NAME.format(pid=os.getpid(), number=next(_numbers), letter="t")
    try:
        call("ip", "netns", "add", name)
        try:
            call("ip", "-n", name, "link", "set", "lo", "up")
            call("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", *shaping("1gbit"))
        finally:
            call("ip", "netns", "del", name)
    except OSError as error:
        return f"two hosts need network namespaces, which this machine refuses: {error}"
    return None


def call(*command: str) -> str:
    """What a short command prints.

    Raises:
        OSError: it failed; with the last line of what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=END_S, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise OSError(f"{' '.join(command)}: {said}")
    return done.stdout


def shaping(rate: str) -> list[str]:
    """tc's token bucket: its burst must cover what the timer lets pass between two looks."""
    return ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]


@contextlib.contextmanager
def two_hosts(rate: str, cpus: int = 1) -> Iterator[Pair]:
    """Two hosts with a link of `rate` in each direction and one Ray over both.

    Args:
        rate: as tc has it, for example 100mbit.
        cpus: logical CPUs of each node; one, so that two workers are on two hosts.

    Raises:
        UsageError: they cannot be made here.
        RunError: Ray did not start.
    """
    reason = missing()
    if reason is not None:
        raise UsageError(reason)
    sweep()
    number = next(_numbers)
    names = [NAME.format(pid=os.getpid(), number=number, letter=letter) for letter in "ab"]
    hosts = NamespaceHost(names[0], ADDRESSES[0]), NamespaceHost(names[1], ADDRESSES[1])
    nodes: list[subprocess.Popen[bytes]] = []
    with terminable(), tempfile.TemporaryDirectory(prefix="dm-", ignore_cleanup_errors=True) as folder:
        try:
            link(hosts, rate)
            pair = Pair(hosts, access(Path(folder)))
            for index in range(2):
                nodes.append(start_node(pair, index, cpus, Path(folder)))
            yield pair
        finally:
            for host in hosts:
                remove(host)
            for node in nodes:
                end_group(node)


def link(hosts: Sequence[NamespaceHost], rate: str) -> None:
    """Namespaces, and a pair of interfaces between them; what each sends is shaped."""
    for host in hosts:
        call("ip", "netns", "add", host.name)
    a, b = hosts
    call("ip", "link", "add", INTERFACE, "netns", a.name, "type", "veth", "peer", "name", INTERFACE, "netns", b.name)
    for host in hosts:
        call("ip", "-n", host.name, "addr", "add", f"{host.address}/30", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            call("ip", "-n", host.name, "link", "set", interface, "up")
        call("tc", "-n", host.name, "qdisc", "add", "dev", INTERFACE, "root", *shaping(rate))


def access(folder: Path) -> dict[str, str]:
    """A token of this invocation alone, in a file of mode 0600, and where processes find it."""
    path = folder / "token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path), "GLOO_SOCKET_IFNAME": INTERFACE,
            "RAY_USAGE_STATS_ENABLED": "0", **EVERYWHERE}  # fmt: skip


def start_node(pair: Pair, index: int, cpus: int, folder: Path) -> subprocess.Popen[bytes]:
    """A node of Ray on a host, once it has started: the head on the first, one that joins it on the second."""
    host, log = pair.hosts[index], folder / f"ray-{index}.log"
    temporary = folder / "ab"[index]  # short: the paths of Ray's sockets have at most 107 characters
    part = ["--head", "--port", str(PORT), "--include-dashboard", "false"] if index == 0 else ["--address", pair.ray]
    command = host.command(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *part, "--node-ip-address", host.address,
         "--num-cpus", str(cpus), "--object-store-memory", str(STORE_BYTES), "--temp-dir", str(temporary),
         "--disable-usage-stats", "--block"]
    )  # fmt: skip
    for variable in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR"):  # they would go first
        os.environ.pop(variable, None)
    node = spawn(command, pair.environment, log)
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in (said := log.read_text(encoding="utf-8", errors="replace")):
        ended = os.waitid(os.P_PID, node.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is not None or time.monotonic() > deadline:
            end_group(node)
            last = (said.strip() or "it said nothing").splitlines()[-1]
            raise RunError(f"Ray's node on host {'ab'[index]} did not start in {START_S:g} s: {last}", phase="bench")
        time.sleep(0.1)
    return node


def remove(host: NamespaceHost) -> None:
    """End what runs in a namespace and delete it; a namespace that is not there is fine."""
    deadline = time.monotonic() + END_S
    with contextlib.suppress(OSError):
        while (pids := host.pids()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        call("ip", "netns", "del", host.name)


def sweep() -> None:
    """Remove the namespaces of invocations that were killed."""
    pattern = re.compile(NAME.format(pid=r"(\d+)", number=r"\d+", letter="[abt]"))
    for line in call("ip", "netns", "list").splitlines():
        found = pattern.fullmatch(line.split(" ")[0])
        if found and not Path("/proc", found[1]).exists():
            remove(NamespaceHost(found[0], ""))
