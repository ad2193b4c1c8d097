"""What `distml show` draws of a run that acts, and what it says where there is nothing to draw."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from own.oracle import OWN
from PIL import Image

from distml.launch.episode import draw_episode, play
from distml.launch.evaluate import load_model
from distml.launch.run import run
from distml.rl.atari import human_normalised
from distml.runs.report import show
from distml.spec.loader import load_spec
from distml.tasks.base import Mean

SPEC = {
    "distml": "v1", "name": "shown", "strategy": "single", "stop": {"steps": 4}, "log": {"to": []},
    "task": {"name": "actor_critic", "environment": "CartPole-v1", "envs_per_worker": 2,
             "evaluation": {"episodes": 2, "max_frames": 20}},
}  # fmt: skip


def test_an_episode_is_drawn_and_stands_in_the_report(tmp_path):
    pytest.importorskip("pygame", reason="needs the extra 'render'")
    run(SPEC, out=tmp_path / "run")
    note = draw_episode(tmp_path / "run")
    picture = Image.open(tmp_path / "run" / "episode.gif")
    assert picture.n_frames > 5
    assert picture.size == (320, 213)
    steps = int(note.split("(")[1].split()[0])
    assert note.endswith(f"episode.gif ({steps} steps, return {steps})")  # CartPole pays 1 per step
    show(tmp_path / "run")
    assert "data:image/gif;base64," in (tmp_path / "run" / "report.html").read_text()


def test_it_is_the_models_own_episode(tmp_path):
    """A policy that always pushes right falls within 11 steps."""
    pytest.importorskip("pygame", reason="needs the extra 'render'")
    run(SPEC, out=tmp_path / "run")
    trained = load_model(tmp_path / "run")
    with torch.no_grad():
        trained.model.policy.output.weight.zero_()
        trained.model.policy.output.bias.copy_(torch.tensor([0.0, 1.0]))
    frames, total, steps = play(trained)
    assert 8 <= steps <= 11
    assert (total, len(frames)) == (steps, steps + 1)


def test_what_cannot_be_drawn_is_said(tmp_path):
    shutil.copy(OWN / "counting.py", tmp_path)
    spec = {**SPEC, "task": {**SPEC["task"], "environment": "counting:Counting"}}
    (tmp_path / "job.yaml").write_text(json.dumps(spec))
    run(tmp_path / "job.yaml", out=tmp_path / "run")
    assert draw_episode(tmp_path / "run").startswith("no episode.gif: environment counting:Counting cannot be ")
    assert not (tmp_path / "run" / "episode.gif").exists()


def test_of_rllib_no_episode_is_drawn_and_it_is_said(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "spec.yaml").write_text(load_spec("rllib-ppo-cartpole").dump())
    assert draw_episode(tmp_path / "run") == "no episode.gif: episodes of RLlib's algorithms are not drawn"


def test_what_does_not_act_has_no_picture(tmp_path):
    run({**SPEC, "task": "regression"}, out=tmp_path / "run")
    assert draw_episode(tmp_path / "run") is None


def test_games_are_drawn_as_the_policy_sees_them(tmp_path):
    pytest.importorskip("ale_py", reason="needs the extra 'atari'")
    task = {**SPEC["task"], "environment": "ALE/Pong-v5", "n_steps": 2, "policy": {"name": "cnn", "hidden": 8},
            "evaluation": {"episodes": 1, "max_frames": 5, "modes": ["greedy"]}}  # fmt: skip
    result = run({**SPEC, "task": task, "stop": {"steps": 1}}, out=tmp_path / "run")
    assert -1 < result.metrics["eval/human_normalised"] < 2
    draw_episode(tmp_path / "run")
    assert Image.open(tmp_path / "run" / "episode.gif").size == (84, 84)


def test_human_scores_are_0_for_chance_and_1_for_a_tester():
    assert human_normalised("ALE/Pong-v5", Mean(-20.7 * 3, 3)).value == pytest.approx(0.0)
    assert human_normalised("ALE/Pong-v5", Mean(14.6 * 3, 3)).value == pytest.approx(1.0)
    assert human_normalised("CartPole-v1", Mean(1, 1)) is None
    assert human_normalised("ALE/Adventure-v5", Mean(1, 1)) is None
