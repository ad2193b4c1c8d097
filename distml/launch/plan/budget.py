"""What many runs of one job come to: a population's children, a sweep's or a search's trials. No torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from distml.launch.plan.text import amount, between, span, worked


@dataclass(frozen=True)
class Budget:
    """Many equal runs on a number of GPUs.

    Attributes:
        children: runs.
        least, most: GPU-hours of each.
        gpus: that there are.
        each: GPUs that a run is on; as many runs go on at the same time as there is room for.
        unit: what one of those is called; `what`: what the runs are.
    """

    children: int
    least: float
    most: float
    gpus: int
    each: int = 1
    unit: str = "GPU"
    what: str = "children"

    def days_of_work(self, hours: float) -> float:
        """GPU-days of all runs together, each of so many GPU-hours."""
        return self.children * hours / 24

    def days(self, hours: float) -> float:
        """Until the last is done: one round of runs after the other."""
        rounds = math.ceil(self.children / (self.gpus // self.each))
        return rounds * hours / self.each / 24

    def to_json(self) -> dict[str, Any]:
        """What is given and what it comes to, the least and the most."""
        both = (self.least, self.most)
        return {**asdict(self), "days_of_work": [self.days_of_work(hours) for hours in both],
                "days": [self.days(hours) for hours in both]}  # fmt: skip

    def __str__(self) -> str:
        hours = worked(self.least, self.most, self.unit)
        days = span(86400 * self.days(self.least), 86400 * self.days(self.most))
        least, most = self.days_of_work(self.least), self.days_of_work(self.most)
        whole = worked(24 * least, 24 * most, self.unit)
        if most >= 1:
            whole = f"{between(amount(least), amount(most))} {self.unit}-days"
        return f"{self.children:,} {self.what} x {hours} on {self.gpus:,} {self.unit}s: {whole}, {days}"
