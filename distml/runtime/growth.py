"""Whether a cluster can get nodes that it does not have yet: what its autoscaler was told, where that can be read.

Ray has no public call for it, and its autoscaler runs on every head, also where it can start nothing. So two signs
count, both on the head's machine, where drivers of Ray jobs run:

- `ray up` copies what it was given to `~/ray_bootstrap_config.yaml` there: node types, with most nodes of each;
- KubeRay starts the head with `--no-monitor` (in KUBERAY_GEN_RAY_START_CMD) where it runs the autoscaler beside it; of
  what size the groups are is not said to Ray.

Everywhere else nodes that are still to come are waited for with `limits.queue: true`. No ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distml.runtime.planning import ACCELERATOR, Node

BOOTSTRAP = "ray_bootstrap_config.yaml"
START_COMMAND = "KUBERAY_GEN_RAY_START_CMD"
UNLIMITED = 2**31


@dataclass(frozen=True)
class NodeType:
    """Nodes that an autoscaler can start.

    Args:
        most: at the same time.
    """

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    most: int


@dataclass(frozen=True)
class Growth:
    """What an autoscaler can add.

    Args:
        source: why that is believed.
        types: None: it does not say.
        most: nodes besides the head, of all types.
    """

    source: str
    types: tuple[NodeType, ...] | None = None
    most: int = UNLIMITED

    def more(self, nodes: Sequence[Node], accelerators: Sequence[str] = ()) -> list[Node]:
        """The nodes that can still come, at most as many as `most` leaves.

        Args:
            nodes: alive; one counts as of the first type with its CPUs and GPUs that has room for it.
            accelerators: that a type with GPUs is taken to have if it does not say which it has.
        """
        there = Counter((node.total.get("CPU", 0.0), node.total.get("GPU", 0.0)) for node in nodes)
        left = max(0, self.most - (len(nodes) - 1))
        found: list[Node] = []
        for kind in self.types or ():
            shape = (kind.resources.get("CPU", 0.0), kind.resources.get("GPU", 0.0))
            known = min(there[shape], kind.most)
            there[shape] -= known
            says = any(name.startswith(ACCELERATOR) for name in kind.resources)
            taken = {} if says or not shape[1] else {ACCELERATOR + name: 1.0 for name in accelerators}
            count = min(kind.most - known, left - len(found))
            found += [Node(f"{kind.name} {index}", {**kind.resources, **taken}, labels=kind.labels)
                      for index in range(count)]  # fmt: skip
        return found


def read_growth(home: Path, environment: Mapping[str, str], is_head: bool) -> Growth | None:
    """What the signs on this machine say; None: nothing, or it is not the head's.

    Args:
        home: of the user who started Ray.
    """
    if not is_head:
        return None
    if "--no-monitor" in environment.get(START_COMMAND, ""):
        return Growth("KubeRay's autoscaler")
    try:
        told = yaml.safe_load((home / BOOTSTRAP).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return _told(told) if isinstance(told, dict) else None


def _told(told: dict[str, Any]) -> Growth | None:
    types, head = told.get("available_node_types"), told.get("head_node_type")
    if not isinstance(types, dict):
        return None
    found = [_node_type(name, one) for name, one in types.items() if name != head and isinstance(one, dict)]
    most = told.get("max_workers")
    return Growth("the autoscaler", tuple(found), most if isinstance(most, int) else UNLIMITED)


def _node_type(name: str, one: dict[str, Any]) -> NodeType:
    resources = one["resources"] if isinstance(one.get("resources"), dict) else {}
    labels = one["labels"] if isinstance(one.get("labels"), dict) else {}
    most = one.get("max_workers")
    amounts = {str(key): float(value) for key, value in resources.items() if isinstance(value, (int, float))}
    texts = {str(key): str(value) for key, value in labels.items()}
    return NodeType(str(name), amounts, texts, most if isinstance(most, int) else 0)
