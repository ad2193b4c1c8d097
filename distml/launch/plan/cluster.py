"""The cluster file of `distml plan`: what machines there are, and how they are linked. Strictly checked, no torch.

    nodes: 2
    gpus_per_node: 8
    gpu: h100                                  # by name, or {memory_gib: 79.6, tflops: 989}
    host_memory_gib: 2000
    links:
      intra: {latency_us: 5, gb_per_s: 400}    # of each GPU to the others of its node
      inter: {latency_us: 15, gb_per_s: 50}    # of each GPU to those of other nodes
    price_per_gpu_hour: 2.5

Two to begin with are in `clusters/`. `read_cluster` is the one way in: a file for `ray up` is told there from its keys,
and becomes a `ClusterSpec` too, where its machines are known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, ValidationError

from distml.errors import UsageError
from distml.spec.base import Block, Count, NonNegative, Positive
from distml.spec.blocks import expand
from distml.spec.loader import first_error
from distml.spec.messages import Problem, describe, problems_of, unknown
from distml.spec.yaml import Document, parse

GIB = 2.0**30
_FOR_RAY_UP = re.compile(rb"(?m)^cluster_name\s*:")


@dataclass(frozen=True)
class Card:
    """A GPU as its maker gives it.

    Attributes:
        memory_gib: what programs see of it.
        tflops: dense bf16 (fp16 where there is no bf16), 10^12 operations per second.
        gb_per_s: to each other card of its node, one way, 10^9 bytes per second.
    """

    memory_gib: float
    tflops: float
    gb_per_s: float


CARDS = {
    "v100": Card(31.7, 125, 150), "a100-40gb": Card(39.4, 312, 300), "a100": Card(79.2, 312, 300),
    "h100": Card(79.6, 989, 450), "h200": Card(139.8, 989, 450), "b200": Card(178.0, 2250, 900),
    "l4": Card(22.0, 121, 32), "l40s": Card(44.4, 362, 32), "rtx4090": Card(23.6, 165, 32),
}  # fmt: skip


class GPUSpec(Block):
    """A card by its name, or by its numbers; a number beside the name goes before the name's."""

    shorthand: ClassVar[str | None] = "name"

    name: str | None = Field(None, description=f"one of {', '.join(CARDS)}")
    memory_gib: Positive | None = Field(None, description="what programs see of its memory")
    tflops: Positive | None = Field(None, description="dense bf16 peak, 10^12 per second")


class LinkSpec(Block):
    """A link of each device: a message of b bytes takes latency + b / bandwidth."""

    latency_us: NonNegative
    gb_per_s: Positive = Field(description="10^9 bytes per second, one way")


class LinksSpec(Block):
    """Of each device to the others."""

    intra: LinkSpec | None = Field(None, description="of its node; null: the card's own, else memory's")
    inter: LinkSpec = Field(LinkSpec(latency_us=20.0, gb_per_s=12.5), description="of other nodes")


class ClusterSpec(Block):
    """Equal machines, linked equally."""

    nodes: Count = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    cpus_per_node: Count | None = None
    gpu: GPUSpec | None = None
    cpu_tflops: Positive | None = Field(None, description="float32 of each worker on CPUs; null: this machine's")
    host_memory_gib: Positive | None = Field(None, description="of each node")
    links: LinksSpec = LinksSpec()
    utilisation: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.4, description="share of the peak that training reaches: MFU"
    )
    price_per_gpu_hour: NonNegative | None = None

    @property
    def card(self) -> Card | None:
        """The numbers of its GPUs; None: it has none."""
        if self.gpu is None:
            return None
        known = CARDS.get(self.gpu.name or "", Card(0.0, 0.0, 32.0))
        return Card(self.gpu.memory_gib or known.memory_gib, self.gpu.tflops or known.tflops, known.gb_per_s)

    @property
    def card_name(self) -> str:
        """What to call one."""
        return (self.gpu.name if self.gpu is not None else None) or "GPU"


def read_cluster(path: Path) -> ClusterSpec:
    """Read and check a cluster file.

    Raises:
        UsageError: one line, `file:line:column: what is wrong; what to do`.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    if _FOR_RAY_UP.search(raw):
        return _of_ray_up(path)
    document = parse(raw, str(path))
    if not isinstance(document.data, dict):
        found = "it is empty" if document.data is None else f"got {describe(document.data)}"
        raise document.start.error(f"a cluster file must be a mapping of keys, {found}; begin with 'nodes: 1'")
    return _checked(document)


def _of_ray_up(path: Path) -> ClusterSpec:
    from distml.launch.check.rented import rented

    machines = rented(path)
    kind, latency = machines.kind, LinksSpec().inter.latency_us
    per_card = kind.gbit_per_s / 8.0 / kind.num_gpus
    return ClusterSpec(
        nodes=machines.num_nodes, gpus_per_node=kind.num_gpus, cpus_per_node=kind.num_cpus,
        gpu=GPUSpec(name=kind.card, memory_gib=None, tflops=None), host_memory_gib=kind.memory_gib,
        links=LinksSpec(intra=None, inter=LinkSpec(latency_us=latency, gb_per_s=per_card)),
    )  # fmt: skip


def _checked(document: Document) -> ClusterSpec:
    document.data = expand(document.data, ClusterSpec)
    try:
        cluster = ClusterSpec.model_validate(document.data)
    except ValidationError as error:
        raise first_error(problems_of(error, ClusterSpec), document) from None
    problems = list(_across_keys(cluster))
    if problems:
        raise first_error(problems, document)
    return cluster


def _across_keys(cluster: ClusterSpec) -> list[Problem]:
    gpu = cluster.gpu
    if gpu is None:
        lacks = [Problem(f"gpus_per_node is {cluster.gpus_per_node}, and the key 'gpu' is missing; add it, for example "
                         "gpu: h100", (("gpus_per_node",),))]  # fmt: skip
        return lacks if cluster.gpus_per_node else []
    if gpu.name is not None and gpu.name not in CARDS and not (gpu.memory_gib and gpu.tflops):
        text = f"{unknown('gpu', gpu.name, CARDS)}; or give memory_gib and tflops"
        return [Problem(text, (("gpu", "name"), ("gpu",)), "value")]
    if gpu.name is None and not (gpu.memory_gib and gpu.tflops):
        return [Problem("gpu needs a name, or memory_gib and tflops; add them", (("gpu",),))]
    if not cluster.gpus_per_node:
        return [Problem("gpu is given, and gpus_per_node is 0; set it", (("gpu",),))]
    return []
