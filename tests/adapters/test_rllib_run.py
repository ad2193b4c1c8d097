"""RLlib trains for real: the run directory, evaluations on seeds of their own, resume, and how things end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from own import seeded

import distml
from distml.cli import main
from distml.errors import RunError, UsageError
from distml.runs.directory import RunDirectory
from distml.runs.display import SilentDisplay
from distml.spec.loader import load_spec
from distml.tasks.sources import SourceTree

TRAINING_SEEDS = 2**30


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def numbers(state: object) -> list[np.ndarray]:
    """All arrays and numbers of a nested state, in order of their keys."""
    if isinstance(state, dict):
        return [number for key in sorted(state, key=str) for number in numbers(state[key])]
    if isinstance(state, list | tuple):
        return [number for item in state for number in numbers(item)]
    return [np.asarray(state)] if isinstance(state, np.ndarray | int | float) else []


def equal(one: object, other: object) -> bool:
    left, right = numbers(one), numbers(other)
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def open_session(path: Path, start: int = 0, **changes: object):
    from distml.adapters.rllib_session import Session

    loaded = load_spec(path / "spec.yaml", changes)
    session = Session(loaded.job, SourceTree.collect(loaded.job, loaded.directory), None, path / "logs")
    session.build(start)
    return session


def test_a_run_leaves_what_every_run_leaves(train, tmp_path, capsys):
    result = train()
    run = tmp_path / "run"
    assert (result.status, result.step, result.exit_code) == ("done", 2, 0)
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2, 2]
    assert {"rl/episode_return_mean", "train/loss", "train/lr", "train/entropy", "throughput/frames_per_s", "rl/frames",
            "timing/start_s", "wall_s"} <= found[0].keys()  # fmt: skip
    assert 128 <= found[0]["rl/frames"] < found[1]["rl/frames"]
    assert found[2].keys() == {"step", "wall_s", "eval/return_mean", "eval/episode_length_mean", "timing/evaluate_s"}
    assert found[2]["eval/return_mean"] == found[2]["eval/episode_length_mean"]  # CartPole pays 1 per frame
    assert result.metrics["eval/return_mean"] == found[2]["eval/return_mean"]
    kept = {path.name for path in run.iterdir()}
    assert kept == {
        "spec.yaml",
        "environment.json",
        "metrics.jsonl",
        "result.json",
        "checkpoints",
        "logs",
        "lock",
        "rllib.key",
    }
    assert (
        load_spec(run / "spec.yaml").job
        == load_spec({**load_spec(run / "spec.yaml").job.model_dump(by_alias=True)}).job
    )

    assert main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "PPO of RLlib" in shown
    assert "CartPole-v1" in shown
    assert (run / "report.html").exists()
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "kind rllib" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--split", "validation"]) == 0
    assert f"eval/return_mean {found[2]['eval/return_mean']!r}" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--split", "train"]) == 2


def test_a_finished_run_is_not_run_again_and_a_changed_one_is_refused(train, tmp_path):
    first = train()
    before = rows(tmp_path / "run")
    assert train().metrics == first.metrics
    assert rows(tmp_path / "run") == before
    with pytest.raises(UsageError, match=r"config\.lr"):
        train(overrides={"config.lr": 0.5, "stop.steps": 3})
    with pytest.raises(UsageError, match="holds a run of kind rllib"):
        distml.run("digits-single", out=tmp_path / "run")


def test_a_resumed_run_has_the_weights_the_optimiser_and_the_counters(train, tmp_path):
    train()
    run = tmp_path / "run"
    frames = rows(run)[1]["rl/frames"]
    fresh = open_session(run)
    initial = fresh.algorithm.learner_group.get_state()
    fresh.algorithm.train()
    trained = fresh.algorithm.learner_group.get_state()
    fresh.algorithm.save_to_path(str(tmp_path / "saved"))
    fresh.close()
    again = open_session(run, start=1)
    assert not equal(again.algorithm.learner_group.get_state(), trained)
    again.restore(tmp_path / "saved", 1)
    assert equal(again.algorithm.learner_group.get_state(), trained)
    assert not equal(initial, trained)
    again.close()

    result = train(overrides={"stop.steps": 4})
    assert result.step == 4
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2, 2, 3, 4, 4]
    assert frames + 128 <= found[3]["rl/frames"] <= frames + 128 + 4
    assert found[3]["wall_s"] > found[1]["wall_s"]
    assert [row.get("timing/start_s") is not None for row in found] == [True, False, False, True, False, False]


def test_a_copied_run_is_not_loaded(train, tmp_path):
    train()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(UsageError, match="was not written here by this run"):
        distml.run(tmp_path / "copy" / "spec.yaml", {"stop.steps": 3}, out=tmp_path / "copy")


@pytest.fixture
def seeded_spec(spec, tmp_path):
    """A job in the environment that writes its seeds down, which is a file beside the spec."""

    def write(breaks_after=None):
        shutil.copy(Path(seeded.__file__), tmp_path / "seeded_env.py")
        arguments = {"file": str(tmp_path / "seeds"), "breaks_after": breaks_after}
        spec["environment"] = {"id": "seeded_env:Seeded", "args": arguments}
        spec["evaluate"] = {"every": 1, "episodes": 6}
        path = tmp_path / "job.yaml"
        path.write_text(json.dumps(spec))
        return path, tmp_path / "run"

    yield write
    sys.modules.pop("seeded_env", None)


def test_evaluations_have_seeds_of_their_own_and_count_each_first_episode_once(seeded_spec, train, tmp_path):
    result = train(seeded_spec()[0])
    seeds = [int(line) for line in (tmp_path / "seeds").read_text().split()]
    evaluated = [seed for seed in seeds if seed < TRAINING_SEEDS]
    trained = [seed for seed in seeds if seed >= TRAINING_SEEDS]
    assert len(trained) >= 2
    assert len(evaluated) >= 12
    assert len(set(evaluated)) == 6  # the same ones in both evaluations
    lengths = [seeded.length_of(seed) for seed in set(evaluated)]
    assert {seeded.SHORT, seeded.LONG} == set(lengths)
    assert result.metrics["eval/return_mean"] == sum(lengths) / 6
    assert (tmp_path / "run" / "seeded_env.py").exists()

    # Control: RLlib's own count of the first episodes to end has the short ones only.
    session = open_session(tmp_path / "run", start=2)
    runner = session.algorithm.eval_env_runner_group.local_env_runner
    first_to_end = runner.sample(num_episodes=6, explore=False)
    assert sum(len(episode) for episode in first_to_end) / len(first_to_end) < sum(lengths) / 6
    session.close()


def test_whole_episodes_do_not_start_in_the_same_states_again(seeded_spec, train, tmp_path):
    """RLlib's env runners take their seed again at every call that is for whole episodes."""
    for mode in ("truncate_episodes", "complete_episodes"):
        train(seeded_spec()[0], {"config.batch_mode": mode, "stop.steps": 3}, fresh=True)
        seeds = [int(line) for line in (tmp_path / "seeds").read_text().split()]
        trained = [seed for seed in seeds if seed >= TRAINING_SEEDS]
        assert len(trained) == len(set(trained))


def test_the_best_checkpoint_is_kept_and_a_long_episode_is_cut(train, spec, tmp_path):
    spec["checkpoint"] = {"every": 1, "keep": 1, "best": {"metric": "eval/return_mean", "mode": "max"}}
    spec["evaluate"] = {"every": 1, "episodes": 2, "max_frames": 1}
    result = train(spec, {"stop.steps": 3})
    assert result.metrics["eval/return_mean"] <= 2 * 64  # cut at the first look after max_frames
    assert result.best is not None
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert kept == {f"step-{result.best['step']:08d}", "step-00000003"}


def test_a_goal_ends_a_run_and_a_missed_one_says_so(train, spec, tmp_path):
    spec["stop"] = {"steps": 50, "goal": {"metric": "eval/return_mean", "at_least": 1.0}}
    result = train(spec)
    assert (result.status, result.step) == ("goal_met", 2)
    missed = train(spec, {"stop": {"steps": 1, "goal": {"metric": "eval/return_mean", "at_least": 600.0}}}, fresh=True)
    assert (missed.status, missed.exit_code) == ("goal_missed", 4)
    assert (tmp_path / "run.1").is_dir()


@pytest.mark.parametrize(
    ("overrides", "phrase"),
    [
        ({"config.minibatch_size": 256}, "RLlib cannot build PPO with this config: ValueError"),
        ({"config.grad_clip_by": "nonsense"}, "must be one of: 'value', 'norm', or 'global_norm'"),
        ({"environment.args": {"nonsense": 3}}, "environment CartPole-v1 cannot be made: TypeError"),
        ({"resources.cpus": 1, "config.num_env_runners": 2}, "resources.cpus is 1, the processes of PPO reserve 3"),
        ({"config.num_gpus_per_learner": 1}, "asks for 1 GPUs, this cluster has 0; set num_gpus_per_learner"),
        ({"config.output": "recorded"}, "pip install msgpack-numpy"),
    ],
)
def test_what_the_spec_explains_is_said_before_the_first_update(overrides, phrase, train, tmp_path):
    with pytest.raises(UsageError) as caught:
        train(overrides=overrides)
    assert phrase in str(caught.value)
    assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_arguments_of_training_jobs_are_refused(spec, tmp_path):
    for arguments in ({"runtime": "inline"}, {"inject": ["kill:rank=0,step=1"]}):
        with pytest.raises(UsageError, match="leave it out"):
            distml.run(spec, out=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_single_frame_is_no_success(train, spec, tmp_path):
    """RLlib only logs that its env runners failed, and goes on."""
    from distml.adapters.rllib import RLlibRun

    run = RunDirectory.open(tmp_path / "run")
    job = load_spec(spec).job
    with run:
        (tmp_path / "run" / "logs").mkdir()
        one = RLlibRun(job, run, SourceTree(), None, SilentDisplay(), 0.0)
        one.build(False)
        one.algorithm.train = lambda: {"training_iteration": one.step + 1}
        with pytest.raises(RunError, match="not a single frame in 2 iterations from the env runners"):
            one.train()
        one.heard = -job.limits.lost_after_s
        with pytest.raises(RunError, match="no new frame for 300 s"):
            one._iterate()
        one.close()


class Sends(SilentDisplay):
    """Sends this process a signal at a step."""

    def __init__(self, step: int) -> None:
        self.step, self.notes = step, []

    def report(self, step: int, fraction: float, metrics: object) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_signal_ends_a_run_with_a_checkpoint_to_go_on_from(train, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    result = train(overrides={"stop.steps": 5, "evaluate.every": 5}, display=Sends(3))
    assert (result.status, result.step, result.exit_code) == ("interrupted", 3, 130)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "rllib").is_dir()
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    display = Sends(-1)
    again = train(overrides={"stop.steps": 5, "evaluate.every": 5}, display=display)
    assert (again.status, again.step) == ("done", 5)
    assert "resuming from step 3" in display.notes
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 5]


def test_a_damaged_checkpoint_is_passed_over(train, tmp_path):
    train(overrides={"checkpoint.every": 1})
    state = tmp_path / "run" / "checkpoints" / "step-00000002" / "rllib" / "algorithm_state.pkl"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    display = Sends(-1)
    assert train(overrides={"checkpoint.every": 1, "stop.steps": 3}, display=display).step == 3
    assert any("step-00000002 is damaged" in note for note in display.notes)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 2, 3, 3]


@pytest.mark.parametrize(("breaks_after", "error"), [(10, UsageError), (100, RunError)])
def test_a_failure_is_the_specs_before_the_first_update_and_the_runs_later(breaks_after, error, seeded_spec, train):
    path, run = seeded_spec(breaks_after)
    with pytest.raises(error, match="OSError: the motor is broken"):
        train(path)
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "failed"
    assert "the motor is broken" in result["error"]["message"]
    assert "Traceback" in (run / "logs" / "rllib-error.txt").read_text()
    if error is RunError:
        assert result["error"]["rank"] == "rllib"
        assert result["error"]["step"] >= 1
