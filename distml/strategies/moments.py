"""The vectors that an optimiser keeps beside the weights, by name. No torch: a plan counts them too."""

from __future__ import annotations

from distml.spec.schema import OptimizerSpec, RMSpropSpec, SGDSpec


def moment_names(spec: OptimizerSpec) -> tuple[str, ...]:
    """One vector of as many elements as the weights for each name; a momentum of 0 keeps none."""
    if isinstance(spec, SGDSpec):
        return ("momentum",) if spec.momentum else ()
    if isinstance(spec, RMSpropSpec):
        return ("square_avg", "momentum") if spec.momentum else ("square_avg",)
    return "exp_avg", "exp_avg_sq"
