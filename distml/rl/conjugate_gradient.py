"""Steps that are found by solving with a matrix that is known only by its products with vectors.

Shapes: N parameters. Vectors are float64, whatever the parameters are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Point = Mapping[str, Tensor]
RELATIVE = 1e-20  # of the squared residual, at which it is as good as zero


def conjugate_gradient(product: Callable[[Tensor], Tensor], target: Tensor, iterations: int) -> Tensor:
    """x [N] with A x = target, nearly (Hestenes & Stiefel 1952).

    Args:
        product: A v for v [N]; A is symmetric and positive (semi-)definite.
        target: [N].
        iterations: at most; N are exact but for rounding.
    """
    solution, residual = torch.zeros_like(target), target.clone()
    direction, square = residual.clone(), residual @ residual
    enough = RELATIVE * square
    for _ in range(iterations):
        if square <= enough:
            break
        image = product(direction)
        curvature = direction @ image
        if curvature <= 0:  # nothing but rounding is left in this direction
            break
        length = square / curvature
        solution += length * direction
        residual -= length * image
        before, square = square, residual @ residual
        direction = residual + square / before * direction
    return solution


class Surface:
    """Some of a model's parameters as one vector: points near theirs, slopes and curvatures. The model stays as it is.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)
        self.size = sum(one.numel() for one in self.parameters.values())

    def at(self, step: Tensor | None = None) -> dict[str, Tensor]:
        """The parameters moved by a step [N], as leaves; None: where they are."""
        leaves, start = {}, 0
        for name, one in self.parameters.items():
            moved = one.detach()
            if step is not None:
                moved = moved + step[start : start + one.numel()].view_as(one).to(one.dtype)
                start += one.numel()
            leaves[name] = moved.clone().requires_grad_()
        return leaves

    def zeros(self) -> Tensor:
        """No step [N]."""
        some = next(iter(self.parameters.values()))
        return torch.zeros(self.size, dtype=torch.float64, device=some.device)

    def along(self, step: Tensor) -> Tensor:
        """A scalar that is 0 and whose gradient with respect to the model's own parameters is `step` [N]."""
        start, total = 0, next(iter(self.parameters.values())).new_zeros(())
        for one in self.parameters.values():
            part = step[start : start + one.numel()].view_as(one).to(one.dtype)
            total = total + (part * (one - one.detach())).sum()
            start += one.numel()
        return total


def slope(value: Tensor, point: Point) -> Tensor:
    """The gradient [N] of a scalar with respect to a point's leaves; its graph is kept."""
    return joined(torch.autograd.grad(value, list(point.values()), retain_graph=True, materialize_grads=True))


def curvature_of(divergence: Tensor, point: Point) -> Callable[[Tensor], Tensor]:
    """Products of a scalar's second derivative at a point with vectors (Pearlmutter 1994).

    Of a divergence from the point itself (KL, or half a squared distance of outputs) that is the Gauss-Newton matrix:
    what is left of the second derivative is multiplied by a slope that is zero there.
    """
    leaves = list(point.values())
    slopes = torch.autograd.grad(divergence, leaves, create_graph=True, materialize_grads=True)
    flat = torch.cat([one.reshape(-1) for one in slopes])

    def product(vector: Tensor) -> Tensor:
        if not flat.requires_grad:
            return torch.zeros_like(vector)
        total = flat @ vector.to(flat.dtype)
        return joined(torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True))

    return product


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors end to end [N], float64."""
    return torch.cat([one.detach().reshape(-1).double() for one in tensors])


def backtracked(step: Tensor, accepts: Callable[[Tensor], bool], halvings: int) -> Tensor:
    """The first of `step`, `step` / 2, ... that is accepted; none: no step."""
    for _ in range(halvings + 1):
        if accepts(step):
            return step
        step = step / 2
    return torch.zeros_like(step)
