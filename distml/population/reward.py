"""What an architecture is worth: its metric, times what its cost makes of that. No torch.

    reward = metric · (cost / target)^w        w = -log2(1 + d), d = `doubling_is_worth`

So twice the cost is made up for by a metric that is (1 + d) times as good (Tan et al. 2019, MnasNet: 5 % give -0.07).
Where a metric is negative it is divided instead, so that more cost is never better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from distml.spec.nas import RewardSpec


def exponent(doubling_is_worth: float) -> float:
    """w: -0.0704 at 5 %."""
    return -math.log2(1.0 + doubling_is_worth)


def reward_of(spec: RewardSpec, metric: float, cost: float | None) -> float:
    """The reward of one architecture; NaN stays NaN.

    Args:
        cost: floating-point operations or parameters, where `spec.cost` names one.
    """
    if spec.target is None or cost is None:
        return metric
    factor = math.pow(cost / spec.target, exponent(spec.doubling_is_worth))
    return metric * factor if metric >= 0 else metric / factor


def worst(rewards: Sequence[float]) -> float:
    """What an architecture gets that failed or came to NaN: 0 where all others are above it, else less than all.

    Then it is a tenth of their spread below the least: far enough to be told apart, near enough for a baseline.

    Args:
        rewards: of architectures that came to something; at least one.
    """
    least, greatest = min(rewards), max(rewards)
    return 0.0 if least > 0 else least - 0.1 * ((greatest - least) or abs(least) or 1.0)
