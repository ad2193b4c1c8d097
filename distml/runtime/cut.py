"""A run's state at one version, as the driver owns it, and its form on disk.

On disk every tensor stands under its parameter's name and in its own shape: `model.safetensors` holds the model's
state dict, `optimizer.safetensors` holds `MOMENT/NAME`, `own.safetensors` the arrays of the workers' halves. Nothing
depends on how many workers or servers wrote it.

Where each rank keeps a part of weights and moments, these never come here: ranks have written them when the driver
hears of the cut, and read them from the folder of a committed checkpoint, whoever wrote that. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distml.errors import UsageError
from distml.events import WrittenPart
from distml.exchange.layout import Array, Layout
from distml.runs.checkpoints import Checkpoint, Parts
from distml.runs.parts import MODEL, PartReader

ARRAY = "__array__"
FLOAT = "__float__"  # of a float that JSON does not know: nan, inf, -inf


@dataclass
class Cut:
    """Shared half (weights and moments as flat vectors, or the folder that has them) and each rank's own half.

    Attributes:
        averaged: the buffers were averaged at this version, so that the own halves' ones are no others.
        parts: what ranks have written of weights and moments, until it is committed.
    """

    version: int
    shared: dict[str, Any]
    own: dict[int, dict[str, Any]] = field(default_factory=dict)
    averaged: bool = True
    parts: Parts | None = None


def join_captures(pieces: list[dict[str, Any]], carried: dict[str, Array]) -> dict[str, Any]:
    """The shared half from all servers' captures of one version, in shard order."""
    moments = {name: np.concatenate([p["moments"][name] for p in pieces]) for name in pieces[0]["moments"]}
    weights = np.concatenate([piece["weights"] for piece in pieces])
    return {"weights": weights, "moments": moments, "carried": carried,
            "clock": {**pieces[0]["clock"], "updates": pieces[0]["updates"]}}  # fmt: skip


def to_checkpoint(cut: Cut, layout: Layout, frozen: Mapping[str, Array], extra: Mapping[str, Any]) -> Checkpoint:
    """The form on disk; `extra` is added to `state.json`."""
    arrays: dict[str, Array] = {}
    halves = {rank: without_carried(half) if cut.averaged else half for rank, half in sorted(cut.own.items())}
    own = {str(rank): pack(half, f"{rank}", arrays) for rank, half in halves.items()}
    state = {"clock": pack(cut.shared["clock"], "clock", arrays), "own": own, "layout": layout.to_json(), **extra}
    tensors = {**(named_tensors(cut, layout, frozen) if cut.parts is None else {}), "own": arrays}
    return Checkpoint(cut.version, tensors, state, parts=cut.parts)


def named_tensors(cut: Cut, layout: Layout, frozen: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Model and optimiser under their names on disk."""
    shared = cut.shared
    optimizer = {
        f"{moment}/{name}": array
        for moment, vector in shared["moments"].items()
        for name, array in layout.names(vector).items()
    }
    return {MODEL: {**frozen, **layout.names(shared["weights"]), **shared["carried"]}, "optimizer": optimizer}


def join_parts(parts: Sequence[WrittenPart]) -> Parts:
    """What all ranks have written of one version."""
    files = {name: entry for part in parts for name, entry in part.files.items()}
    return Parts(Path(parts[0].folder), files)


def from_checkpoint(checkpoint: Checkpoint, layout: Layout) -> Cut:
    """The inverse of `to_checkpoint`, for a model with this layout.

    Raises:
        UsageError: the checkpoint is of another model.
    """
    model, optimizer = checkpoint.tensors[MODEL], checkpoint.tensors["optimizer"]
    check_layout(checkpoint.step, layout, {name: array.shape for name, array in model.items()})
    names = {entry.name for entry in layout.entries}
    moments = sorted({name.split("/", 1)[0] for name in optimizer})
    shared = {
        "weights": layout.flatten(model),
        "moments": {m: layout.flatten({n: optimizer[f"{m}/{n}"] for n in names}) for m in moments},
        "carried": {name: array for name, array in model.items() if name not in names},
    }
    return _with_clock(checkpoint, shared)


def from_folder(checkpoint: Checkpoint, layout: Layout) -> Cut:
    """The same for ranks that read weights and moments themselves, each what it keeps of them.

    Raises:
        UsageError: the checkpoint is of another model.
    """
    assert checkpoint.folder is not None
    with PartReader(checkpoint.folder) as reader:
        check_layout(checkpoint.step, layout, reader.shapes(MODEL))
    return _with_clock(checkpoint, {"folder": str(checkpoint.folder)})


def _with_clock(checkpoint: Checkpoint, shared: dict[str, Any]) -> Cut:
    arrays = checkpoint.tensors.get("own", {})
    own = {int(rank): unpack(half, arrays) for rank, half in checkpoint.state["own"].items()}
    return Cut(checkpoint.step, {**shared, "clock": unpack(checkpoint.state["clock"], arrays)}, own)


def check_layout(step: int, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether a checkpoint with these tensors is of a model with this layout.

    Raises:
        UsageError: it is not.
    """
    for entry in layout.entries:
        if shapes.get(entry.name) != entry.shape:
            found = f"has shape {shapes[entry.name]} there" if entry.name in shapes else "is not in it"
            raise UsageError(
                f"checkpoint step-{step:08d} is of another model: {entry.name} {found}, {entry.shape} here; "
                "use --out for a new run, --fresh to move the old one away, or init: {from: ...}"
            )


def reshard(cut: Cut, size: int) -> Cut:
    """The same state for `size` workers.

    What strategies keep per worker as `sums` goes from rank r to rank r mod size and is added up there, so that nothing
    of it is lost; `common` is the lowest rank's for all. A worker that is new has no more than that.
    """
    if set(cut.own) == set(range(size)):
        return cut
    kept = {rank: half.get("strategy", {}) for rank, half in sorted(cut.own.items())}
    common = next((state["common"] for state in kept.values() if "common" in state), None)
    own = {rank: half for rank, half in cut.own.items() if rank < size}
    if common is not None:
        for rank in range(size):
            sums = [state["sums"] for old, state in kept.items() if old % size == rank and "sums" in state]
            half = own.get(rank, {})
            state = {**half.get("strategy", {}), "sums": add_trees(sums), "common": common}
            own[rank] = {**half, "strategy": state}
    return Cut(cut.version, cut.shared, own, cut.averaged)


def add_trees(trees: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mappings of mappings of arrays, added up leaf by leaf."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for tree in trees for key in tree):
        leaves = [tree[key] for tree in trees if key in tree]
        found[key] = add_trees(leaves) if isinstance(leaves[0], Mapping) else sum(leaves[1:], leaves[0])
    return found


def without_carried(own: Mapping[str, Any]) -> dict[str, Any]:
    """An own half for a checkpoint: its buffers were just averaged and stand in the model file."""
    return {**own, "carried": {}, "since_average": 0.0}


def pack(tree: Any, path: str, arrays: dict[str, Array]) -> Any:
    """JSON values of a tree whose arrays go to `arrays` under their paths.

    Raises:
        TypeError: a value is neither JSON nor an array.
    """
    if isinstance(tree, np.ndarray):
        arrays[path] = tree
        return {ARRAY: path}
    if isinstance(tree, Mapping):
        return {str(key): pack(value, f"{path}/{key}", arrays) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [pack(value, f"{path}/{index}", arrays) for index, value in enumerate(tree)]
    if isinstance(tree, np.generic):
        tree = tree.item()
    if isinstance(tree, float) and not math.isfinite(tree):
        return {FLOAT: repr(float(tree))}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"state at {path!r} is a {type(tree).__name__}; only JSON values, tensors and arrays can be saved")


def unpack(tree: Any, arrays: Mapping[str, Array]) -> Any:
    """The inverse of `pack`."""
    if isinstance(tree, Mapping):
        if set(tree) == {ARRAY}:
            return arrays[tree[ARRAY]]
        if set(tree) == {FLOAT}:
            return float(tree[FLOAT])
        return {key: unpack(value, arrays) for key, value in tree.items()}
    return [unpack(value, arrays) for value in tree] if isinstance(tree, list) else tree
