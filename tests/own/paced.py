"""The small classifier, whose steps take long from step 40 on until a file is there: so a test need not hurry."""

from __future__ import annotations

import os
import time
from pathlib import Path

from small import Small
from torch import nn

import distml

SLOW_FROM, SLOW_S = 40, 0.4


class Paced(Small):
    """`until`: the file; empty: all steps are fast. Nodes may have a `REFUSES`."""

    def __init__(self, until: str = "") -> None:
        super().__init__(dtype="float32")
        self.until = until

    def build_model(self) -> nn.Module:
        if os.environ.get("REFUSES"):
            raise RuntimeError(os.environ["REFUSES"])
        return super().build_model()

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        if self.until and progress.version >= SLOW_FROM and not Path(self.until).exists():
            time.sleep(SLOW_S)
        return super().loss(model, batch, progress)
