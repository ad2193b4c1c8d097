"""lineage.jsonl: what happened to each member, one JSON object per event, append-only.

    start     a member begins, at step 0
    decide    a member was decided about and keeps its weights; where it explores by itself: with its new values
    copy      it was decided about, and took another one's weights and new values
    replace   it was lost (`cause`), and goes on as a clone of another one, or with `from: null` by itself
    finish    its own run is over, with `reason`

Every event has `wall_s`, `member`, `step`, `score` (the objective; null: none, or not a number) and `values` (by path,
after the event). Where values were changed, `before`, `requested`, `applied` (as read back from what computes),
`equal` and `seconds`; where weights came from another member, `from`, `from_step` and `from_score`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distml.runs.directory import MetricsFile
from distml.runs.files import write_atomically

FILE = "lineage.jsonl"


class Lineage:
    """The events of a population's run directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        self._file = MetricsFile(self.path)

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one event, so that readers see it at once; numbers that are not finite become null."""
        self._file.append(dict(event))

    def read(self) -> list[dict[str, Any]]:
        """All events; a torn last line is not one."""
        return self._file.read()

    def cut_back(self, known: Mapping[str, int]) -> int:
        """Keep of each member's events the first `known[member]`; atomically.

        Returns:
            How many events were removed.
        """
        self.close()
        left, events = dict(known), self.read()
        kept = []
        for event in events:
            if left.get(event["member"], 0) > 0:
                left[event["member"]] -= 1
                kept.append(event)
        if self.path.exists():
            write_atomically(self.path, "".join(json.dumps(event) + "\n" for event in kept))
        return len(events) - len(kept)

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        self._file.close()
