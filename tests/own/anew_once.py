"""A stream that begins anew at checkpoints, and cannot."""

from __future__ import annotations

from anew import Anew, Episode

import distml


class AnewOnce(Anew):
    def stream(self, part: distml.Part) -> Episode:
        if hasattr(self, "begun"):
            raise RuntimeError("no second time")
        self.begun = True
        return super().stream(part)
