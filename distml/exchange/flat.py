"""A model's trained parameters as views of one flat vector, and their gradients as views of another.

The gradient vector has `TAIL` more elements behind each phase: what travels together with the sum of the gradients is
the count it is over, votes, the rows (examples) it came from, and the environment steps (frames) that are new in them.
One reduction carries all of it.

Shapes: N trained elements, P phases; weights [N], gradients [N + P · TAIL].
"""

from __future__ import annotations

import fnmatch
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distml.exchange.layout import Array, Layout
from distml.tasks.base import Accumulator

TAIL = 4
COUNT, VOTE, ROWS, FRAMES = 0, 1, 2, 3


class FlatModel:
    """Owns the storage of a model's trained parameters; the model's own tensors become views of it.

    Args:
        model: on its device; parameters with `requires_grad` and a floating type are the trained ones.
        phase_patterns: shell patterns; the first that matches a parameter's name owns it.
        group_patterns: likewise for parameter groups; what matches none is group 0, the k-th pattern is group k + 1.

    Raises:
        ValueError: nothing to train, or parameters of several types or of one that is not trained in.
    """

    def __init__(self, model: nn.Module, phase_patterns: Sequence[str], group_patterns: Sequence[str] = ()) -> None:
        self.model = model
        self.layout, self.parameters = index_of(model, phase_patterns, group_patterns)
        self.num_phases = len(phase_patterns)
        some = self.parameters[0]
        self.weights = torch.empty(self.layout.numel, dtype=some.dtype, device=some.device)
        self.gradients = torch.zeros(self.layout.numel + TAIL * self.num_phases, dtype=some.dtype, device=some.device)
        self._bind()

    def _bind(self) -> None:
        for entry, parameter in zip(self.layout.entries, self.parameters, strict=True):
            view = self.weights[entry.offset : entry.offset + entry.numel].view(entry.shape)
            view.copy_(parameter.data)
            parameter.data = view
            start = entry.offset + TAIL * entry.phase
            parameter.grad = self.gradients[start : start + entry.numel].view(entry.shape)

    def bind(self, weights: Tensor, gradients: Tensor) -> None:
        """Move to this storage [N] and [N + P · TAIL]: the values go with the model, gradients start at zero."""
        self.weights, self.gradients = weights, gradients
        gradients.zero_()
        self._views: dict[int, list[Tensor]] = {}
        self._bind()

    def point_to(self, weights: Tensor) -> None:
        """Compute on these weights [N] from now on, as they are; the same few vectors come again and again."""
        views = self._views.get(weights.data_ptr())
        if views is None:
            entries = self.layout.entries
            views = [weights[e.offset : e.offset + e.numel].view(e.shape) for e in entries]
            self._views[weights.data_ptr()] = views
        self.weights = weights
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view

    def phase_weights(self, phase: int) -> Tensor:
        """The weights of one phase (a view)."""
        start, stop = self.layout.phase_range(phase)
        return self.weights[start:stop]

    def phase_message(self, phase: int) -> Tensor:
        """Gradients and tail of one phase (a view): what a reduction sums."""
        start, stop = self.layout.phase_range(phase)
        return self.gradients[start + TAIL * phase : stop + TAIL * (phase + 1)]

    def select_phase(self, phase: int) -> None:
        """Let only this phase's parameters take gradients: another phase's are constants of its loss."""
        if self.num_phases > 1:
            for entry, parameter in zip(self.layout.entries, self.parameters, strict=True):
                parameter.requires_grad_(entry.phase == phase)

    def frozen(self) -> dict[str, Tensor]:
        """Parameters that are not trained."""
        return frozen_of(self.model, self.layout)

    def fingerprint(self) -> str:
        """SHA-256 over all that must be equal on every rank at the start."""
        return fingerprint_of(self.layout, [self.weights], self.frozen())


def index_of(
    model: nn.Module, phase_patterns: Sequence[str], group_patterns: Sequence[str]
) -> tuple[Layout, list[nn.Parameter]]:
    """The logical index of a model's trained parameters, and they themselves in its order (see `FlatModel`).

    Raises:
        ValueError: nothing to train, or parameters of several types or of one that is not trained in.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    types = {parameter.dtype for parameter in trained.values()}
    if len(types) != 1:
        raise ValueError(
            f"trained parameters must have one type, not {sorted(map(str, types))}"
            if types
            else "the model has no parameter to train (requires_grad)"
        )
    if not types <= {torch.float32, torch.float64}:
        name, wrong = next((name, p.dtype) for name, p in trained.items())
        raise ValueError(f"trained parameters must be float32 or float64, {name} is {wrong}; use model.float()")
    rows = []
    for name, parameter in trained.items():
        phase = _first_match(name, phase_patterns)
        if phase is None:
            raise ValueError(
                f"parameter {name!r} matches no phase's pattern {list(phase_patterns)}; freeze it or add it"
            )
        group = _first_match(name, group_patterns)
        rows.append((name, tuple(parameter.shape), phase, 0 if group is None else group + 1))
    layout = Layout.build(rows)
    return layout, [trained[entry.name] for entry in layout.entries]


def frozen_of(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Parameters that are not trained."""
    trained = {entry.name for entry in layout.entries}
    return {name: p.data for name, p in model.named_parameters() if name not in trained}


def fingerprint_of(layout: Layout, weights: Iterable[Tensor], frozen: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values of all that must be equal on every rank at the start.

    Args:
        weights: the trained elements in the layout's order, in as many tensors as one likes.
    """
    digest = hashlib.sha256(repr([(e.name, e.shape, e.phase, e.group) for e in layout.entries]).encode())
    for tensor in weights:
        digest.update(to_numpy(tensor).tobytes())
    for name, tensor in sorted(frozen.items()):
        digest.update(name.encode() + to_numpy(tensor).tobytes())
    return digest.hexdigest()


@dataclass
class Counting:
    """An accumulator of the model; its own names of the buffers -> the tensors."""

    module: Accumulator
    base: dict[str, Tensor]
    sums: dict[str, Tensor]


class Carried:
    """Buffers: not trained but part of the model. Floating ones are averaged by count, integer ones are rank 0's.

    Those of accumulators are neither: workers' sums are added up, and absorbed by the base.

    Raises:
        TypeError: an accumulator's buffers are not what its class says.
    """

    def __init__(self, model: nn.Module) -> None:
        persistent = model.state_dict()
        self.tensors = {name: tensor for name, tensor in model.named_buffers() if name in persistent}
        found = {name: module for name, module in model.named_modules() if isinstance(module, Accumulator)}
        self.counting = [self._counting(f"{name}." if name else "", module) for name, module in found.items()]
        counted = {id(t) for one in self.counting for t in (*one.base.values(), *one.sums.values())}
        self.floating = [n for n, t in self.tensors.items() if t.is_floating_point() and id(t) not in counted]
        self.device = next((tensor.device for tensor in self.tensors.values()), torch.device("cpu"))
        self.bases = [tensor for one in self.counting for tensor in one.base.values()]
        self.sums = [tensor for one in self.counting for tensor in one.sums.values()]

    def _counting(self, prefix: str, module: Accumulator) -> Counting:
        own = {name: tensor for name, tensor in module.named_buffers(recurse=False) if prefix + name in self.tensors}
        what = f"{type(module).__name__} ({prefix.rstrip('.') or 'the model'})"
        for name in module.sums:
            if name not in own:
                raise TypeError(f"{what}: its sums name {name!r}; its persistent buffers are {sorted(own)}")
        for name, tensor in own.items():
            if not tensor.is_floating_point():
                raise TypeError(f"{what}: an accumulator's buffers must be floating, {name} is {tensor.dtype}")
        sums = {name: own[name] for name in module.sums}
        return Counting(module, {name: tensor for name, tensor in own.items() if name not in sums}, sums)

    def average_vector(self) -> Tensor:
        """All floating buffers that are averaged, end to end (float64)."""
        return end_to_end([self.tensors[name] for name in self.floating], self.device)

    def set_average(self, vector: Tensor) -> None:
        """Write what `average_vector` has the order of."""
        write([self.tensors[name] for name in self.floating], vector)

    # ---------------------------------------------------------------------------------------------------- accumulators
    def base_vector(self) -> Tensor:
        """What the accumulators' workers agree on, end to end: float64 [M]."""
        return end_to_end(self.bases, self.device)

    def sums_vector(self) -> Tensor:
        """What this worker's accumulators have seen since, end to end: float64 [S]."""
        return end_to_end(self.sums, self.device)

    def take_sums(self) -> Tensor:
        """The same, handed over: they are zero afterwards."""
        vector = self.sums_vector()
        for tensor in self.sums:
            tensor.zero_()
        return vector

    def absorb(self, sums: Tensor) -> None:
        """Fold these sums [S], relative to the base of now, instead of this worker's."""
        write(self.sums, sums)
        for one in self.counting:
            one.module.absorb()

    def fold(self, base: Array | None, parts: Sequence[tuple[Array, Array]]) -> None:
        """Take over a base [M], unless None, and fold sums, each relative to a base of its own; own sums are kept."""
        if base is None and not parts:
            return
        own_base, own_sums = self.base_vector(), self.take_sums()
        if base is not None:
            write(self.bases, from_numpy(base))
        for before, sums in parts:
            self._relate(from_numpy(sums), from_numpy(before))
            for one in self.counting:
                one.module.absorb()
        self._relate(own_sums, own_base)

    def _relate(self, sums: Tensor, before: Tensor) -> None:
        """Write sums [S] that are relative to the base `before` [M] as they are relative to the base of now."""
        write(self.sums, sums)
        offset = 0
        for one in self.counting:
            named = {}
            for name, tensor in one.base.items():
                named[name] = before[offset : offset + tensor.numel()].view(tensor.shape)
                offset += tensor.numel()
            one.module.rebase(named)

    def arrays(self) -> dict[str, Array]:
        """Copies of all buffers."""
        return {name: to_numpy(tensor).copy() for name, tensor in self.tensors.items()}

    def integers(self) -> dict[str, Array]:
        """Copies of the integer buffers."""
        return {n: to_numpy(tensor).copy() for n, tensor in self.tensors.items() if not tensor.is_floating_point()}

    def load(self, arrays: dict[str, Array]) -> None:
        """Overwrite the buffers that `arrays` names."""
        for name, array in arrays.items():
            if name in self.tensors:
                self.tensors[name].copy_(from_numpy(array))


def end_to_end(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """A copy of them as one vector (float64), on `device` also if there are none."""
    return torch.cat([torch.zeros(0, dtype=torch.float64, device=device),
                      *(tensor.detach().reshape(-1).double() for tensor in tensors)])  # fmt: skip


def write(tensors: Sequence[Tensor], vector: Tensor) -> None:
    """The inverse of `end_to_end`."""
    offset = 0
    for tensor in tensors:
        tensor.copy_(vector[offset : offset + tensor.numel()].view(tensor.shape))
        offset += tensor.numel()


def _first_match(name: str, patterns: Sequence[str]) -> int | None:
    return next((index for index, pattern in enumerate(patterns) if fnmatch.fnmatchcase(name, pattern)), None)


def to_numpy(tensor: Tensor) -> Array:
    """A tensor as a NumPy array, sharing memory where it can; bfloat16 is widened to float32 (exactly)."""
    tensor = tensor.detach().cpu()
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


CopyVector = Callable[[Tensor], Array]  # a vector [n] as an array that nobody else writes into


def copy_vector(vector: Tensor) -> Array:
    """In new memory."""
    return to_numpy(vector).copy()


def borrowed(array: Array) -> Tensor:
    """A tensor in the array's own memory, for reading: Ray's is shared, and is not to be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def from_numpy(array: Array) -> Tensor:
    """A NumPy array as a tensor; read-only memory (Ray's object store) is copied, so that nobody writes into it."""
    return torch.from_numpy(array if array.flags.writeable else np.array(array))
