"""Reports of members and trials as TensorBoard shows them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from own.populations import run_with, toy

from distml.runs.tensorboard import TensorBoardRows


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), read by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_reports_go_on_where_they_were_cut_back(tmp_path):
    TensorBoardRows(tmp_path).cut_back(3)  # before the first one there is nothing to cut
    for steps in ((1, 2), (3,)):
        TensorBoardRows(tmp_path).append([{"step": step, "wall_s": 9.0, "eval/loss": step / 2, "eval/none": None}
                                          for step in steps])  # fmt: skip
    assert shown(tmp_path) == {"eval/loss": [(1, 0.5), (2, 1.0), (3, 1.5)]}
    again = TensorBoardRows(tmp_path)
    again.cut_back(1)
    again.append([{"step": 2, "wall_s": 9.0, "eval/loss": 7.0, "train/loss": math.nan}])
    found = shown(tmp_path)
    assert found["eval/loss"] == [(1, 0.5), (2, 7.0)]
    assert math.isnan(found["train/loss"][0][1])
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("to", [["tensorboard"], []], ids=["on", "off"])
def test_every_member_has_its_own(tmp_path, to):
    spec = toy(base__log={"every": 2, "to": to}, stop__steps=24)
    run_with(spec, tmp_path / "run")
    folders = sorted((tmp_path / "run" / "members").iterdir())
    assert len(folders) == spec["members"]
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        wanted = [row["step"] for row in rows if "eval/quality" in row]
        found = shown(folder / "tensorboard")["eval/quality"] if to else []
        assert [step for step, _ in found] == (wanted if to else [])
        assert (folder / "tensorboard").exists() == bool(to)
