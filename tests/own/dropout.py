"""A model that draws random numbers while it trains, from each worker's own generator."""

from __future__ import annotations

from small import Small


class Dropout(Small):
    def __init__(self, dropout: float = 0.5, **args) -> None:
        super().__init__(dropout=dropout, **args)
