"""The table of config keys is what the installed RLlib has, and nothing of RLlib's is forgotten in silence."""

from __future__ import annotations

import pytest
from ray.rllib.algorithms.registry import ALGORITHMS as REGISTERED

from distml.adapters.rllib_table import EXCLUDED, leftover, table
from distml.spec import rllib_table
from distml.spec.rllib import ALGORITHMS, OFFLINE, REFUSED, RLlibSpec, check_rllib

KINDS = (bool, int, float, str, list, dict)


def test_the_table_is_what_rllib_says():
    for name, value in table().items():
        assert vars(rllib_table)[name] == value, f"run python -m distml.adapters.rllib_table ({name})"


def test_what_the_table_leaves_out_is_named():
    assert leftover() == EXCLUDED
    known = {*rllib_table.COMMON, *(key for keys in rllib_table.ALGORITHMS.values() for key in keys)}
    assert not known & set(REFUSED)


def test_the_algorithms_are_those_that_rllib_registers():
    assert sorted(ALGORITHMS) == sorted(REGISTERED)
    assert set(OFFLINE) < set(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithms_own_defaults_are_accepted(name):
    """Of the annotations in RLlib not all are right: a default that the table refuses would show it."""
    default = vars(REGISTERED[name]()[1])
    keys = rllib_table.COMMON | rllib_table.ALGORITHMS[name]
    plain = {key: default[key] for key in keys if type(default.get(key)) in KINDS}
    # CQL's is of a buffer that its learner never makes: it reads recorded episodes.
    config = {key: value for key, value in plain.items() if value != "sampler" and not (
        key == "replay_buffer_config" and name == "CQL")}  # fmt: skip
    config["input_"] = "."
    job = RLlibSpec.model_validate({
        "distml": "v1", "kind": "rllib", "name": "x", "algorithm": name, "environment": {"id": "CartPole-v1"},
        "config": config, "stop": {"steps": 1},
    })  # fmt: skip
    assert len(config) > 60
    assert [problem.text for problem in check_rllib(job)] == []
