"""Files for `ray up`: Ray's own schema, and what it lets through.

Ray checks the shape of the file only. What it forgets in silence (unknown keys of the provider), finds after machines
were paid for (no such file to copy, workers that can not start), or leaves open (dashboard, token) is looked for here.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonschema import Draft7Validator

from distml.launch.check import versions
from distml.launch.check.json_schema import schema_problems
from distml.launch.check.providers import (
    EVERY,
    INSTANCES,
    KEYS,
    NEEDED,
    OTHER_PROVIDERS,
    instance_name,
    launcher_defaults,
    launcher_schema,
)
from distml.launch.check.secret_values import secrets_in
from distml.launch.check.shapes import mapping, sequence
from distml.launch.check.shell import LOOPBACK, RayStart, environment_of, listens_everywhere, ray_starts
from distml.spec.messages import Problem, near, shorten
from distml.spec.yaml import KeyPath, dotted

SETUP = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
STARTS = {"head_start_ray_commands": "head", "worker_start_ray_commands": "worker"}
TOKEN_FILE = ".ray/auth_token"
TOKEN_ADVICE = "write export RAY_AUTH_MODE=token; before ray start"
SSH = 22
ANYWHERE = ("0.0.0.0/0", "::/0")


@dataclass(frozen=True)
class Launch:
    """A file for `ray up`, whatever is wrong with it; where it says nothing, Ray's defaults."""

    data: dict[str, Any]

    @cached_property
    def provider(self) -> dict[str, Any]:
        """Its block `provider`."""
        return mapping(self.data.get("provider"))

    @cached_property
    def kind(self) -> str:
        """The provider's type; "" where it is not said."""
        return str(self.provider.get("type") or "")

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """What Ray fills in."""
        return launcher_defaults(self.kind)

    @cached_property
    def types(self) -> dict[str, dict[str, Any]]:
        """The node types by name."""
        return {name: mapping(one) for name, one in mapping(self.data.get("available_node_types")).items()}

    @property
    def docker(self) -> dict[str, Any]:
        """Its block `docker`."""
        return mapping(self.data.get("docker"))

    def commands(self, *keys: str) -> Iterator[tuple[str, KeyPath]]:
        """The commands that the file has under these keys, also those of single node types."""
        blocks: list[tuple[dict[str, Any], KeyPath]] = [
            (self.data, ()),
            *((one, ("available_node_types", name)) for name, one in self.types.items()),
        ]
        for block, path in blocks:
            for key in keys:
                yield from ((one, (*path, key, index)) for index, one in _strings(block.get(key)))

    def starts(self, role: str) -> Iterator[tuple[RayStart, KeyPath]]:
        """Each `ray start` of the heads or of the workers that the file writes."""
        key = next(key for key, of in STARTS.items() if of == role)
        yield from ((start, path) for command, path in self.commands(key) for start in ray_starts(command))

    def gpus(self, name: str) -> int:
        """How many a node type has."""
        found = mapping(self.types.get(name, {}).get("resources")).get("GPU", 0)
        return found if isinstance(found, int) else 0

    def images(self) -> Iterator[tuple[str, KeyPath]]:
        """The containers that nodes run in."""
        blocks = [(self.docker, ("docker",)), *((mapping(one.get("docker")), ("available_node_types", name, "docker"))
                                                for name, one in self.types.items())]  # fmt: skip
        for block, path in blocks:
            for key in ("image", "head_image", "worker_image"):
                if isinstance(block.get(key), str):
                    yield block[key], (*path, key)


def ray_up_problems(data: dict[str, Any]) -> Iterator[Problem]:
    """Everything that is wrong in a file for `ray up`."""
    launch = Launch(data)
    # Ray takes this one out before it looks at its schema.
    yield from schema_problems({key: value for key, value in data.items() if key != "min_workers"},
                               Draft7Validator(launcher_schema()))  # fmt: skip
    yield from _provider(launch)
    yield from _node_types(launch)
    yield from _machines(launch)
    yield from _mounts(launch)
    yield from _docker(launch)
    yield from _start_commands(launch)
    yield from _tokens(launch)
    yield from _open_ports(launch)
    yield from _versions(launch)
    yield from secrets_in({key: value for key, value in data.items() if key != "file_mounts"})
    for key in ("aws_credentials", "gcp_credentials"):
        if key in launch.provider:
            yield Problem(f"provider.{key} keeps credentials in the file; log in with the cloud's own command, which "
                          "keeps them in your home", (("provider", key),))  # fmt: skip


# ------------------------------------------------------------------------------------------------ provider, node types
def _provider(launch: Launch) -> Iterator[Problem]:
    kind, provider = launch.kind, launch.provider
    if not kind:
        return  # the schema says so
    if kind not in KEYS:
        if kind not in OTHER_PROVIDERS:
            known = [*KEYS, *OTHER_PROVIDERS]
            hint = f"did you mean {near(kind, known)!r}?" if near(kind, known) else f"known: {', '.join(known)}"
            yield Problem(f"unknown provider {shorten(kind)}; {hint}", (("provider", "type"),), "value")
        return
    known = sorted(EVERY | KEYS[kind])
    for key in provider:
        if key not in known:
            hint = f"did you mean {near(key, known)!r}?" if near(key, known) else f"known: {', '.join(known)}"
            yield Problem(f"unknown key {shorten(key)} of the provider {kind}, which Ray forgets in silence; {hint}",
                          (("provider", key),))  # fmt: skip
    if kind == "local" and "coordinator_address" in provider:
        if "max_workers" not in launch.data:
            yield Problem("a coordinator needs max_workers; add it", (("provider", "coordinator_address"),))
        return
    for key in NEEDED[kind]:
        if provider.get(key) in (None, "", []) and not (key == "worker_ips" and key in provider):
            yield Problem(f"provider.{key} is missing, without which {kind} can not start anything; add it",
                          (("provider", key), ("provider",)))  # fmt: skip
    yield from _local(launch) if kind == "local" else ()


def _local(launch: Launch) -> Iterator[Problem]:
    for key in ("available_node_types", "head_node_type", "head_node", "worker_nodes"):
        if launch.data.get(key):
            yield Problem(f"the provider local has its machines from head_ip and worker_ips; remove {key}", ((key,),))
    if not mapping(launch.data.get("auth")).get("ssh_user"):
        yield Problem("auth.ssh_user is missing; write the user to log in as", (("auth",), ("provider",)))
    ips = launch.provider.get("worker_ips")
    number = len(ips) if isinstance(ips, list) else 0
    for key in ("min_workers", "max_workers"):
        wanted = launch.data.get(key)
        if isinstance(wanted, int) and wanted > number:
            yield Problem(f"{key} is {wanted}, and provider.worker_ips names {number} machines; lower it", ((key,),))
    if isinstance(ips, list) and launch.provider.get("head_ip") in ips:
        yield Problem("provider.head_ip is among worker_ips; each machine is one of them, remove it there",
                      (("provider", "worker_ips"),), "value")  # fmt: skip


def _node_types(launch: Launch) -> Iterator[Problem]:
    if launch.kind == "local":
        return
    types, most = launch.types, launch.data.get("max_workers")
    head = launch.data.get("head_node_type")
    if launch.kind in KEYS and not types:
        yield Problem("available_node_types is missing, so Ray would start its own default machines, without GPUs; "
                      "write them", ())  # fmt: skip
    if types and head is None:
        yield Problem("the key 'head_node_type' is missing; name one of available_node_types",
                      (("available_node_types",),))  # fmt: skip
    elif types and str(head) not in types:
        hint = f"did you mean {near(str(head), types)!r}?" if near(str(head), types) else f"known: {', '.join(types)}"
        yield Problem(f"head_node_type {shorten(head)} is not in available_node_types; {hint}",
                      (("head_node_type",),), "value")  # fmt: skip
    least = {name: one.get("min_workers", 0) for name, one in types.items()}
    for name, one in types.items():
        if (
            isinstance(least[name], int)
            and isinstance(one.get("max_workers"), int)
            and least[name] > one["max_workers"]
        ):
            yield Problem(f"min_workers of {name} is {least[name]}, above its max_workers {one['max_workers']}; raise "
                          "that", (("available_node_types", name, "min_workers"),))  # fmt: skip
    together = sum(number for number in least.values() if isinstance(number, int))
    effective = most if isinstance(most, int) else launch.defaults.get("max_workers")
    if isinstance(effective, int) and together > effective:
        said = f"max_workers is {effective}" + ("" if most is not None else " (Ray's default)")
        yield Problem(f"{said}, below the {together} that min_workers of the node types come to; raise it",
                      (("max_workers",), ("available_node_types",)))  # fmt: skip


def _machines(launch: Launch) -> Iterator[Problem]:
    for name, one in launch.types.items():
        path: KeyPath = ("available_node_types", name)
        kind = instance_name(mapping(one.get("node_config")))
        if kind is None:
            if launch.kind in ("aws", "gcp"):
                key = "InstanceType" if launch.kind == "aws" else "machineType"
                yield Problem(f"node_config of {name} does not say {key}; add it", ((*path, "node_config"), path))
            continue
        known, given = INSTANCES.get(kind), mapping(one.get("resources"))
        has = {"GPU": known.num_gpus, "CPU": known.num_cpus} if known else {}
        for resource, number in has.items():
            asked = given.get(resource)
            if isinstance(asked, int) and asked > number:
                yield Problem(f"{name} says {asked} of {resource}, and a {kind} has {number}; what asks for more waits "
                              "forever: correct it", ((*path, "resources", resource),), "value")  # fmt: skip
        if known and given.get("GPU") in (None, 0):
            yield Problem(f"{name} is a {kind}, whose {known.num_gpus} GPUs its resources leave out; add GPU: "
                          f"{known.num_gpus}, or take a cheaper machine", ((*path, "resources"), path))  # fmt: skip
        gpu_flag = launch.kind == "gcp" and "guestAccelerators" in mapping(one.get("node_config"))
        if launch.gpus(name) and known is None and launch.kind == "gcp" and not gpu_flag:
            yield Problem(f"{name} says GPU: {launch.gpus(name)}, and a {kind} without guestAccelerators has none; add "
                          "them", ((*path, "resources", "GPU"),), "value")  # fmt: skip
    yield from _idle_head(launch)
    yield from _more_gpus_than_there_are(launch)


def _idle_head(launch: Launch) -> Iterator[Problem]:
    head = str(launch.data.get("head_node_type"))
    others = [name for name, one in launch.types.items() if name != head and one.get("max_workers", 1) != 0]
    if launch.gpus(head) and any(launch.gpus(name) for name in others):
        places: tuple[KeyPath, ...] = (("available_node_types", head, "resources", "GPU"), ("head_node_type",))
        yield Problem(f"the head node has {launch.gpus(head)} GPUs beside those of the workers; it coordinates, and "
                      "must outlive them: give it a machine without", places)  # fmt: skip


def _more_gpus_than_there_are(launch: Launch) -> Iterator[Problem]:
    most = max((launch.gpus(name) for name in launch.types), default=None)
    for role in STARTS.values():
        for start, path in launch.starts(role):
            asked = start.options.get("num-gpus", "0")
            if most is not None and asked.isdigit() and int(asked) > most:
                yield Problem(f"ray start --num-gpus={asked}, and no node type has more than {most} GPUs; remove it, "
                              "Ray counts them", (path,), "value")  # fmt: skip


# ------------------------------------------------------------------------------------------------- files and containers
def _mounts(launch: Launch) -> Iterator[Problem]:
    for remote, local in mapping(launch.data.get("file_mounts")).items():
        path: KeyPath = ("file_mounts", remote)
        if not isinstance(local, str):
            yield Problem(f"{dotted(path)} must be a path on this machine; write one", (path,), "value")
            continue
        source = Path(local).expanduser()
        if not source.exists():
            advice = "ray get-auth-token --generate > /dev/null writes one" if local.endswith(TOKEN_FILE) else (
                "make it, or correct the path, which is as seen from where ray up runs")  # fmt: skip
            yield Problem(f"there is no {local} to copy to {remote}; {advice}", (path,), "value")
        elif remote.endswith(TOKEN_FILE) and readable_by_others(source):
            yield Problem(f"the token in {local} can be read by other users; chmod 600 {local}", (path,), "value")
    key = mapping(launch.data.get("auth")).get("ssh_private_key")
    if isinstance(key, str) and not Path(key).expanduser().exists():
        yield Problem(f"there is no {key}; write the path of the key to log in with", (("auth", "ssh_private_key"),),
                      "value")  # fmt: skip
    if key is not None and launch.kind == "aws":
        for name, one in launch.types.items():
            config = mapping(one.get("node_config"))
            if "KeyName" not in config and "UserData" not in config:
                yield Problem(f"auth.ssh_private_key is given, so node_config of {name} needs KeyName; add it, or "
                              "remove ssh_private_key and Ray makes one",
                              (("available_node_types", name, "node_config"),))  # fmt: skip


def readable_by_others(path: Path) -> bool:
    """Whether a file may be read by anyone but its owner."""
    return os.name == "posix" and bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def _docker(launch: Launch) -> Iterator[Problem]:
    docker = launch.docker
    images = [key for key in ("image", "head_image", "worker_image") if docker.get(key)]
    if images and not docker.get("container_name"):
        yield Problem("docker needs container_name beside the image; add it", (("docker",),))
    if docker.get("container_name") and "image" not in images and {"head_image", "worker_image"} - set(images):
        yield Problem("docker needs image, or both head_image and worker_image; add it", (("docker",),))


# -------------------------------------------------------------------------------------------- start commands, token
def _start_commands(launch: Launch) -> Iterator[Problem]:
    for key, role in STARTS.items():
        if key not in launch.data and launch.kind in KEYS:
            opened = any(start.dashboard_host not in LOOPBACK for _, command in _strings(launch.defaults.get(key))
                         for start in ray_starts(command))  # fmt: skip
            what = "open the dashboard on 0.0.0.0 and start" if opened else "start"
            yield Problem(f"{key} is missing, and Ray's own {what} without a token; write them", ())
        elif key in launch.data and not any(True for _ in launch.starts(role)):
            yield Problem(f"{key} has no ray start; add it", ((key,),))
    for start, path in launch.starts("head"):
        if not start.is_head:
            yield Problem("ray start of the head node needs --head; add it", (path,), "value")
        if start.dashboard_host not in LOOPBACK:
            yield Problem(f"--dashboard-host={start.dashboard_host} opens dashboard and Jobs API to the network; use "
                          "--dashboard-host=127.0.0.1 and an ssh tunnel", (path,), "value")  # fmt: skip
        if "autoscaling-config" not in start.options and (launch.types or launch.kind == "local"):
            yield Problem("ray start --head without --autoscaling-config=~/ray_bootstrap_config.yaml never starts "
                          "workers; add it", (path,), "value")  # fmt: skip
    ports = {start.options.get("port", "6379") for start, _ in launch.starts("head")}
    for start, path in launch.starts("worker"):
        address = start.options.get("address", "")
        if start.is_head or not address:
            yield Problem("ray start of a worker needs --address=$RAY_HEAD_IP:6379 and no --head; correct it", (path,),
                          "value")  # fmt: skip
        elif ports and address.rpartition(":")[2] not in ports:
            yield Problem(f"workers look for the head at {address}, and it listens on port {', '.join(sorted(ports))}; "
                          "use the same", (path,), "value")  # fmt: skip


def _tokens(launch: Launch) -> Iterator[Problem]:
    in_container = environment_of(str(one) for _, one in _strings(launch.docker.get("run_options")))
    token_paths = {in_container.get("RAY_AUTH_TOKEN_PATH")}
    started = False
    for role in STARTS.values():
        for start, path in launch.starts(role):
            started = True
            environment: Mapping[str, str] = {**in_container, **start.environment}
            token_paths.add(environment.get("RAY_AUTH_TOKEN_PATH"))
            mode = environment.get("RAY_AUTH_MODE")
            if mode != "token":
                what = "without a token" if mode is None else f"with RAY_AUTH_MODE={mode}"
                yield Problem(f"the {role} starts {what}, so that whoever reaches it runs code there; {TOKEN_ADVICE}",
                              (path,), "value")  # fmt: skip
    mounts = mapping(launch.data.get("file_mounts"))
    if started and not any(remote.endswith(TOKEN_FILE) or remote in token_paths for remote in mounts):
        yield Problem(f"no token is copied to the nodes, and ray up does not do so itself; add ~/{TOKEN_FILE}: "
                      f"~/{TOKEN_FILE} to file_mounts", (("file_mounts",), ()))  # fmt: skip


def _open_ports(launch: Launch) -> Iterator[Problem]:
    for command, path in launch.commands(*SETUP, *STARTS):
        opened = any(start.dashboard_host not in LOOPBACK for start in ray_starts(command))
        part = listens_everywhere(command)
        if part and not opened:
            yield Problem(f"{part} makes a service listen on every interface; use 127.0.0.1 and an ssh tunnel", (path,),
                          "value")  # fmt: skip
    for key in ("run_options", "head_run_options", "worker_run_options"):
        for index, option in _strings(launch.docker.get(key)):
            if re.search(r"(^|\s)(-p|-P|--publish|--publish-all)(\s|=|$|\d)", option):
                yield Problem(f"{option} opens a port of the container; remove it and use an ssh tunnel",
                              (("docker", key, index),), "value")  # fmt: skip
    group = mapping(launch.provider.get("security_group"))
    for index, rule in enumerate(sequence(group.get("IpPermissions"))):
        rule = mapping(rule)
        ranges = [*(sequence(rule.get("IpRanges"))), *(sequence(rule.get("Ipv6Ranges")))]
        anyone = any(value in ANYWHERE for one in ranges for value in mapping(one).values())
        ports = (rule.get("FromPort"), rule.get("ToPort"))
        if anyone and ports != (SSH, SSH):
            yield Problem(f"ports {ports[0]} to {ports[1]} are opened to everyone; remove the rule, ssh is open "
                          "already and tunnels the rest",
                          (("provider", "security_group", "IpPermissions", index),), "value")  # fmt: skip


def _versions(launch: Launch) -> Iterator[Problem]:
    asked: list[versions.Asked] = []
    for image, path in launch.images():
        asked += versions.in_image(image, path)
        yield from versions.unpinned_image(image, path)
    for command, path in launch.commands(*SETUP):
        asked += versions.in_command(command, path)
        yield from versions.unpinned(command, path)
    yield from versions.mismatches(asked)


def _strings(value: Any) -> Iterator[tuple[int, str]]:
    """The strings of a list, with their places."""
    for index, one in enumerate(sequence(value)):
        if isinstance(one, str):
            yield index, one
