"""What many runs of one job come to: a population's children, a sweep's or a search's trials. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Many equal runs on a number of GPUs.

    Attributes:
        children: runs.
        gpu_hours: of each.
        gpus: that work at the same time.
    """

    children: int
    gpu_hours: float
    gpus: int

    @property
    def gpu_days(self) -> float:
        """Of all runs together."""
        return self.children * self.gpu_hours / 24

    @property
    def days(self) -> float:
        """Until the last is done, if no GPU ever waits."""
        return self.gpu_days / self.gpus

    def __str__(self) -> str:
        return (f"{self.children:,} children x {self.gpu_hours:g} GPU-hours on {self.gpus:,} GPUs: "
                f"{self.gpu_days:,.0f} GPU-days, {self.days:,.1f} days")  # fmt: skip
