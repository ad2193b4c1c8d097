"""Which machines with GPUs a file for `ray up` starts: what `distml plan --cluster` needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distml.launch.check.documents import read_documents
from distml.launch.check.providers import INSTANCES, Instance, instance_name
from distml.launch.check.ray_up import Launch
from distml.launch.check.shapes import mapping
from distml.spec.messages import shorten


@dataclass(frozen=True)
class Rented:
    """Equal machines, as many as the file may start."""

    kind: Instance
    num_nodes: int


def rented(path: Path) -> Rented:
    """The machines that have the most GPUs together.

    Raises:
        UsageError: one line: it has none, or they are not known here.
    """
    document = next(iter(read_documents(path)[0]))
    launch, found = Launch(document.data), dict[str, int]()
    way_out = "write nodes, gpus_per_node, gpu, host_memory_gib, links to a file of their own"
    if launch.kind == "local":
        raise document.where(("provider", "type")).error(
            f"ray up finds out what these machines have; {way_out}: distml doctor --address ADDRESS --out FILE does so"
        )
    most = launch.data.get("max_workers", launch.defaults.get("max_workers"))
    if not isinstance(most, int):
        raise document.where(("max_workers",), "key").error("max_workers must be a whole number; write one")
    for name, one in launch.types.items():
        kind, number = instance_name(mapping(one.get("node_config"))), one.get("max_workers", most)
        if not launch.gpus(name) or not isinstance(number, int):
            continue
        if kind not in INSTANCES:
            place = document.where(("available_node_types", name, "node_config"), "key")
            raise place.error(f"{shorten(kind)} is not among the machines known here; {way_out}")
        found[kind] = found.get(kind, 0) + number
    if not found:
        raise document.where(("available_node_types",), "key").error(f"no node type has GPUs; {way_out}")
    best = max(found, key=lambda kind: INSTANCES[kind].num_gpus * found[kind])
    return Rented(INSTANCES[best], max(1, min(found[best], most)))
