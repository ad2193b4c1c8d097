"""The small classifier, whose replaced worker never gets ready: it asks the run to end once a checkpoint is there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from small import Small
from torch import nn


class Detained(Small):
    """`run`: its directory; `died`: a file that is there from the death on; `driver`: the process that is asked."""

    def __init__(self, run: str, died: str, driver: int) -> None:
        super().__init__(dtype="float32")
        self.run, self.died, self.driver = Path(run), Path(died), driver

    def build_model(self) -> nn.Module:
        if self.died.exists():
            deadline = time.monotonic() + 20.0
            while not list(self.run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
                time.sleep(0.05)
            if time.monotonic() < deadline:
                self.died.with_name("secured").touch()
            os.kill(self.driver, signal.SIGTERM)
            time.sleep(30.0)
            self.died.with_name("outlived").touch()
        return super().build_model()

    def loss(self, model, batch, progress):
        if progress.version == 20 and not self.died.exists():
            self.died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if progress.version > 10:
            time.sleep(0.02)  # states come for the driver to go back to
        return super().loss(model, batch, progress)
