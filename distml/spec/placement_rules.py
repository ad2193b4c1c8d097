"""Rules of where processes go: accelerators, labels, servers; and what of it one process alone cannot do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distml.spec.accelerators import ACCELERATORS, similar_accelerators
from distml.spec.labels import is_label_key, is_label_selector
from distml.spec.messages import Problem
from distml.spec.schema import JobSpec, ParameterServerSpec
from distml.spec.yaml import KeyPath

TYPE_LABEL = "ray.io/accelerator-type"


def check_placement(job: JobSpec) -> Iterator[Problem]:
    """Names that no node can have, and servers that would not be started."""
    asked = job.resources.accelerator
    if asked is not None and asked not in ACCELERATORS:
        similar = similar_accelerators(asked) or ["L4", "A100", "H100"]
        yield Problem(
            f"unknown accelerator {asked!r}; did you mean {' or '.join(similar)}? "
            f"For one that Ray's list lacks set resources.labels: {{{TYPE_LABEL}: NAME}}",
            (("resources", "accelerator"),), "value",
        )  # fmt: skip
    yield from _labels(job.resources.labels, ("resources", "labels"))
    if isinstance(job.strategy, ParameterServerSpec):
        yield from _labels(job.strategy.server_labels, ("strategy", "server_labels"))
        yield from _servers(job, job.strategy)


def _labels(labels: Mapping[str, str], path: KeyPath) -> Iterator[Problem]:
    name = ".".join(str(part) for part in path)
    for key, asked in labels.items():
        if not is_label_key(key):
            yield Problem(
                f"{name}: {key!r} is no name of a label; write letters, digits, - _ and . (with an optional prefix "
                "before a /), at most 63, as in zone or ray.io/market-type",
                ((*path, key), path),
            )
        elif not is_label_selector(asked):
            yield Problem(
                f"{name}.{key}: {asked!r} is no label selector; write a value, !value, in(a, b) or !in(a, b)",
                ((*path, key), path), "value",
            )  # fmt: skip


def _servers(job: JobSpec, strategy: ParameterServerSpec) -> Iterator[Problem]:
    if strategy.server_placement == "colocated" and strategy.server_labels:
        yield Problem(
            "server_labels chooses among nodes, and server_placement colocated takes the workers'; remove one of them",
            (("strategy", "server_labels"),),
        )
    key = "server_placement" if strategy.server_placement == "apart" else "server_labels"
    if strategy.places_servers and job.transport == "shared_memory":
        yield Problem(
            f"strategy.{key} places server processes, and with transport shared_memory there are none; remove it, or "
            "set transport to auto or object_store",
            (("strategy", key), ("transport",)),
        )
    if strategy.server_placement == "apart" and "ray.io/node-id" in job.resources.labels:
        yield Problem(
            "server_placement apart chooses nodes by ray.io/node-id itself; remove that from resources.labels",
            (("resources", "labels", "ray.io/node-id"), ("resources", "labels")),
        )


def why_not_inline(job: JobSpec, who: str = "workers") -> str | None:
    """What a job asks of nodes that one process cannot give, one line; None: nothing.

    Args:
        who: shares the process.
    """
    if job.resources.gpus_per_worker:
        return f"resources.gpus_per_worker needs --runtime ray: inline {who} share one process on the CPU"
    strategy = job.strategy
    asked = [key for key in ("accelerator", "labels") if getattr(job.resources, key)]
    keys = [f"resources.{key}" for key in asked]
    if isinstance(strategy, ParameterServerSpec) and strategy.places_servers:
        keys.append("strategy.server_labels" if strategy.server_labels else "strategy.server_placement: apart")
    if not keys:
        return None
    return f"{keys[0]} needs --runtime ray: inline {who} share one process, wherever it runs"
