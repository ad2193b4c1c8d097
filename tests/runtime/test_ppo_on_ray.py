"""PPO and TRPO on real processes: what workers agree on inside a step, over each transport and over a death."""

from __future__ import annotations

import pytest
from own.on_ray import SPEC, Notes, assert_same, weights

import distml

pytestmark = pytest.mark.usefixtures("shared_ray")

BASE = {
    **{key: SPEC[key] for key in ("distml", "log", "resources", "limits")},
    "name": "agreeing",
    "strategy": "all_reduce",
    "stop": {"steps": 24},
    "evaluate": {"every": 1000},
    "checkpoint": {"every": 12},
}
ACTS = {"environment": "CartPole-v1", "envs_per_worker": 4}
PPO = {
    **BASE,
    "task": {**ACTS, "name": "ppo", "n_steps": 16, "minibatches": 2, "target_kl": 0.004},
    "optimizer": {"name": "adam", "lr": 0.01},
}
TRPO = {**BASE, "task": {**ACTS, "name": "trpo", "n_steps": 16}, "optimizer": {"name": "sgd", "lr": 1.0}}
REINFORCE = {**BASE, "task": {**ACTS, "name": "reinforce"}, "optimizer": {"name": "adam", "lr": 0.01}}


@pytest.mark.parametrize("spec", [PPO, *(pytest.param(spec, marks=pytest.mark.slow) for spec in (TRPO, REINFORCE))],
                         ids=["ppo", "trpo", "reinforce"])  # fmt: skip
def test_processes_do_what_threads_do_bitwise(spec, tmp_path):
    distml.run(spec, out=tmp_path / "ray", runtime="ray")
    distml.run(spec, out=tmp_path / "inline", runtime="inline")
    assert_same(weights(tmp_path / "ray", 24), weights(tmp_path / "inline", 24))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["process_group", "object_store"])
def test_trpo_takes_its_steps_over_other_transports(transport, tmp_path):
    strategy = "all_reduce" if transport == "process_group" else {"name": "parameter_server", "servers": 2}
    spec = {**TRPO, "transport": transport, "strategy": strategy, "stop": {"steps": 4}}
    distml.run(spec, out=tmp_path / "ray", runtime="ray")
    distml.run({**spec, "transport": "auto"}, out=tmp_path / "inline", runtime="inline")
    found, expected = weights(tmp_path / "ray", 4), weights(tmp_path / "inline", 4)
    assert max(abs(found[name] - expected[name]).max() for name in expected) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("spec", [PPO, TRPO], ids=["ppo", "trpo"])
def test_a_death_does_not_leave_anyone_waiting(spec, tmp_path):
    notes = Notes()
    result = distml.run(spec, out=tmp_path / "run", runtime="ray", inject=["kill:rank=1,step=15"], display=notes)
    assert (result.status, result.step) == ("done", 24)
    assert any("rank 1 was lost" in line for line in notes.lines)
