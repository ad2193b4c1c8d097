"""`distml bench population`: seconds out of ticks, targets, tests of significance by hand, tables."""

from __future__ import annotations

import json
import threading
from math import comb
from pathlib import Path

import pytest
import torch

from distml.bench import (
    population,
    population_exploit,
    population_nas,
    population_pbt,
    population_speed,
    population_sweep,
)
from distml.bench.population_task import NoOp, meet
from distml.bench.population_wide import Wide
from distml.cli import main
from distml.errors import RunError
from distml.spec.loader import load_spec
from distml.spec.nas import NasSpec


def ticks(folder: Path, **times: list[float]) -> None:
    for name, all_ in times.items():
        (folder / f"ticks-{name}").write_text("".join(f"{time}\n" for time in all_))


# ---------------------------------------------------------------------------------------------------------------- speed
def test_seconds_are_from_the_first_iteration_to_the_last(tmp_path):
    ticks(tmp_path, **{str(member): [10.0 * member + 0.5 * i for i in range(20)] for member in range(4)})
    assert population_speed.seconds_of(tmp_path, least=80) == 39.5


def test_members_meet_before_they_begin(tmp_path):
    (tmp_path / "ticks-1").touch()
    meet(tmp_path / "ticks-2", 2)
    waiting = threading.Thread(target=meet, args=(tmp_path / "ticks-3", 4))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    (tmp_path / "ticks-4").touch()
    waiting.join(10)
    assert not waiting.is_alive()


def test_iterations_that_are_missing_are_a_failure(tmp_path):
    ticks(tmp_path, **{str(member): [1.0] * 19 for member in range(4)})
    with pytest.raises(RunError, match="4 members noted 76 iterations; there should be 80"):
        population_speed.seconds_of(tmp_path, least=80)


def test_targets_of_speed():
    found = population_speed.targets({"ours": {"median": 1.0}, "reuse": {"median": 9.0}, "plain": {"median": 49.0}})
    assert [(one["value"], one["met"]) for one in found] == [(1.0, True), (9.0, True), (49.0, False)]
    assert population_speed.targets({"reuse": {"median": 9.0}}) == []


def test_the_no_op_adds_its_learning_rate(tmp_path):
    task = NoOp(str(tmp_path))
    model = task.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    for _ in range(3):
        optimizer.zero_grad()
        task.loss(model, None, None).backward()
        optimizer.step()
    assert task.evaluate(model, None, None)["score"].value == 0.75
    (written,) = tmp_path.glob("ticks-*")
    assert len(written.read_text().split()) == 3


def test_our_sides_are_valid_jobs(tmp_path):
    for text in (population_speed.SPEC.format(folder=tmp_path, members=4, iterations=20, every=3),
                 population_sweep.SPEC.format(folder=tmp_path, trials=100, at_once=2)):  # fmt: skip
        (tmp_path / "job.yaml").write_text(text)
        assert load_spec(tmp_path / "job.yaml").job.base.task.name == "distml.bench.population_task:NoOp"
    assert load_spec(population_exploit.SPEC).job.task.args["size"] == 25_000_000
    assert Wide(7).build_model().weight.numel() == 7


# ---------------------------------------------------------------------------------------------------------------- sweep
def test_targets_of_a_sweep():
    found = population_sweep.targets({"ours": {"median": 14.0}, "tune": {"median": 10.0}})
    assert [one["value"] for one in found] == pytest.approx([1.4, 40.0])
    assert [one["met"] for one in found] == [False, True]
    assert population_sweep.targets({"ours": {"median": 14.0}}) == []


# ---------------------------------------------------------------------------------------------------------- pbt and nas
def test_fisher_by_hand():
    """The tea lady: 3 of 4 and 1 of 4; and the whole distribution sums to one."""
    assert population_nas.fisher(3, 1, 4) == pytest.approx((4 * 4 + 1) / comb(8, 4))
    assert population_nas.fisher(0, 4, 4) == 1.0
    assert population_nas.fisher(4, 0, 4) == pytest.approx(1 / 70)


def test_the_sign_test_by_hand():
    assert population_pbt.sign_test(10, 10) == 1 / 1024
    assert population_pbt.sign_test(9, 10) == 11 / 1024
    assert population_pbt.sign_test(0, 10) == 1.0


def test_the_controllers_run_with_their_defaults():
    assert population_nas.CONTROLLERS["reinforce"] == NasSpec.model_fields["controller"].default


def test_a_pair_differs_in_exploit_and_explore_only():
    one, other = (load_spec(population_pbt.spec_of(exploit, 3, 300)).job for exploit in ("truncation", "none"))
    apart = {"name", "exploit", "explore"}
    assert one.model_dump(exclude=apart) == other.model_dump(exclude=apart)
    assert (one.exploit.name, other.exploit.name, other.explore.name) == ("truncation", "none", "none")


def test_a_small_pair_is_measured():
    found = population_pbt.one_run(population_pbt.spec_of("none", 0, 30))
    assert found["examples"] == 8 * 30 * 64
    assert len(found["losses"]) == 8
    assert found["best"] == min(found["losses"])


def test_a_small_search_is_measured(capsys):
    found = population_nas.measure(seeds=2)
    assert found["seeds"] == 2
    assert all(0 <= times <= 2 for times in found["found"].values())
    title, header, body, closing = population_nas.table(found)
    assert title.startswith("256 architectures")
    assert {len(row) for row in body} == {len(header)}
    assert "Fisher" in closing[0]


# ------------------------------------------------------------------------------------------------------------- the verb
@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--part", "sped"], "--part sped is not known; choose from speed, exploit, sweep, pbt, nas"),
     (["--seeds", "0"], "--seeds 0 is not possible"), (["--frames", "3"], "has no option --frames"),
     (["--part", "speed", "--contenders", "hyperopt"], "--contenders hyperopt is not known")],
)  # fmt: skip
def test_what_a_user_can_mend(arguments, text, capsys):
    assert main(["bench", "population", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_a_part_that_failed_is_said_and_others_go_on(monkeypatch, capsys):
    def fail(**_: object) -> None:
        raise RunError("it broke", phase="bench")

    monkeypatch.setattr(population_speed, "measure", fail)
    monkeypatch.setattr(population_nas, "SAMPLES", 5)
    assert main(["bench", "population", "--part", "speed", "--part", "nas", "--seeds", "1", "--json"]) == 3
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert list(report["parts"]) == ["nas"]
    assert "it broke" in report["errors"]["speed"]
    assert "it broke" in err.splitlines()[-1]
    assert population.failure(report)


def test_tables_have_as_many_cells_as_headings():
    summary = {"median": 2.0, "min": 1.0, "max": 3.0, "all": [1.0, 2.0, 3.0]}
    made = [
        population_speed.table({"seconds": {"ours": summary, "reuse": summary}, "exploits": {
            "ours": summary, "reuse": summary}}),
        population_sweep.table({"seconds": {"ours": summary}, "repeats": 3, "skipped": ["optuna"]}),
        population_exploit.table({"ms": dict.fromkeys(("load", "keep", "copy"), summary), "exploit_ms": summary,
                                  "bytes": 3e8, "repeats": 3}),
        population_pbt.table({"pairs": [{name: {"median": 0.5, "best": 1e9, "examples": 5} for name in (
            "population", "random")}], "won": 1, "best_won": 0, "seeds": 1, "steps": 3, "p": 0.5}),
    ]  # fmt: skip
    for _, header, body, closing in made:
        assert {len(row) for row in body} == {len(header)}
        assert closing
