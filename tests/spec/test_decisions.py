"""Decisions and the spec's values they come to, both ways; how intervals are cut; which searches are refused."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import yaml

from distml.errors import UsageError
from distml.population.evolution import RandomController
from distml.spec.decisions import CUTS, cut, decision_space
from distml.spec.loader import load_spec, with_values
from distml.spec.space import Dimension

MODEL = {"name": "mlp", "hidden": [16]}
BY_PATH = {"task.model.hidden.0": {"choice": [8, 16]}, "optimizer.lr": {"loguniform": [1.0e-4, 1.0e-1]}}


def spec(space=None, model=MODEL, task=None, **keys):
    base = {"task": task or {"name": "classification", "model": model}, "stop": {"steps": 4}}
    return {"distml": "v1", "kind": "nas", "name": "x", "base": base, "space": space or BY_PATH, "trials": 4, **keys}


SPACES = {
    "paths": spec(),
    "nasnet": spec({"name": "nasnet"}, "nasnet"),
    "stages": spec({"name": "stages"}, "stages"),
    "few": spec({"name": "nasnet", "blocks": 2, "operations": ["identity", "max_3x3"]}, "nasnet"),
    "wide": spec({"name": "stages", "channels": [1.0, 2.0], "layers": [0]}, "stages"),
}


@pytest.mark.parametrize("name", SPACES)
def test_values_and_choices_are_inverse_also_through_json_and_the_base_takes_them(name):
    loaded = load_spec(SPACES[name])
    space = decision_space(loaded.job)
    proposals = RandomController(space.options, seed=0)
    last = tuple(count - 1 for count in space.options)
    for choices in [tuple(0 for _ in last), last, *(proposals.propose() for _ in range(5))]:
        values = json.loads(json.dumps(space.values(choices)))
        assert tuple(space.choices(values)) == choices
        job = with_values(loaded.base, values).job
        again = yaml.safe_load(with_values(loaded.base, values).dump())
        for path, value in values.items():
            found = again
            for key in path.split("."):
                found = found[int(key) if isinstance(found, list) else key]
            assert found == value
        assert job.task.name == "classification"


def test_different_choices_are_different_values():
    for name in SPACES:
        space = decision_space(load_spec(SPACES[name]).job)
        first = [0] * len(space.options)
        seen = {json.dumps(space.values(first))}
        for index, count in enumerate(space.options):
            seen |= {json.dumps(space.values([*first[:index], option, *first[index + 1 :]])) for option in range(count)}
        assert len(seen) == 1 + sum(count - 1 for count in space.options)


def test_nasnet_has_50_decisions_and_stages_seven_rows_of_six():
    nasnet = decision_space(load_spec(SPACES["nasnet"]).job)
    assert nasnet.options == [2, 2, 13, 13, 2, 3, 3, 13, 13, 2, 4, 4, 13, 13, 2, 5, 5, 13, 13, 2, 6, 6, 13, 13, 2] * 2
    assert len(nasnet.options) == 50
    stages = decision_space(load_spec(SPACES["stages"]).job)
    assert len(stages.options) == 7 * 6
    assert stages.options[:6] == [4, 2, 2, 3, 2, 2]  # 12 of 16 channels are 16 again; one layer cannot become none
    assert stages.decisions[10].options == (16, 24, 32)  # 24 x (0.75, 1, 1.25) in eights


def test_an_interval_is_cut_into_values_with_both_ends():
    lr = cut(Dimension("a", "loguniform", 1e-4, 1e-1))
    assert len(lr) == CUTS
    assert (lr[0], lr[-1]) == (1e-4, 1e-1)
    assert {round(math.log10(b / a), 9) for a, b in itertools.pairwise(lr)} == {round(3 / (CUTS - 1), 9)}
    assert cut(Dimension("a", "uniform", 0.0, 0.7)) == pytest.approx([0.1 * index for index in range(CUTS)])
    assert cut(Dimension("a", "randint", 3, 6)) == (3, 4, 5, 6)
    assert cut(Dimension("a", "randint", 0, 70)) == (0, 10, 20, 30, 40, 50, 60, 70)
    assert cut(Dimension("a", "lograndint", 1, 16)) == (1, 2, 3, 5, 7, 11, 16)  # rounded, each once
    assert cut(Dimension("a", "choice", values=("b", 1, True))) == ("b", 1, True)
    assert all(type(value) is int for value in cut(Dimension("a", "lograndint", 1, 500)))


def test_wrong_choices_and_values_are_refused():
    space = decision_space(load_spec(SPACES["paths"]).job)
    with pytest.raises(ValueError, match="1 choices for 2 decisions"):
        space.values([0])
    with pytest.raises(ValueError, match=r"task.model.hidden.0 has 2 options; there is no 2"):
        space.values([2, 0])
    with pytest.raises(ValueError, match="17 is none of"):
        space.choices({"task.model.hidden.0": 17, "optimizer.lr": 1e-4})


REWARD = {"cost": "flops", "target": 1e6}
REGRESSION = {"name": "regression"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (spec({"name": "nasnt"}, "nasnet"), "unknown space 'nasnt'; did you mean 'nasnet'?"),
        (spec({"name": 3}), "space.name is 3"),
        (spec({"name": "nasnet"}), "space nasnet varies a model nasnet, and base.task.model is mlp; set"),
        (spec({"name": "stages"}, task=REGRESSION), "task regression does not understand it"),
        (spec({"name": "nasnet", "block": 3}, "nasnet"), "unknown key 'block'; did you mean 'blocks'?"),
        (spec({"name": "nasnet", "operations": ["identity", "max3"]}, "nasnet"), "operations.1 must be one of"),
        (spec({"name": "nasnet", "optimizer.lr": {"choice": [1, 2]}}, "nasnet"), "unknown key 'optimizer.lr'"),
        (spec(reward={"metric": "eval/loss"}), "reward.metric eval/loss is better when it is lower"),
        (spec(reward={"cost": "flops"}), "there is no reward.target"),
        (spec(reward={"target": 5.0}), "reward.target is of reward.cost"),
        (spec(controller={"name": "evolution", "population": 2, "sample": 3}), "controller.sample is 3"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_is_refused_in_one_line(wrong, said, tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(UsageError) as error:
        load_spec(tmp_path / "s.yaml")
    text = str(error.value)
    assert said in text
    assert "\n" not in text
    assert text.startswith(f"{tmp_path / 's.yaml'}:")
    assert text.split(":")[1].isdigit()


def test_a_task_that_acts_has_no_flops():
    acting = {"name": "actor_critic", "environment": "CartPole-v1"}
    with pytest.raises(UsageError, match=r"reward.cost flops counts one example's forward, and task actor_critic"):
        load_spec(spec({"optimizer.lr": {"choice": [0.1, 0.2]}}, task=acting,
                       reward={**REWARD, "metric": "eval/return_greedy_mean"}))  # fmt: skip
