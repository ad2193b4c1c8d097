"""From a strategy's `compression` block to a rank's compressor, and to a server's decoder."""

from __future__ import annotations

from torch import Tensor

from distml.exchange.compression.base import RESIDUAL, Codec, CodecCompressor, Compressor, Decoder
from distml.exchange.compression.bf16 import BF16
from distml.exchange.compression.int8 import Int8
from distml.exchange.compression.powersgd import Factoring, PowerSGD
from distml.exchange.compression.topk import MomentumCorrection, TopK
from distml.exchange.layout import Layout
from distml.spec.schema import BF16Spec, CompressionSpec, Int8Spec, JobSpec, PowerSGDSpec, SGDSpec, TopKSpec


def compression_of(job: JobSpec) -> CompressionSpec | None:
    """The job's compression block; None where nothing is compressed."""
    return getattr(job.strategy, "compression", None)


def corrects_momentum(job: JobSpec) -> bool:
    """Whether the ranks accumulate the optimiser's momentum themselves, so that the update is made without it."""
    compression, optimizer = compression_of(job), job.optimizer
    accumulates = isinstance(compression, TopKSpec) and compression.error_feedback
    return accumulates and isinstance(optimizer, SGDSpec) and optimizer.momentum > 0


def build_codec(spec: BF16Spec | Int8Spec | TopKSpec, layout: Layout, like: Tensor) -> Codec:
    """The codec of a method that codes rows of the flat vector."""
    if isinstance(spec, TopKSpec):
        return TopK(layout, like, spec.fraction)
    return BF16(layout, like) if isinstance(spec, BF16Spec) else Int8(layout, like)


def build_compressor(job: JobSpec, layout: Layout, like: Tensor) -> Compressor | None:
    """One rank's half.

    Args:
        job: the spec.
        layout: the flat vector's index.
        like: a tensor whose type and device gradients have.
    """
    spec, optimizer = compression_of(job), job.optimizer
    if spec is None:
        return None
    if isinstance(spec, PowerSGDSpec):
        return PowerSGD(Factoring(layout, like, spec.rank), spec.error_feedback, job.seed)
    codec = build_codec(spec, layout, like)
    if corrects_momentum(job) and isinstance(optimizer, SGDSpec) and isinstance(codec, TopK):
        return MomentumCorrection(codec, optimizer.momentum, optimizer.nesterov)
    return CodecCompressor(codec, (RESIDUAL,) if spec.error_feedback else ())


def build_decoder(job: JobSpec, layout: Layout, like: Tensor) -> Decoder | None:
    """What a server sums payloads with; None where gradients come as they are."""
    spec = compression_of(job)
    if spec is None:
        return None
    return Factoring(layout, like, spec.rank) if isinstance(spec, PowerSGDSpec) else build_codec(spec, layout, like)
