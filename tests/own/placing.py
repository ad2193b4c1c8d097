"""A cluster of a head without CPUs and two nodes in zones a and b: what is asked for, and where Ray puts it, as JSON.

Arguments: `more` for what takes longer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from distml.runtime.authentication import prepare_authentication

prepare_authentication(None)

import ray  # noqa: E402
from own.oracle import job_of, spec_of  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.util.placement_group import placement_group_table, remove_placement_group  # noqa: E402

from distml.errors import UsageError  # noqa: E402
from distml.runtime.placement import (  # noqa: E402
    check_resources,
    place,
    server_node,
    wait_for_place,
)
from distml.runtime.seats import nodes_of, seats_of  # noqa: E402
from distml.spec.schema import JobSpec  # noqa: E402

SERVED = {"name": "parameter_server", "servers": 2}
QUICK = {"start_s": 30.0}


def job(placement: str = "pack", workers: int = 2, **changes: Any) -> JobSpec:
    resources = {"workers": workers, "placement": placement, **changes.pop("resources", {})}
    found: JobSpec = job_of(spec_of(resources=resources, limits={**QUICK, **changes.pop("limits", {})}, **changes))
    return found


def where(one: JobSpec, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Zones of workers and servers; or the refusal, and after how long."""
    began = time.monotonic()
    zones = {node["NodeID"]: node["Labels"].get("zone", "head") for node in ray.nodes()}
    try:
        group = place(one, check_resources(one, private=False), say)
    except UsageError as error:
        return {"refused": str(error), "after_s": time.monotonic() - began}
    zones |= {node["NodeID"]: node["Labels"].get("zone", "head") for node in ray.nodes()}
    nodes = nodes_of(seats_of(group))
    servers = [server_node(one, nodes, index) for index in (0, 1)] if one.strategy.name == "parameter_server" else []
    remove_placement_group(group)
    return {"workers": sorted(zones[node] for node in nodes), "servers": sorted(zones[node] for node in servers)}


def quick() -> dict[str, Any]:
    """What is decided at once."""
    return {
        "anywhere": where(job("strict_spread")),
        "label": where(job(resources={"labels": {"zone": "b"}})),
        "selector": where(job(resources={"labels": {"zone": "!in(b, c)"}})),
        "accelerator": where(job(resources={"accelerator": "L4"})),
        "no accelerator": where(job(resources={"accelerator": "L40S"})),
        "no label": where(job(resources={"labels": {"zone": "c"}})),
        "never": where(job(workers=5)),
        "apart": where(job("spread", strategy={**SERVED, "server_placement": "apart"})),
        "not apart": where(job("spread", strategy=SERVED)),
        "no place apart": where(job(workers=4, strategy={**SERVED, "server_placement": "apart"})),
        "servers by label": where(job("spread", strategy={**SERVED, "server_labels": {"zone": "b"}})),
    }


def busy() -> dict[str, Any]:
    """Others have it all: waited for, then there; and waited for in vain."""
    lines: list[str] = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
    other = place(job(workers=4, name="other").model_copy(update={"name": "other"}))
    vain = where(job(limits={"start_s": 2.0}), lines.append)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        interrupted = where(job())
    except KeyboardInterrupt:
        states = [row["state"] for row in placement_group_table().values()]
        interrupted = {"by": "KeyboardInterrupt", "pending": states.count("PENDING")}
    threading.Timer(1.5, lambda: remove_placement_group(other)).start()
    return {"in vain": vain, "interrupted": interrupted, "then there": where(job(), lines.append), "lines": lines}


def growing(cluster: Cluster) -> dict[str, Any]:
    """A node that is still to come; lost again, and another one in its place."""
    late = job(resources={"labels": {"zone": "z"}}, limits={"queue": True})
    groups: list[Any] = []
    waiting = threading.Thread(target=lambda: groups.append(place(late, check_resources(late, private=False))))
    waiting.start()
    first = cluster.add_node(num_cpus=2, labels={"zone": "z"})
    waiting.join(60)
    before = set(nodes_of(seats_of(groups[0])))
    cluster.remove_node(first, allow_graceful=False)
    while before & {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
        time.sleep(0.1)
    over: dict[str, Any] = {}
    try:
        wait_for_place(groups[0], late, print, is_over=lambda: True)
    except UsageError as error:
        over["asked to end"] = str(error)
    waiting = threading.Thread(target=lambda: over.update(again=_is_placed(groups[0], late)))
    waiting.start()
    cluster.add_node(num_cpus=2, labels={"zone": "z"})
    waiting.join(60)
    after = set(nodes_of(seats_of(groups[0])))
    remove_placement_group(groups[0])
    return {
        **over,
        "moved": not before & after,
    }


def _is_placed(group: Any, late: JobSpec) -> bool:
    wait_for_place(group, late, lambda text: None)
    return True


def trials() -> str:
    """The zone of a trial of Tune's."""
    from ray.tune import PlacementGroupFactory

    asked = PlacementGroupFactory([{"CPU": 1.0}], bundle_label_selector=[{"zone": "b"}])
    group = asked.to_placement_group()
    assert group.wait(20)
    zones = {node["NodeID"]: node["Labels"].get("zone") for node in ray.nodes()}
    return str(zones[nodes_of(seats_of(group))[0]])


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=2, labels={"zone": "a"}, resources={"accelerator_type:L4": 1})
    cluster.add_node(num_cpus=2, labels={"zone": "b"})
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        found = {"quick": quick(), "busy": busy()}
        if "more" in sys.argv:
            found |= {"growing": growing(cluster), "trial": trials()}  # type: ignore[dict-item]
        print("FOUND", json.dumps(found))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
