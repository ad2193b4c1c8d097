"""Manifests for KubeRay: its schema, the rules of its operator that are only in Go, and what both let through.

The rules are those of ray-operator/controllers/ray/utils/validation.go. What is refused there leaves a cluster that
never comes, with the reason in the operator's log; here it is a line. Other kinds in a file (a network policy, a volume
claim) are looked at as far as Ray's pods depend on them.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from packaging.version import InvalidVersion, Version

from distml.launch.check import versions
from distml.launch.check.json_schema import schema_problems
from distml.launch.check.secret_values import secrets_in
from distml.launch.check.shapes import mapping, sequence
from distml.launch.check.shell import LOOPBACK, listens_everywhere
from distml.spec.messages import Problem, near, shorten
from distml.spec.yaml import KeyPath

SCHEMA = Path(__file__).with_name("kuberay_schema.json")
NAME = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
LONGEST = {"RayCluster": 53, "RayJob": 47}
GPU = "nvidia.com/gpu"
TOKEN_SINCE, KUBERNETES_TOKEN_SINCE = Version("2.52.0"), Version("2.55.0")
KEPT = {"persistentVolumeClaim", "nfs", "csi"}
OPEN_SERVICES = ("LoadBalancer", "NodePort")


@dataclass(frozen=True)
class Group:
    """The pods of the head, or of one group of workers."""

    name: str
    data: dict[str, Any]
    path: KeyPath

    @cached_property
    def pod(self) -> dict[str, Any]:
        """The specification of its pods."""
        return mapping(mapping(self.data.get("template")).get("spec"))

    @property
    def labels(self) -> dict[str, Any]:
        """Of its pods."""
        return mapping(mapping(mapping(self.data.get("template")).get("metadata")).get("labels"))

    @property
    def containers(self) -> list[dict[str, Any]]:
        """Ray's is the first."""
        return [mapping(one) for one in sequence(self.pod.get("containers"))]

    @property
    def start(self) -> dict[str, Any]:
        """The options of `ray start`."""
        return mapping(self.data.get("rayStartParams"))

    @property
    def gpus(self) -> int:
        """Of each pod, as Kubernetes is asked for them."""
        limits = mapping(mapping(next(iter(self.containers), {}).get("resources")).get("limits"))
        found = str(limits.get(GPU, 0))
        return int(found) if found.isdigit() else 0

    def at(self, *keys: str | int) -> KeyPath:
        """The path of something in its container."""
        return (*self.path, "template", "spec", "containers", 0, *keys)


@dataclass(frozen=True)
class Cluster:
    """A RayCluster, alone or in a RayJob."""

    spec: dict[str, Any]
    path: KeyPath
    labels: dict[str, Any]

    @cached_property
    def head(self) -> Group:
        """Of the head."""
        return Group("head", mapping(self.spec.get("headGroupSpec")), (*self.path, "headGroupSpec"))

    @cached_property
    def workers(self) -> list[Group]:
        """The groups of workers."""
        groups = [mapping(one) for one in sequence(self.spec.get("workerGroupSpecs"))]
        return [Group(str(one.get("groupName", index)), one, (*self.path, "workerGroupSpecs", index))
                for index, one in enumerate(groups)]  # fmt: skip

    @property
    def groups(self) -> list[Group]:
        """All of them."""
        return [self.head, *self.workers]

    @property
    def auth(self) -> dict[str, Any] | None:
        """Its block `authOptions`."""
        found = self.spec.get("authOptions")
        return found if isinstance(found, dict) else None

    @property
    def has_token(self) -> bool:
        """Whether the operator starts it with a token; the block's own default is that it does."""
        if self.auth is not None:
            return str(self.auth.get("mode", "token")) == "token"
        return all(any(mapping(entry).get("name") == "RAY_AUTH_MODE" and entry.get("value") == "token"
                       for container in group.containers[:1] for entry in sequence(container.get("env")))
                   for group in self.groups)  # fmt: skip

    @property
    def dashboard_is_local(self) -> bool:
        """Whether the dashboard listens inside the head's pod only; the operator's default is that it does not."""
        return str(self.head.start.get("dashboard-host", "0.0.0.0")) in LOOPBACK


def kuberay_problems(data: dict[str, Any], others: list[dict[str, Any]]) -> Iterator[Problem]:
    """Everything that is wrong in one document of a manifest.

    Args:
        data: the document.
        others: all documents of the file.
    """
    kind, metadata = str(data.get("kind", "")), mapping(data.get("metadata"))
    if kind in LONGEST:
        yield from _kind(data, kind)
        yield from _name(kind, metadata.get("name"))
        spec = mapping(data.get("spec"))
        if kind == "RayJob":
            yield from _job(spec)
        inner = spec.get("rayClusterSpec") if kind == "RayJob" else spec
        if isinstance(inner, dict):
            path: KeyPath = ("spec", "rayClusterSpec") if kind == "RayJob" else ("spec",)
            cluster = Cluster(inner, path, mapping(metadata.get("labels")))
            yield from _cluster(cluster, kind, str(metadata.get("name")), others)
            if kind == "RayJob":
                yield from _job_on(spec, cluster)
    elif "ray.io/" in str(data.get("apiVersion")):
        hint = near(kind, LONGEST)
        yield Problem(f"the kind {shorten(kind)} is not checked here; " + (f"did you mean {hint!r}?" if hint else
                      f"known: {', '.join(LONGEST)}"), (("kind",),), "value")  # fmt: skip
    yield from _open_service(data, kind)
    if kind == "Secret" and (data.get("data") or data.get("stringData")):
        yield Problem("a secret's value stands in the file; make it with kubectl create secret and name it here",
                      (("stringData",), ("data",)))  # fmt: skip
    else:
        yield from secrets_in(data)


def _kind(data: dict[str, Any], kind: str) -> Iterator[Problem]:
    version = data.get("apiVersion")
    if version != "ray.io/v1":
        why = ", which KubeRay is about to drop" if version == "ray.io/v1alpha1" else ""
        yield Problem(f"apiVersion is {shorten(version)}{why}; write ray.io/v1", (("apiVersion",), ()), "value")
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    whole = {
        "type": "object", "required": ["apiVersion", "kind", "metadata", "spec"], "additionalProperties": False,
        "properties": {"apiVersion": {}, "kind": {}, "metadata": {"type": "object"}, "spec": schema["kinds"][kind]},
        "$defs": schema["$defs"],
    }  # fmt: skip
    yield from schema_problems(data, Draft202012Validator(whole))


def _name(kind: str, name: Any) -> Iterator[Problem]:
    longest = LONGEST[kind]
    if not isinstance(name, str) or not NAME.match(name):
        yield Problem(f"metadata.name {shorten(name)} must be lower-case letters, digits and '-', and begin with a "
                      "letter; rename it", (("metadata", "name"), ("metadata",)), "value")  # fmt: skip
    elif len(name) > longest:
        yield Problem(f"metadata.name has {len(name)} characters, the operator allows {longest}; shorten it",
                      (("metadata", "name"),), "value")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- cluster
def _cluster(cluster: Cluster, kind: str, name: str, others: list[dict[str, Any]]) -> Iterator[Problem]:
    for group in cluster.groups:
        yield from _group(cluster, group)
    yield from _token(cluster, kind)
    yield from _reachable(cluster, kind, name, others)
    yield from _gpus(cluster)
    yield from _cluster_versions(cluster)


def _group(cluster: Cluster, group: Group) -> Iterator[Problem]:
    if group.data and not group.containers:
        yield Problem(f"the {group.name} group has no container; add one", (group.path,))
        return
    given = [key for key in ("num-cpus", "num-gpus", "memory", "resources") if key in group.start]
    if given and group.data.get("resources"):
        yield Problem(f"{group.name}: resources stand in rayStartParams ({', '.join(given)}) and in resources, which "
                      "the operator refuses; keep one", ((*group.path, "resources"),))  # fmt: skip
    volumes = {str(mapping(one).get("name")) for one in sequence(group.pod.get("volumes"))}
    for index, container in enumerate(group.containers):
        for number, mount in enumerate(sequence(container.get("volumeMounts"))):
            if str(mapping(mount).get("name")) not in volumes:
                place = (*group.path, "template", "spec", "containers", index, "volumeMounts", number, "name")
                yield Problem(f"{group.name}: no volume is called {shorten(mapping(mount).get('name'))}; add it to "
                              "volumes, or correct the name", (place,), "value")  # fmt: skip
        for key in ("command", "args"):
            for number, word in enumerate(sequence(container.get(key))):
                part = listens_everywhere(str(word))
                if part:
                    place = (*group.path, "template", "spec", "containers", index, key, number)
                    yield Problem(f"{part} makes a service listen on every interface; use 127.0.0.1 and kubectl "
                                  "port-forward", (place,), "value")  # fmt: skip
    if group is not cluster.head:
        yield from _replicas(cluster, group)


def _replicas(cluster: Cluster, group: Group) -> Iterator[Problem]:
    scales = bool(cluster.spec.get("enableInTreeAutoscaling"))
    least, most, number = (group.data.get(key) for key in ("minReplicas", "maxReplicas", "replicas"))
    if not scales and (least is None or most is None):
        yield Problem(f"{group.name} needs minReplicas and maxReplicas, as nothing scales it; add them", (group.path,))
    if isinstance(least, int) and isinstance(most, int) and least > most:
        yield Problem(f"minReplicas of {group.name} is {least}, above its maxReplicas {most}; raise that",
                      ((*group.path, "minReplicas"),))  # fmt: skip
    if isinstance(number, int) and isinstance(most, int) and number > most:
        yield Problem(f"replicas of {group.name} is {number}, above its maxReplicas {most}; raise that",
                      ((*group.path, "replicas"),))  # fmt: skip


def _token(cluster: Cluster, kind: str) -> Iterator[Problem]:
    path, auth = cluster.path, cluster.auth
    if not cluster.has_token:
        where: KeyPath = (*path, "authOptions") if auth is not None else path
        yield Problem("Ray starts without a token, so that every pod that reaches it runs code there; write "
                      "authOptions: {mode: token, secretName: …}", (where,))  # fmt: skip
    if auth is None:
        return
    version = _version(cluster.spec.get("rayVersion"))
    delegated = bool(auth.get("enableK8sTokenAuth"))
    needed = KUBERNETES_TOKEN_SINCE if delegated else TOKEN_SINCE
    if cluster.has_token and (version is None or version < needed):
        said = "is missing" if cluster.spec.get("rayVersion") is None else f"is {cluster.spec['rayVersion']}"
        yield Problem(f"authOptions needs rayVersion {needed} or later, and it {said}; write it",
                      ((*path, "rayVersion"), (*path, "authOptions")))  # fmt: skip
    if delegated and kind == "RayJob":
        yield Problem("enableK8sTokenAuth does not work for a RayJob; remove it",
                      ((*path, "authOptions", "enableK8sTokenAuth"),))  # fmt: skip
    if delegated and auth.get("secretName"):
        yield Problem("enableK8sTokenAuth and secretName exclude each other; remove one",
                      ((*path, "authOptions", "secretName"),))  # fmt: skip


def _reachable(cluster: Cluster, kind: str, name: str, others: list[dict[str, Any]]) -> Iterator[Problem]:
    head, path = cluster.head, cluster.path
    if head.data.get("serviceType") in OPEN_SERVICES:
        yield Problem(f"serviceType {head.data['serviceType']} opens Ray to the outside; remove it and use kubectl "
                      "port-forward", ((*head.path, "serviceType"),))  # fmt: skip
    inner = mapping(mapping(head.data.get("headService")).get("spec")).get("type")
    if inner in OPEN_SERVICES:
        yield Problem(f"a headService of type {inner} opens Ray to the outside; remove it and use kubectl port-forward",
                      ((*head.path, "headService", "spec", "type"),))  # fmt: skip
    if head.data.get("enableIngress"):
        yield Problem("enableIngress opens the dashboard to the outside; remove it and use kubectl port-forward",
                      ((*head.path, "enableIngress"),))  # fmt: skip
    if "networkPolicy" in cluster.spec:
        yield Problem("networkPolicy here needs an alpha feature of the operator that is off; write a NetworkPolicy of "
                      "its own", ((*path, "networkPolicy"),))  # fmt: skip
    labels = {**head.labels, "ray.io/node-type": "head", "ray.io/is-ray-node": "yes"}
    if kind == "RayCluster":
        labels["ray.io/cluster"] = name
    shielded = any(_selects(one, labels) for one in others)
    if kind == "RayJob" and cluster.dashboard_is_local:
        yield Problem("the operator asks the dashboard how the job is, which listens inside the pod only; write "
                      'dashboard-host: "0.0.0.0" and a NetworkPolicy', ((*head.path, "rayStartParams",
                                                                         "dashboard-host"),), "value")  # fmt: skip
    elif not cluster.dashboard_is_local and not shielded:
        said = "on 0.0.0.0" if "dashboard-host" in head.start else "on 0.0.0.0 (KubeRay's default)"
        advice = "" if kind == "RayJob" else ", or write dashboard-host: 127.0.0.1 and use kubectl port-forward"
        yield Problem(f"the dashboard listens {said}, and no NetworkPolicy in this file selects the head's pod; add "
                      f"one{advice}", ((*head.path, "rayStartParams", "dashboard-host"), head.path))  # fmt: skip


def _selects(policy: dict[str, Any], labels: dict[str, Any]) -> bool:
    """Whether a document is a network policy that keeps pods with these labels from what comes in."""
    if policy.get("kind") != "NetworkPolicy":
        return False
    spec = mapping(policy.get("spec"))
    wanted = mapping(mapping(spec.get("podSelector")).get("matchLabels"))
    open_to_all = any(not mapping(rule).get("from") for rule in sequence(spec.get("ingress")))
    covers = "Ingress" in (sequence(spec.get("policyTypes")) or ["Ingress"])
    return covers and not open_to_all and all(labels.get(key) == value for key, value in wanted.items())


def _gpus(cluster: Cluster) -> Iterator[Problem]:
    if cluster.head.gpus and any(group.gpus for group in cluster.workers):
        yield Problem(f"the head has {cluster.head.gpus} GPUs beside those of the workers; it only coordinates: remove "
                      "them", (cluster.head.at("resources", "limits", GPU),))  # fmt: skip
    for group in cluster.groups:
        asked = str(group.start.get("num-gpus", "0"))
        if asked.isdigit() and int(asked) > group.gpus:
            yield Problem(f"{group.name}: num-gpus {asked}, and its pods have {group.gpus} ({GPU} in limits); remove "
                          "it, the operator counts them", ((*group.path, "rayStartParams", "num-gpus"),),
                          "value")  # fmt: skip


def _cluster_versions(cluster: Cluster) -> Iterator[Problem]:
    asked: list[versions.Asked] = []
    written = cluster.spec.get("rayVersion")
    if written is not None:
        asked.append(versions.Asked("ray", str(written), (*cluster.path, "rayVersion")))
    for group in cluster.groups:
        image = next(iter(group.containers), {}).get("image")
        if isinstance(image, str):
            asked += versions.in_image(image, group.at("image"))
            yield from versions.unpinned_image(image, group.at("image"))
    yield from versions.mismatches(asked)


# ----------------------------------------------------------------------------------------------------------------- job
def _job(spec: dict[str, Any]) -> Iterator[Problem]:
    selector, retries = mapping(spec.get("clusterSelector")), spec.get("backoffLimit")
    retries = retries if isinstance(retries, int) else 0
    if not selector and "rayClusterSpec" not in spec:
        yield Problem("a RayJob needs rayClusterSpec, or clusterSelector of a cluster that runs; add one", (("spec",),))
    if selector and not selector.get("ray.io/cluster"):
        yield Problem("clusterSelector needs the key ray.io/cluster with the cluster's name; add it",
                      (("spec", "clusterSelector"),))  # fmt: skip
    for key, bad in (("backoffLimit", retries > 0), ("suspend", bool(spec.get("suspend")))):
        if selector and bad:
            yield Problem(f"{key} does not work with clusterSelector; remove it", (("spec", key),))
    if retries < 0:
        yield Problem(
            f"backoffLimit is {retries}; write how often to try again, 0 or more", (("spec", "backoffLimit"),)
        )
    if spec.get("submissionMode") == "InteractiveMode" and retries:
        yield Problem("backoffLimit does not work in InteractiveMode; remove it", (("spec", "backoffLimit"),))
    ends = bool(spec.get("shutdownAfterJobFinishes"))
    for key in ("ttlSecondsAfterFinished", "suspend"):
        if spec.get(key) and not ends:
            yield Problem(f"{key} needs shutdownAfterJobFinishes: true; add it", (("spec", key),))
    if not ends and not selector:
        yield Problem(
            "the cluster goes on after the job, GPUs and all; add shutdownAfterJobFinishes: true", (("spec",),)
        )
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if isinstance(spec.get(key), int) and spec[key] <= 0:
            yield Problem(f"{key} is {spec[key]}; write a positive number of seconds", (("spec", key),), "value")
    if not spec.get("entrypoint") and spec.get("submissionMode") != "InteractiveMode":
        yield Problem("entrypoint is missing; write, for example, python -m distml run NAME --out DIR", (("spec",),))


def _job_on(spec: dict[str, Any], cluster: Cluster) -> Iterator[Problem]:
    """What a job asks of the cluster that comes with it."""
    asked, most = spec.get("entrypointNumGpus"), max(group.gpus for group in cluster.groups)
    if isinstance(asked, int | float) and asked > most:
        yield Problem(f"entrypointNumGpus is {asked:g}, and no pod has more than {most} GPUs, so the job would wait "
                      "forever; lower it", (("spec", "entrypointNumGpus"),))  # fmt: skip
    words = _words(str(spec.get("entrypoint") or ""))
    if not {"run", "distml"} <= set(words) or not spec.get("backoffLimit"):
        return
    at: KeyPath = ("spec", "entrypoint")
    if "--fresh" in words:
        yield Problem("--fresh makes every retry begin anew; remove it, distml run continues what it finds", (at,))
    out = next((word.partition("=")[2] or following for word, following in zip(words, [*words[1:], ""], strict=True)
                if word.partition("=")[0] == "--out"), None)  # fmt: skip
    if out is None or not any(_is_below(out, mount) for mount in _kept_mounts(cluster.head)):
        said = "has no --out" if out is None else f"writes to {out}"
        yield Problem(f"a retry starts new pods, and the job {said}, which is gone with the old ones; write --out "
                      "below the mountPath of a persistentVolumeClaim of the head", (at,))  # fmt: skip


def _kept_mounts(group: Group) -> list[str]:
    """Where what outlives the pods is mounted."""
    volumes = map(mapping, sequence(group.pod.get("volumes")))
    kept = {str(one["name"]) for one in volumes if "name" in one and KEPT & set(one)}
    mounts = [mapping(one) for container in group.containers[:1] for one in sequence(container.get("volumeMounts"))]
    return [str(mount.get("mountPath")) for mount in mounts if str(mount.get("name")) in kept]


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def _open_service(data: dict[str, Any], kind: str) -> Iterator[Problem]:
    spec = mapping(data.get("spec"))
    if kind == "Service" and spec.get("type") in OPEN_SERVICES:
        yield Problem(f"a Service of type {spec['type']} opens Ray to the outside; remove it and use kubectl "
                      "port-forward", (("spec", "type"),))  # fmt: skip
    if kind == "Ingress":
        yield Problem("an Ingress opens Ray to the outside; remove it and use kubectl port-forward", (("kind",),))


def _version(text: Any) -> Version | None:
    try:
        return Version(str(text)) if text is not None else None
    except InvalidVersion:
        return None
