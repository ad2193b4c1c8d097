"""lineage.jsonl is append-only, and cut back to what a resume knows."""

from __future__ import annotations

import math
from pathlib import Path

from distml.population.lineage import Lineage


def events(lineage: Lineage) -> list[tuple[str, int]]:
    return [(event["member"], event["step"]) for event in lineage.read()]


def test_events_are_readable_at_once_and_nan_is_null(tmp_path: Path) -> None:
    lineage = Lineage(tmp_path)
    lineage.append({"member": "00", "step": 0, "score": math.nan, "values": {"optimizer.lr": 1e-3}})
    assert lineage.read() == [{"member": "00", "step": 0, "score": None, "values": {"optimizer.lr": 1e-3}}]


def test_cut_back_keeps_the_first_events_of_each_member(tmp_path: Path) -> None:
    lineage = Lineage(tmp_path)
    for step in range(3):
        for member in ("00", "01", "02"):
            lineage.append({"member": member, "step": step})
    with open(lineage.path, "a") as file:
        file.write('{"member": "00", "ste')  # a killed writer's last line
    assert lineage.cut_back({"00": 2, "01": 3}) == 4
    assert events(lineage) == [("00", 0), ("01", 0), ("00", 1), ("01", 1), ("01", 2)]
    lineage.append({"member": "02", "step": 7})
    assert events(lineage)[-1] == ("02", 7)
    assert lineage.cut_back({}) == 6
    assert lineage.read() == []
