"""What lies between the nodes of a Ray cluster, measured there.

    driver: one actor pinned to each node ── facts ──▶ names, versions, cards
            for a ring of nodes a → b:
                b listens on its own address, a connects: pings of 1 KB there and back, 64 MB one way in parts, of
                which the median counts: one TCP stream, less than what several cards or RDMA reach together
                b puts an object of 64 MB, a fetches it: what Ray's object store reaches
            ──▶ one line of JSON

It needs Ray and nothing of distml, as it also runs as a job of a cluster that has no distml (`main`).
Every wait has a limit, and what is measured when the time is over is what is said. A connection is taken only from
whoever sends the secret that the driver gave both ends.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import secrets
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

OBJECT_BYTES, PING_BYTES, NUM_PINGS = 64 * 2**20, 1024, 200
WARM_UP_BYTES, CHUNK_BYTES = 8 * 2**20, 2**20
NUM_PARTS = 8
SECRET_BYTES = 32
PROBE_S, START_S, MOST_LINKS = 20.0, 30.0, 8
PACKAGES = ("ray", "torch", "deepspeed", "distml")


class Probe:
    """One end of links, on one node."""

    def facts(self) -> dict[str, Any]:
        """What the node is and has."""
        versions: dict[str, str | None] = {}
        for name in PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = None
        shared = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
        return {
            "host": socket.gethostname(), "python": platform.python_version(), "versions": versions,
            "num_cpus": os.cpu_count(), "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "shared_memory_bytes": shared.f_blocks * shared.f_frsize if shared else None, "cards": _cards(),
        }  # fmt: skip

    def listen(self, secret: bytes) -> tuple[str, int]:
        """Wait for one connection, in the background; where."""
        server = socket.create_server((ray.util.get_node_ip_address(), 0), backlog=1)
        server.settimeout(PROBE_S)
        threading.Thread(target=_serve, args=(server, secret), daemon=True).start()
        host, port = server.getsockname()[:2]
        return str(host), int(port)

    def link(self, address: tuple[str, int], secret: bytes) -> dict[str, float]:
        """Microseconds one way of a small message, 10^9 bytes per second of a large one."""
        with socket.create_connection(address, timeout=PROBE_S) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.sendall(secret)
            message, times = bytes(PING_BYTES), []
            for _ in range(NUM_PINGS):
                started = time.perf_counter()
                peer.sendall(message)
                _receive(peer, PING_BYTES)
                times.append(time.perf_counter() - started)
            _send(peer, WARM_UP_BYTES)
            rates = [_send(peer, OBJECT_BYTES // NUM_PARTS) for _ in range(NUM_PARTS)]
        return {"latency_us": statistics.median(times) / 2 * 1e6, "gb_per_s": statistics.median(rates)}

    def put(self) -> list[Any]:
        """A large object of this node; in a list, so that the reference travels."""
        import numpy as np

        return [ray.put(np.zeros(OBJECT_BYTES, np.uint8))]

    def fetch(self, held: list[Any]) -> float:
        """10^9 bytes per second, of an object on another node."""
        started = time.perf_counter()
        ray.get(held[0], timeout=PROBE_S)
        return OBJECT_BYTES / (time.perf_counter() - started) / 1e9


def _cards() -> list[list[str]]:
    """Name and MiB of each GPU, as its driver says."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[word.strip() for word in line.split(",")] for line in said.splitlines()]


def _serve(server: socket.socket, secret: bytes) -> None:
    try:
        with server:
            peer, _ = server.accept()
        with peer:
            peer.settimeout(PROBE_S)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not secrets.compare_digest(_receive(peer, SECRET_BYTES), secret):
                return
            for _ in range(NUM_PINGS):
                peer.sendall(_receive(peer, PING_BYTES))
            for size in (WARM_UP_BYTES, *[OBJECT_BYTES // NUM_PARTS] * NUM_PARTS):
                _receive(peer, size)
                peer.sendall(b"!")
    except OSError:  # the other end says what went wrong
        return


def _send(peer: socket.socket, num_bytes: int) -> float:
    """Until the other end has all of it; 10^9 bytes per second."""
    chunk, started = bytes(CHUNK_BYTES), time.perf_counter()
    for _ in range(num_bytes // CHUNK_BYTES):
        peer.sendall(chunk)
    _receive(peer, 1)
    return num_bytes / (time.perf_counter() - started) / 1e9


def _receive(peer: socket.socket, num_bytes: int) -> bytes:
    """Exactly so many; only the last chunk of more is kept."""
    got, data = 0, b""
    while got < num_bytes:
        piece = peer.recv(min(CHUNK_BYTES, num_bytes - got))
        if not piece:
            raise ConnectionError("the other end closed the connection")
        data = piece if num_bytes > CHUNK_BYTES else data + piece
        got += len(piece)
    return data


def measure(seconds: float) -> dict[str, Any]:
    """Of the cluster that this process has joined.

    Args:
        seconds: after which no new link is begun.
    """
    until = time.monotonic() + seconds
    nodes = [node for node in ray.nodes() if node["Alive"]]
    probes, found, silent = {}, [], []
    for node in nodes:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        probes[node["NodeID"]] = ray.remote(Probe).options(num_cpus=0, scheduling_strategy=where).remote()
    asked = {name: probe.facts.remote() for name, probe in probes.items()}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=START_S)
    for node in nodes:
        name, resources = node["NodeID"], node["Resources"]
        seen = {"id": name, "address": node["NodeManagerAddress"], "num_gpus": int(resources.get("GPU", 0)),
                "is_head": "node:__internal_head__" in resources}  # fmt: skip
        try:
            found.append({**seen, **ray.get(asked[name], timeout=0.1)})
        except ray.exceptions.RayError as error:
            silent.append({**seen, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
    with_gpus = [one for one in found if one["num_gpus"]]
    links = list(_ring(with_gpus if len(with_gpus) > 1 else found, probes, until))
    return {"nodes": found, "silent": silent, "links": links}


def _ring(nodes: list[dict[str, Any]], probes: dict[str, Any], until: float) -> Iterator[dict[str, Any]]:
    """Each node and the next one; of two nodes both ways."""
    for index, node in enumerate(nodes[: MOST_LINKS if len(nodes) > 1 else 0]):
        other = nodes[(index + 1) % len(nodes)]
        link = {"from": node["address"], "to": other["address"]}
        if time.monotonic() > until:
            yield {**link, "error": "there was no time left"}
            continue
        try:
            yield {**link, **_measure_link(probes[node["id"]], probes[other["id"]])}
        except (ray.exceptions.RayError, OSError) as error:
            yield {**link, "error": f"{type(error).__name__}: {error}".strip().splitlines()[-1]}


def _measure_link(here: Any, there: Any) -> dict[str, float]:
    secret = secrets.token_bytes(SECRET_BYTES)
    address = ray.get(there.listen.remote(secret), timeout=PROBE_S)
    measured: dict[str, float] = ray.get(here.link.remote(address, secret), timeout=2 * PROBE_S)
    held = there.put.remote()
    ray.wait([held], timeout=PROBE_S)
    measured["object_gb_per_s"] = ray.get(here.fetch.remote(ray.get(held, timeout=PROBE_S)), timeout=2 * PROBE_S)
    return measured


def main(arguments: list[str]) -> None:
    """Join, measure, print: `doctor_links.py SECONDS MARK [ADDRESS]`; the mark begins the line of JSON."""
    seconds, mark, *address = arguments
    ray.init(address=address[0] if address else "auto", log_to_driver=False, logging_level="ERROR")
    print(mark + json.dumps(measure(float(seconds))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
