"""Whether every node of a running cluster sees the storage: the driver writes a file, a task on each node answers it.

The driver asks all nodes that have CPUs or GPUs and waits `ANSWER_S` for all of them together, before anything is
placed. A private Ray has one node, the driver's, and needs no asking.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distml.errors import UsageError
from distml.runs.storage import PROBE, Place, explained, open_place, refused
from distml.runtime.authentication import cluster_address
from distml.runtime.connection import connect, diverted_output
from distml.spec.storage import is_url

ANSWER_S = 60.0
QUESTION = "driver"


def check_nodes(storage: str, address: str | None, logs: Path, start_s: float) -> None:
    """Ask all nodes of the cluster that the run will use, if it is a running one.

    Raises:
        UsageError: one does not see the storage, or gave no answer: which, what it saw, what to do.
    """
    if not ray.is_initialized() and cluster_address(address) is None:
        return
    with diverted_output(logs / "ray.log"):
        connect(address, 0, start_s)
        place = open_place(storage, PROBE + secrets.token_hex(8))
        try:
            problems = ask_nodes(storage, place)
        finally:
            _tidy(place)
    if problems:
        todo = ("give every node the right to it (environment, files, the machine's role) and a way to its endpoint"
                if is_url(storage) else "use a folder that all nodes mount, or s3:// or gs://")  # fmt: skip
        raise UsageError(f"storage {storage.partition('?')[0]} is not seen by {_first(problems)}; {todo}")


def check_directory(directory: Path, address: str | None, logs: Path, start_s: float) -> None:
    """The same for the run directory of a job whose processes on other nodes write into it themselves.

    Raises:
        UsageError: the cluster has more than one node, and one of them does not see it.
    """
    if not ray.is_initialized() and cluster_address(address) is None:
        return
    with diverted_output(logs / "ray.log"):
        connect(address, 0, start_s)
        if sum(node["Alive"] for node in ray.nodes()) < 2:  # the driver's alone, whatever it has to compute with
            return
        folder = str(directory.resolve())
        place = open_place(folder, PROBE + secrets.token_hex(8))
        try:
            problems = ask_nodes(folder, place)
        finally:
            _tidy(place)
    if problems:
        raise UsageError(f"the run directory {folder} is not seen by {_first(problems)}; trials of a sweep write into "
                         "it from their nodes: use storage: PATH, or --out, with a folder that all nodes mount (a "
                         "bucket has copies of what the driver sees)")  # fmt: skip


def _first(problems: dict[str, str]) -> str:
    node, problem = next(iter(problems.items()))
    more = f" (and {len(problems) - 1} more nodes)" if len(problems) > 1 else ""
    return f"node {node}{more}: {problem}"


def _tidy(place: Place) -> None:
    """What is left behind harms nobody, and what the nodes have said matters more."""
    with contextlib.suppress(OSError):
        place.remove("")


def ask_nodes(storage: str, place: Place) -> dict[str, str]:
    """The nodes that do not see what the driver has written to `place`, with what they saw."""
    token = secrets.token_hex(16)
    with refused(place.url):
        place.write(QUESTION, token.encode())
    run = place.url.rpartition("/")[2]
    nodes = _nodes()
    calls = {node: _task(node).remote(storage, run, token, node) for node in nodes}
    deadline, problems = time.monotonic() + ANSWER_S, {}
    for node, call in calls.items():
        problem = _answer(call, deadline) or _missing(place, node, token)
        if problem is not None:
            problems[f"{nodes[node]}"] = problem
    return problems


def _nodes() -> dict[str, str]:
    """Identities and addresses of the nodes that have something to compute with."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()
            if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))}  # fmt: skip


def _task(node: str) -> Any:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(look).options(scheduling_strategy=there)


def _answer(call: Any, deadline: float) -> str | None:
    try:
        problem: str | None = ray.get(call, timeout=max(0.1, deadline - time.monotonic()))
    except ray.exceptions.GetTimeoutError:
        ray.cancel(call, force=True)
        return f"it gave no answer for {ANSWER_S:g} s"
    except ray.exceptions.RayError as error:
        return f"it could not be asked: {' '.join(str(error).split())[-200:]}"
    return problem


def _missing(place: Place, node: str, token: str) -> str | None:
    with refused(place.url):
        if place.read(node) != token.encode():
            return "what it wrote there the driver does not see"
    return None


def look(storage: str, run: str, token: str, node: str) -> str | None:
    """A node's side: None, or what it saw. Makes no folder where there is none."""
    try:
        place = open_place(storage, run)
        found = place.read(QUESTION)
        if found != token.encode():
            what = "there is nothing of what the driver wrote" if found is None else "there is another run's file"
            return f"on {socket.gethostname()} {what}"
        place.write(node, token.encode())
    except (OSError, UsageError) as error:
        return f"on {socket.gethostname()}: {explained(error)}"
    return None
