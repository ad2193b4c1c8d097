"""powersgd: low-rank factors of each weight matrix's gradient, one power iteration per step (Vogels et al. 2019).

Their algorithms 1 and 2, with sums in place of means (the result is the same, for P is made orthonormal):

    P = sum over ranks of M Q;   orthonormalise P;   Q = sum over ranks of M' P;   every rank's sum: P Q'
    residual = M - P P' M, each rank's own projection error

Q is kept for the next step (warm start). Kernels of convolutions are matrices [out, rest]; vectors, and matrices that
are not larger than their factors, go uncompressed. Towards parameter servers there is no common P: each rank factors
its own matrix, and sends a server the factors of every matrix of which it owns a part.

Shapes: matrix M [a, b], rank r; factors lie transposed in memory, P [r, a] and Q [r, b], for which products are fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distml.exchange.channel import WireGroup
from distml.exchange.compression.base import RESIDUAL, Compressor, Range
from distml.exchange.flat import TAIL, from_numpy, to_numpy
from distml.exchange.layout import Array, Entry, Layout

FACTORS = "factors"


def matrix_shape(entry: Entry) -> tuple[int, int]:
    """[out, rest] of a parameter."""
    return entry.shape[0], entry.numel // max(1, entry.shape[0])


class Factoring:
    """Which parameters are factored, and how: the same on all ranks and servers. Decodes what a rank sent to a server.

    Args:
        layout: the flat vector's index.
        like: a tensor whose type and device gradients have.
        rank: of the factors.
    """

    def __init__(self, layout: Layout, like: Tensor, rank: int) -> None:
        self.layout, self.dtype, self.device, self.rank = layout, like.dtype, like.device, rank

    def num_factors(self, entry: Entry) -> int:
        """r, or 0 for what goes uncompressed."""
        if len(entry.shape) < 2 or entry.numel == 0:
            return 0
        rows, columns = matrix_shape(entry)
        rank = min(self.rank, rows, columns)
        return rank if rank * (rows + columns) < entry.numel else 0

    def entries(self, span: Range) -> list[Entry]:
        """The parameters that have elements in a range."""
        return [entry for entry in self.layout.entries if max(entry.offset, span[0]) < self._end(entry, span)]

    @staticmethod
    def _end(entry: Entry, span: Range) -> int:
        return min(entry.offset + entry.numel, span[1])

    def part(self, entry: Entry, span: Range) -> slice:
        """A parameter's elements within a range, counted from the range's start."""
        return slice(max(entry.offset, span[0]) - span[0], self._end(entry, span) - span[0])

    def decode(self, span: Range, payloads: Sequence[Tensor], total: Tensor) -> None:
        """As `Decoder.decode`. A matrix is computed whole, also where only a part of it is owned: so bits agree."""
        vectors = [payload.view(self.dtype) for payload in payloads]
        offset = 0
        for entry in self.entries(span):
            own, rank = self.part(entry, span), self.num_factors(entry)
            if not rank:
                size = own.stop - own.start
                total[own] = torch.stack([vector[offset : offset + size] for vector in vectors]).sum(0)
                offset += size
                continue
            rows, columns = matrix_shape(entry)
            whole = own.stop - own.start == entry.numel
            matrix = (total[own] if whole else total.new_empty(entry.numel)).view(rows, columns)
            matrix.zero_()
            for vector in vectors:
                left, right = split_factors(vector[offset : offset + rank * (rows + columns)], rank, rows)
                matrix.addmm_(left.t(), right)
            if not whole:
                first = max(entry.offset, span[0]) - entry.offset
                total[own] = matrix.view(-1)[first : first + own.stop - own.start]
            offset += rank * (rows + columns)


def split_factors(vector: Tensor, rank: int, rows: int) -> tuple[Tensor, Tensor]:
    """P [r, a] and Q [r, b] of r (a + b) elements."""
    return vector[: rank * rows].view(rank, rows), vector[rank * rows :].view(rank, -1)


def orthonormal(left: Tensor) -> Tensor:
    """P [r, a] with orthonormal rows that span the same space; QR also fills up what a singular P leaves open."""
    basis: Tensor = torch.linalg.qr(left.t())[0]
    return basis.t().contiguous()


class PowerSGD(Compressor):
    """One rank's half.

    Args:
        factoring: which parameters are factored.
        error_feedback: keep the projection error.
        seed: of the first Q, the same on all ranks.
    """

    def __init__(self, factoring: Factoring, error_feedback: bool, seed: int) -> None:
        like = torch.empty(0, dtype=factoring.dtype, device=factoring.device)
        super().__init__(factoring.layout, like, (RESIDUAL,) if error_feedback else ())
        self.factoring, self.seed = factoring, seed
        self.start_anew()

    def start_anew(self) -> None:
        """Random first factors Q [r, b], drawn on the CPU in the layout's order."""
        factoring, generator = self.factoring, torch.Generator().manual_seed(self.seed)
        self.factors: dict[str, Tensor] = {}
        for entry in self.layout.entries:
            if rank := factoring.num_factors(entry):
                drawn = torch.randn(rank, matrix_shape(entry)[1], generator=generator, dtype=torch.float64)
                self.factors[entry.name] = drawn.to(factoring.dtype).to(factoring.device)

    def _corrected(self, span: Range, gradients: Tensor) -> Tensor:
        """Gradient and residual [n], in whose place the new residual will be left."""
        return gradients if self.residual is None else self.residual[span[0] : span[1]].add_(gradients)

    def _split(self, span: Range) -> tuple[list[Entry], list[Entry]]:
        """A phase's parameters: factored ones, and the others."""
        entries = self.factoring.entries(span)
        factored = [entry for entry in entries if entry.name in self.factors]
        return factored, [entry for entry in entries if entry.name not in self.factors]

    def reduce(self, phase: int, message: Tensor, group: WireGroup) -> None:
        span = self.layout.phase_range(phase)
        gradients, tail = message[:-TAIL], message[-TAIL:]
        corrected = self._corrected(span, gradients)
        factored, rest = self._split(span)
        matrices = [corrected[self.factoring.part(e, span)].view(matrix_shape(e)) for e in factored]
        lefts = [self.factors[e.name] @ matrix.t() for e, matrix in zip(factored, matrices, strict=True)]
        uncompressed = [corrected[self.factoring.part(e, span)] for e in rest]
        lefts = [orthonormal(left) for left in summed([*lefts, *uncompressed, tail], group, [*uncompressed, tail])]
        rights = []
        for left, matrix in zip(lefts, matrices, strict=True):
            rights.append(left @ matrix)
            matrix.addmm_(left.t(), rights[-1], alpha=-1)
        for entry, left, right in zip(factored, lefts, summed(rights, group, []), strict=True):
            self.factors[entry.name] = right
            torch.mm(left.t(), right, out=gradients[self.factoring.part(entry, span)].view(matrix_shape(entry)))
        for entry, vector in zip(rest, uncompressed, strict=True):
            gradients[self.factoring.part(entry, span)] = vector
            if self.residual is not None:
                vector.zero_()

    def encode(self, phase: int, gradients: Tensor, ranges: Sequence[Range]) -> list[Tensor]:
        span = self.layout.phase_range(phase)
        corrected = self._corrected(span, gradients)
        factored, rest = self._split(span)
        sent: dict[str, Tensor] = {}
        for entry in factored:
            matrix = corrected[self.factoring.part(entry, span)].view(matrix_shape(entry))
            left = orthonormal(self.factors[entry.name] @ matrix.t())
            right = left @ matrix
            matrix.addmm_(left.t(), right, alpha=-1)
            self.factors[entry.name] = right
            sent[entry.name] = torch.cat([left.view(-1), right.view(-1)])
        payloads = [self._payload(span, one, corrected, sent) for one in ranges]
        if self.residual is not None:
            for entry in rest:
                corrected[self.factoring.part(entry, span)].zero_()
        return payloads

    def _payload(self, phase: Range, span: Range, corrected: Tensor, sent: Mapping[str, Tensor]) -> Tensor:
        """Factors of each matrix that has elements in the range, and the elements of all else."""
        own = corrected[span[0] - phase[0] : span[1] - phase[0]]
        pieces = [sent[e.name] if e.name in sent else own[self.factoring.part(e, span)]
                  for e in self.factoring.entries(span)]  # fmt: skip
        return torch.cat(pieces).view(torch.uint8) if pieces else own.new_empty(0, dtype=torch.uint8)

    def state(self) -> dict[str, Any]:
        common: dict[str, dict[str, Array]] = {FACTORS: {n: to_numpy(q).copy() for n, q in self.factors.items()}}
        return {**super().state(), "common": common}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.start_anew()
        for name, array in state.get("common", {}).get(FACTORS, {}).items():
            if name in self.factors and tuple(array.shape) == tuple(self.factors[name].shape):
                self.factors[name].copy_(from_numpy(array))


def summed(tensors: list[Tensor], group: WireGroup, in_place: list[Tensor]) -> list[Tensor]:
    """Sums over ranks in one message; the last ones are overwritten by theirs, the others' are returned."""
    if not tensors:
        return []
    message = torch.cat([tensor.reshape(-1) for tensor in tensors])
    group.all_reduce(message)
    sums = [piece.view(t.shape) for piece, t in zip(message.split([t.numel() for t in tensors]), tensors, strict=True)]
    kept = len(tensors) - len(in_place)
    for tensor, total in zip(in_place, sums[kept:], strict=True):
        tensor.copy_(total)
    return sums[:kept]
