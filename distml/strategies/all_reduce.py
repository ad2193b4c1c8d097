"""`strategy: all_reduce`: every worker sums the gradients of all and applies the same update to its replica."""

from __future__ import annotations

from distml.strategies.single import Single


class AllReduce(Single):
    """One collective per phase carries gradients, count, vote and rows: N + TAIL elements."""
