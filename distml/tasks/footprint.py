"""What a forward keeps for its backward, and the most tensors that both have at one time: counted without computing.

The model is built and run under torch's `FakeTensorMode`: meta tensors, without memory or values, which say that they
are on the CPU. So dispatch, autocast and attention take the ways that they take on a CPU, where plain meta tensors
would fall back to attention's written-out form, with all T x T weights.

    build (fake) ─▶ forward, each saved tensor's storage counted once ─▶ backward ─▶ Activations(saved, peak)

Parameters, buffers, gradients and the batch are states or inputs: they are not activations. Casted copies of weights
(autocast) are. On GPUs autocast also takes normalising layers to float32; so does `norms_in_float32` here.

What jobs and tasks are is not known here: see `traced.py`.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Activations:
    """Bytes of one forward and backward.

    Attributes:
        saved: of the tensors that the graph keeps when forward is done.
        in_forward, in_backward: the most bytes of tensors at any one time in each that are no states.
    """

    saved: float
    in_forward: float
    in_backward: float

    @property
    def peak(self) -> float:
        """The most of both."""
        return max(self.in_forward, self.in_backward)

    def line(self, other: Activations, times: float) -> Activations:
        """These, and `times` what the other has more: a straight line for each number."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Activations(*(own + times * (more - own) for own, more in pairs))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make while it is active, and when they are gone."""

    def __init__(self, states: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.states = states
        self.live = self.peak = 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.states or key in self.known:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            self.known.pop(key, None)
            self.live -= size

        self.known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def norms_in_float32(model: nn.Module) -> None:
    """Let normalising layers do as under CUDA's autocast: their inputs and weights are casted, also computing again."""
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.forward = functools.partial(_norm_in_float32, module)  # type: ignore[method-assign]


def _norm_in_float32(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    weight = None if norm.weight is None else norm.weight.float()
    if isinstance(norm, nn.RMSNorm):
        return F.rms_norm(x.float(), norm.normalized_shape, weight, norm.eps)
    bias = None if norm.bias is None else norm.bias.float()
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


def footprint(model: nn.Module, inputs: list[Tensor], forward: Callable[[], Tensor]) -> Activations:
    """Count one forward and backward of `forward`, a scalar loss of the model; works with real tensors and fake ones.

    Args:
        model: its parameters have no gradients yet; they get them here, as states.
        inputs: tensors of the batch.
    """
    states = [*model.parameters(), *model.buffers(), *inputs]
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
            states.append(parameter.grad)
    kept = [state.untyped_storage() for state in states]  # alive, so that no other storage takes one's place
    own = {storage._cdata for storage in kept}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved.setdefault(storage._cdata, (weakref.ref(storage), storage.nbytes()))
        return tensor

    with LiveBytes(own) as live:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = forward()
        num_saved = sum(size for reference, size in saved.values() if reference() is not None)
        in_forward, live.peak = live.peak, live.live
        loss.backward()  # type: ignore[no-untyped-call]
    return Activations(float(num_saved), float(in_forward), float(live.peak))


@contextlib.contextmanager
def without_memory() -> Iterator[FakeTensorMode]:
    """Inside, tensors that are made have shapes, types and places, but no values (the first use imports for 1 s)."""
    with FakeTensorMode() as mode:
        yield mode
