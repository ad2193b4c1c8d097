"""Hosts on one machine: network namespaces, each with a shaped link to one switch.

    namespace a ══ eth0, rate-limited both ways ══╗
    namespace b ══ eth0 ══════════════════════════╬══ a bridge in a namespace of its own
    namespace c ══ eth0 ══════════════════════════╝

Processes in one namespace reach those in the others over the links alone. A link can be cut at the switch, as a cable
is pulled there, and mended; a host can be killed as a whole, and another one added. What an invocation that was killed
has left behind, the next one removes. Needs root, and `ip` and `tc` (iproute2).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distml.errors import UsageError

INTERFACE, BRIDGE = "eth0", "bridge"
ADDRESS = "10.213.77.{number}"  # in namespaces of their own, so that nobody else's can be in the way
NAME = "distml-{pid}-{number}-{letter}"
FOLDER = "dm-{pid}-"  # short: the paths of Ray's sockets have at most 107 characters
LETTERS, SWITCH, TRIAL = "abcdefghijklmnop", "z", "t"
END_S = 10.0
_numbers = itertools.count()


@dataclass(frozen=True)
class NamespaceHost:
    """A host.

    Attributes:
        name: of the network namespace.
        address: on its link.
    """

    name: str
    address: str

    @property
    def port(self) -> str:
        """Its link's other end, at the switch."""
        return f"port-{self.name[-1]}"

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that runs these arguments there."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def pids(self) -> list[int]:
        """Processes in the namespace; all of them were started here, or by those that were."""
        return [int(pid) for pid in call("ip", "netns", "pids", self.name).split()]

    def bytes_sent(self) -> int:
        """Bytes that this host has put on its link, headers included."""
        [link] = json.loads(call("ip", "-j", "-s", "-n", self.name, "link", "show", "dev", INTERFACE))
        return int(link["stats64"]["tx"]["bytes"])

    def kill(self) -> None:
        """SIGKILL for all that runs there, until nothing does; a namespace that is not there is fine."""
        deadline = time.monotonic() + END_S
        with contextlib.suppress(OSError):
            while (pids := self.pids()) and time.monotonic() < deadline:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)


class Network:
    """Hosts around one switch.

    Args:
        rate: of each link in each direction, as tc has it, for example 100mbit.
    """

    def __init__(self, rate: str) -> None:
        self.rate, self.number = rate, next(_numbers)
        self.hosts: list[NamespaceHost] = []
        self.switch = NamespaceHost(self._name(SWITCH), "")
        call("ip", "netns", "add", self.switch.name)
        call("ip", "-n", self.switch.name, "link", "add", BRIDGE, "type", "bridge")
        call("ip", "-n", self.switch.name, "link", "set", BRIDGE, "up")

    def _name(self, letter: str) -> str:
        return NAME.format(pid=os.getpid(), number=self.number, letter=letter)

    def add(self) -> NamespaceHost:
        """One more host, linked to the others."""
        index = len(self.hosts)
        host = NamespaceHost(self._name(LETTERS[index]), ADDRESS.format(number=index + 1))
        self.hosts.append(host)
        switch = self.switch.name
        call("ip", "netns", "add", host.name)
        call("ip", "link", "add", INTERFACE, "netns", host.name, "type", "veth",
             "peer", "name", host.port, "netns", switch)  # fmt: skip
        call("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
        call("ip", "-n", switch, "link", "set", host.port, "master", BRIDGE)
        for name, interface in ((host.name, INTERFACE), (switch, host.port)):
            call("tc", "-n", name, "qdisc", "add", "dev", interface, "root", *shaping(self.rate))
        for name, interface in ((host.name, "lo"), (host.name, INTERFACE), (switch, host.port)):
            call("ip", "-n", name, "link", "set", interface, "up")
        return host

    def cut(self, host: NamespaceHost) -> None:
        """Nothing passes a host's link until it is mended; those at its ends are told of nothing but the carrier."""
        call("ip", "-n", self.switch.name, "link", "set", host.port, "down")

    def mend(self, host: NamespaceHost) -> None:
        """Undo `cut`."""
        call("ip", "-n", self.switch.name, "link", "set", host.port, "up")

    def remove(self) -> None:
        """End what runs on the hosts and delete all."""
        for host in (*self.hosts, self.switch):
            remove(host)


@contextlib.contextmanager
def network(rate: str) -> Iterator[tuple[Network, Path]]:
    """An empty network and a folder, both gone afterwards; what killed invocations have left goes first.

    Raises:
        UsageError: it cannot be made here.
    """
    reason = missing()
    if reason is not None:
        raise UsageError(reason)
    sweep()
    prefix = FOLDER.format(pid=os.getpid())
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        made = Network(rate)
        try:
            yield made, Path(folder)
        finally:
            made.remove()


def missing() -> str | None:
    """Why hosts cannot be made here, in one line; None: they can."""
    if os.geteuid() != 0:
        return "two hosts or more need root: they are network namespaces; run it with sudo"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"two hosts or more need {tool!r}, which is not installed; it is part of iproute2"
    name = NAME.format(pid=os.getpid(), number=next(_numbers), letter=TRIAL)
    try:
        call("ip", "netns", "add", name)
        try:
            call("ip", "-n", name, "link", "set", "lo", "up")
            call("ip", "-n", name, "link", "add", BRIDGE, "type", "bridge")
            call("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", *shaping("1gbit"))
        finally:
            call("ip", "netns", "del", name)
    except OSError as error:
        return f"two hosts or more need network namespaces and a bridge, which this machine refuses: {error}"
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


def remove(host: NamespaceHost) -> None:
    """End what runs in a namespace and delete it; a namespace that is not there is fine."""
    host.kill()
    with contextlib.suppress(OSError):
        call("ip", "netns", "del", host.name)


def sweep() -> None:
    """Remove the namespaces and folders of invocations that were killed."""
    pattern = re.compile(NAME.format(pid=r"(\d+)", number=r"\d+", letter="[a-z]"))
    for line in call("ip", "netns", "list").splitlines():
        found = pattern.fullmatch(line.split(" ")[0])
        if found and not Path("/proc", found[1]).exists():
            remove(NamespaceHost(found[0], ""))
    for folder in Path(tempfile.gettempdir()).glob(FOLDER.format(pid="*") + "*"):
        owner = folder.name.split("-")[1]
        if owner.isdigit() and folder.owner() == "root" and not Path("/proc", owner).exists():
            shutil.rmtree(folder, ignore_errors=True)
