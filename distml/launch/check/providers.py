"""What Ray's launcher reads of `provider:` and its own defaults; machines of two clouds by name. Ray is not imported.

The keys are those that Ray's sources look for (a test greps them): Ray itself takes any key and forgets it in silence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from distml.errors import UsageError

EVERY = {
    "type", "use_internal_ips", "use_external_head_ip", "disable_node_updaters", "disable_launch_config_check",
    "foreground_node_launch", "worker_liveness_check",
}  # fmt: skip
KEYS: dict[str, set[str]] = {
    "local": {"head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
    "aws": {"region", "availability_zone", "aws_credentials", "cache_stopped_nodes", "cloudwatch", "key_pair",
            "security_group"},
    "gcp": {"region", "availability_zone", "project_id", "gcp_credentials", "cache_stopped_nodes"},
}  # fmt: skip
NEEDED: dict[str, tuple[str, ...]] = {
    "local": ("head_ip", "worker_ips"), "aws": ("region",), "gcp": ("region", "availability_zone", "project_id"),
}  # fmt: skip
OTHER_PROVIDERS = ("azure", "aliyun", "vsphere", "external", "kuberay", "spark", "readonly", "fake_multinode",
                   "fake_multinode_docker")  # fmt: skip


@dataclass(frozen=True)
class Instance:
    """A kind of machine.

    Attributes:
        card: its GPUs, as `distml plan` calls them.
        memory_gib: of the host.
        gbit_per_s: of its network, all cards together.
    """

    card: str
    num_gpus: int
    num_cpus: int
    memory_gib: float
    gbit_per_s: float


INSTANCES = {
    "g6.xlarge": Instance("l4", 1, 4, 16, 2.5), "g6.12xlarge": Instance("l4", 4, 48, 192, 40),
    "g6.48xlarge": Instance("l4", 8, 192, 768, 100), "g6e.xlarge": Instance("l40s", 1, 4, 32, 2.5),
    "g6e.12xlarge": Instance("l40s", 4, 48, 384, 100), "g6e.48xlarge": Instance("l40s", 8, 192, 1536, 400),
    "p3.2xlarge": Instance("v100", 1, 8, 61, 2.5), "p3.8xlarge": Instance("v100", 4, 32, 244, 10),
    "p4d.24xlarge": Instance("a100-40gb", 8, 96, 1152, 400), "p4de.24xlarge": Instance("a100", 8, 96, 1152, 400),
    "p5.48xlarge": Instance("h100", 8, 192, 2048, 3200), "p5en.48xlarge": Instance("h200", 8, 192, 2048, 3200),
    "p6-b200.48xlarge": Instance("b200", 8, 192, 2048, 3200),
    "g2-standard-4": Instance("l4", 1, 4, 16, 10), "g2-standard-48": Instance("l4", 4, 48, 192, 50),
    "g2-standard-96": Instance("l4", 8, 96, 384, 100), "a2-highgpu-8g": Instance("a100-40gb", 8, 96, 680, 100),
    "a2-ultragpu-8g": Instance("a100", 8, 96, 1360, 100), "a3-highgpu-8g": Instance("h100", 8, 208, 1872, 800),
    "a3-ultragpu-8g": Instance("h200", 8, 224, 2952, 3200),
}  # fmt: skip


def instance_name(node_config: dict[str, Any]) -> str | None:
    """What a node type's machine is called."""
    name = node_config.get("InstanceType", node_config.get("machineType"))
    return name.rsplit("/", 1)[-1] if isinstance(name, str) else None


def launcher_schema() -> dict[str, Any]:
    """Ray's own JSON schema of a file for `ray up`."""
    found: dict[str, Any] = json.loads((_autoscaler() / "ray-schema.json").read_text(encoding="utf-8"))
    return found


def launcher_defaults(provider: str) -> dict[str, Any]:
    """What Ray fills in where a file says nothing; empty for a provider that this does not know."""
    if provider not in KEYS:
        return {}
    path = _autoscaler() / provider / "defaults.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def _autoscaler() -> Path:
    """The folder of Ray's launcher, without importing Ray, which takes seconds."""
    spec = find_spec("ray")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "ray is not installed, and its schema of cluster files is in it; install distml's dependencies"
        )
    return Path(spec.submodule_search_locations[0]) / "autoscaler"
