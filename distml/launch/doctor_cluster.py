"""What `distml doctor --address` finds out about a cluster: its token, its nodes, and the links between them.

Through a dashboard's URL the measurement runs as a job; another address is joined by a process here. Either way it is
`doctor_links.py`, which needs nothing of distml, and whose line of JSON comes back. Nothing is joined in this process.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distml.errors import DistmlError, UsageError
from distml.launch.check.versions import allowed
from distml.launch.doctor import FREE_SHARED_BYTES, Finding
from distml.launch.plan.cluster import CARDS, GIB, ClusterSpec
from distml.launch.submit.contact import Contact, contact, find_token, within
from distml.launch.submit.jobs import connected, translated
from distml.launch.submit.state import ClusterError
from distml.memory import binary_size

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

LINKS = Path(__file__).with_name("doctor_links.py")
MEASURE_S, JOIN_S, JOB_S, CALL_S, READY_S, POLL_S = 90.0, 150.0, 240.0, 30.0, 30.0, 0.5
NOT_READY = "No available agent"
NEEDED = ("ray", "torch")
HEADER = (
    "# Measured by distml doctor: distml plan SPEC --cluster THIS. The link is the slowest between two nodes, one TCP\n"
    "# stream; what several cards or RDMA reach together is more.\n"
)
SHARE_OF_NAME = 0.08  # by which a card's memory may differ from the one that its name has


def cluster_findings(address: str, out: Path | None) -> Iterator[Finding]:
    """Everything about a cluster.

    Args:
        address: a dashboard's URL, or what `ray.init` takes.
        out: where to write what `distml plan --cluster` reads.
    """
    try:
        if "://" in address:
            there = contact(address, say=lambda _: None)
            yield _open_or_not(there)
            measured = _as_job(there)
        else:
            yield Finding("cluster", f"{address}, joined from here")
            measured = _as_process(address)
    except DistmlError as error:
        said, _, advice = str(error).partition("; ")
        yield Finding("cluster", said, advice or "look at the head node: ray status, ray job list")
        return
    yield from nodes(measured)
    yield from links(measured["links"], len(measured["nodes"]))
    yield from for_plan(measured, out)


def _open_or_not(there: Contact) -> Finding:
    said = f"{there.url} answers, Ray {there.ray_version}"
    if there.token is None:
        return Finding("cluster", f"{said}, without a token: whoever reaches it runs code there",
                       "start it with RAY_AUTH_MODE=token, as the files in clusters/ do")  # fmt: skip
    return Finding("cluster", f"{said}, with a token")


# ----------------------------------------------------------------------------------------------------------- measuring
def _as_job(there: Contact) -> dict[str, Any]:
    """Run the measurement as a job of the cluster, which is deleted afterwards."""
    mark = secrets.token_hex(8)
    with translated(there):
        client = within(CALL_S, f"the Jobs API at {there.url}", lambda: connected(there))
        name = _started(client, there, mark)
        until = time.monotonic() + JOB_S
        while not (status := within(CALL_S, "the job's state", lambda: client.get_job_status(name))).is_terminal():
            if time.monotonic() > until:
                within(CALL_S, "the job to be stopped", lambda: client.stop_job(name))
                raise UsageError(f"waited {JOB_S:g} s for the job {name}, which is {status.value}; ray job logs {name}")
            time.sleep(POLL_S)
        text = within(CALL_S, "the job's log", lambda: client.get_job_logs(name))
        within(CALL_S, "the job to be deleted", lambda: client.delete_job(name))
    return _result(text, mark, f"the job {name} {status.value.lower()}")


def _started(client: JobSubmissionClient, there: Contact, mark: str) -> str:
    """The job's id; a cluster that has just begun gets time to become ready."""
    until = time.monotonic() + READY_S
    with tempfile.TemporaryDirectory(prefix="distml-doctor-") as folder, _quiet():
        (Path(folder) / LINKS.name).write_bytes(LINKS.read_bytes())
        while True:
            try:
                with translated(there):
                    return str(within(CALL_S, "the job to be taken", lambda: client.submit_job(
                        entrypoint=f"python {LINKS.name} {MEASURE_S:g} {mark}", runtime_env={"working_dir": folder},
                        submission_id=f"distml-doctor-{mark}")))  # fmt: skip
            except ClusterError as error:
                if NOT_READY not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(POLL_S)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, Ray does not tell of what it uploads."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _as_process(address: str) -> dict[str, Any]:
    """Run the measurement as a driver on this machine."""
    mark = secrets.token_hex(8)
    command = [sys.executable, str(LINKS), f"{MEASURE_S:g}", mark, address]
    environment = {"RAY_AUTH_MODE": "token" if find_token() else "disabled", **os.environ}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=JOIN_S,
                              stdin=subprocess.DEVNULL)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"waited {JOIN_S:g} s for Ray at {address}; is it alive, and can this machine reach it?"
        ) from None
    return _result(done.stdout + done.stderr, mark, f"Ray at {address} was not joined")


def _result(text: str, mark: str, otherwise: str) -> dict[str, Any]:
    lines = text.strip().splitlines()
    said = next((line.removeprefix(mark) for line in lines if line.startswith(mark)), None)
    if said is None:
        raise UsageError(f"{otherwise}: {lines[-1] if lines else 'it said nothing'}; is the address right, and is Ray "
                         "of the same version here and there?")  # fmt: skip
    found: dict[str, Any] = json.loads(said)
    return found


# ---------------------------------------------------------------------------------------------------------------- nodes
def nodes(measured: dict[str, Any]) -> Iterator[Finding]:
    """Whether they all answer, are alike, and have what runs need."""
    found, silent = measured["nodes"], measured["silent"]
    gpus = sum(one["num_gpus"] for one in found)
    for one in silent:
        yield Finding("nodes", f"{one['address']} does not answer: {one['error']}", "look at its raylet.err")
    if found:
        yield Finding("nodes", f"{len(found)}, {sum(one['num_cpus'] for one in found)} CPUs, {gpus} GPUs")
    yield _alike("python", {one["address"]: one["python"] for one in found})
    for name in found[0]["versions"] if found else ():
        versions = {one["address"]: one["versions"][name] for one in found}
        lacking = [place for place, version in versions.items() if version is None]
        if lacking and name == "distml":
            continue  # distml submit brings it
        if lacking and name in NEEDED:
            yield Finding(name, f"not on {', '.join(lacking[:3])}", "pip install -r clusters/requirements.txt there")
            continue
        yield _alike(name, {place: version for place, version in versions.items() if version})
    small = [one for one in found if (one["shared_memory_bytes"] or FREE_SHARED_BYTES) < FREE_SHARED_BYTES]
    for one in small:
        yield Finding("shared memory", f"{binary_size(one['shared_memory_bytes'])} at {one['address']}",
                      "give the container more: docker run --shm-size=8g")  # fmt: skip


def _alike(name: str, versions: dict[str, str]) -> Finding:
    counts = Counter(versions.values())
    called = f"{name}, nodes"
    if not counts:
        return Finding(called, "on none")
    usual = counts.most_common(1)[0][0]
    other = {place: version for place, version in versions.items() if version != usual}
    if other:
        place, version = next(iter(other.items()))
        return Finding(called, f"{usual} on {counts[usual]}, {version} on {place}", "give all nodes the same")
    wanted = allowed().get(name)
    if wanted is not None and not wanted.contains(usual.partition("+")[0], prereleases=True):
        return Finding(called, usual, f"distml is tested with {wanted}")
    if name == "ray" and usual != importlib.metadata.version("ray"):
        return Finding(called, f"{usual}, and {importlib.metadata.version('ray')} here", "use the same to join it")
    return Finding(called, usual)


def links(measured: list[dict[str, Any]], num_nodes: int) -> Iterator[Finding]:
    """What each link reaches."""
    if not measured and num_nodes == 1:
        yield Finding("links", "one node has none")
    for one in measured:
        name = f"{one['from']} to {one['to']}"
        if "error" in one:
            yield Finding("links", f"{name}: {one['error']}", "let the nodes reach each other on all ports")
        else:
            yield Finding("links", f"{name}: {one['latency_us']:.0f} us, {one['gb_per_s']:.3g} GB/s; objects of Ray "
                          f"{one['object_gb_per_s']:.3g} GB/s")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- plan
def for_plan(measured: dict[str, Any], out: Path | None) -> Iterator[Finding]:
    """The cluster as `distml plan --cluster` reads it."""
    description, unknown = cluster_of(measured)
    if not description:
        return
    lines = list(_lines(description))
    if out is not None:
        out.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    flat = ", ".join(lines)
    advice = f"write gpu: {{memory_gib: …, tflops: …}} for {unknown}, which is not known here" if unknown else ""
    yield Finding("for plan", f"written to {out}" if out is not None else f"{flat} (--out FILE writes it)", advice)


def _lines(description: dict[str, Any]) -> Iterator[str]:
    for key, value in description.items():
        if key != "links":
            yield f"{key}: {value}"
            continue
        numbers = ", ".join(f"{name}: {number}" for name, number in value["inter"].items())
        yield f"links: {{inter: {{{numbers}}}}}"


def cluster_of(measured: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Nodes, cards and the slowest link in the form of `ClusterSpec`; a card that is not known.

    Nodes with GPUs count where there are any; else all.
    """
    found = [one for one in measured["nodes"] if one["num_gpus"]] or measured["nodes"]
    if not found:
        return {}, None
    gpus, unknown = min(one["num_gpus"] for one in found), None
    description: dict[str, Any] = {"nodes": len(found), "gpus_per_node": gpus}
    description["cpus_per_node"] = min(one["num_cpus"] for one in found)
    if gpus:
        cards = next((one["cards"] for one in found if one["cards"]), [["a GPU", "0"]])
        name = known_card(cards[0][0], float(cards[0][1]) / 1024)
        description |= {"gpu": name} if name else {}
        unknown = None if name else cards[0][0]
    description["host_memory_gib"] = round(min(one["memory_bytes"] for one in found) / GIB, 1)
    good = [one for one in measured["links"] if "error" not in one]
    if good:
        description["links"] = {"inter": {
            "latency_us": round(max(one["latency_us"] for one in good), 1),
            "gb_per_s": round(min(one["gb_per_s"] for one in good), 3),
        }}  # fmt: skip
    ClusterSpec.model_validate(description | ({"gpu": {"name": description["gpu"]}} if "gpu" in description else {}))
    return description, unknown


def known_card(name: str, memory_gib: float) -> str | None:
    """A card by what its driver calls it; those that share a name differ in memory."""
    words = name.lower().replace("-", " ").replace("rtx 4090", "rtx4090").split()
    alike = {key: card for key, card in CARDS.items() if key.partition("-")[0] in words}
    near = {key: abs(card.memory_gib - memory_gib) / card.memory_gib for key, card in alike.items()}
    best = min(near, key=lambda key: near[key], default=None)
    return best if best is not None and near[best] < SHARE_OF_NAME else None
