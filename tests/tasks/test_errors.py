"""What a user's task may do wrong: one line, the right exit code, and what was committed stays."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from own.oracle import OWN, saved, spec_of

import distml
from distml.errors import RunError, UsageError

ONE = {"name": "single"}


@pytest.fixture(autouse=True)
def _in_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OWN)


def run(tmp_path: Path, task, workers: int = 1, **changes) -> distml.Result:
    strategy = ONE if workers == 1 else {"name": "all_reduce"}
    spec = spec_of(task, workers=workers, strategy=changes.pop("strategy", strategy), **changes)
    return distml.run(spec, out=tmp_path / "run", runtime="inline")


def result(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "run" / "result.json").read_text())


def own(name: str, **args) -> dict:
    return {"name": f"broken:{name}", "args": args}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("task", "message"), [
    (own("BadModel"), r"RuntimeError: no such layer \(broken.py:\d+\)"),
    (own("NoModel"), "build_model must return an nn.Module, not NoneType"),
    (own("Raises"), r"'broken:Raises' cannot be constructed: TypeError: missing a required argument: 'rank'$"),
    (own("NaN", steps=1), "'broken:NaN' cannot be constructed: TypeError: .*'step"),
    (own("NoTask"), "NoTask in broken is not a subclass of distml.Task"),
    (own("Vector"), r"loss must return a scalar, not \(\d+,\); return its mean"),
    (own("Number"), "loss must return a scalar tensor or a distml.Loss, not float"),
    (own("NaN", step=0), "loss is nan"),
    (own("Counts", count="vector"), r"the count of loss must be a number, not Tensor of shape \(2,\)"),
    (own("Counts", count="nan"), "the count of loss is nan; it is how many"),
    (own("Counts", count="negative"), "the count of loss is -1; it is how many"),
    (own("Metrics", metric="tensor"), r"the metrics of loss must be distml.Mean\(total, count\) values; 'm' is Tensor"),
    (own("Metrics", metric="float"), r"the metrics of loss must be distml.Mean\(total, count\) values; 'm' is float"),
    (own("Metrics", metric="vector"), r"the total of 'm' in the metrics of loss must be a number, not Tensor of shape"),
    (own("Raises", rank=0, step=0), r"ZeroDivisionError.*\(broken.py:\d+\)"),
])  # fmt: skip
def test_what_is_found_before_the_first_update_is_a_usage_error_of_one_line(tmp_path, task, message, workers):
    with pytest.raises(UsageError, match=message) as caught:
        run(tmp_path, task, workers)
    assert "\n" not in str(caught.value)
    assert result(tmp_path)["status"] == "failed" if (tmp_path / "run" / "result.json").exists() else True


@pytest.mark.parametrize("strategy", ["all_reduce", "parameter_server"])
def test_counts_and_means_may_be_tensors(tmp_path, strategy):
    """As sums of masks are; metrics with gradients are let go of."""
    changes = {"strategy": {"name": strategy}, "steps": 6, "log": {"every": 2, "to": []},
               "checkpoint": {"every": 3}, "evaluate": {"every": 3}}  # fmt: skip
    found = run(tmp_path, own("Tensors"), 2, **changes)
    plain = run(tmp_path / "plain", "small:Small", 2, **changes)
    assert found.metrics["train/loss"] == plain.metrics["train/loss"]
    assert found.metrics["eval/loss"] == plain.metrics["eval/loss"]
    assert found.metrics["train/again"] == pytest.approx(found.metrics["train/loss"])


def test_models_that_differ_from_rank_to_rank_are_refused(tmp_path):
    with pytest.raises(UsageError, match="build_model gave different weights on different ranks"):
        run(tmp_path, own("Different"), 3)


@pytest.mark.parametrize("strategy", ["all_reduce", "parameter_server"])
def test_a_nan_later_names_rank_and_step_and_leaves_the_last_checkpoint(tmp_path, strategy):
    with pytest.raises(RunError) as caught:
        run(tmp_path, own("NaN", step=7), 2, strategy={"name": strategy}, checkpoint={"every": 3})
    assert (caught.value.role, caught.value.phase, caught.value.step) == ("rank 0", "loss", 7)
    assert str(caught.value) == "rank 0, loss, step 7: BadLossError: loss is nan"
    found = result(tmp_path)
    assert (found["status"], found["checkpoint"]) == ("failed", "checkpoints/step-00000006")
    assert found["error"] == {"rank": "rank 0", "phase": "loss", "step": 7, "message": "BadLossError: loss is nan"}
    assert set(saved(tmp_path / "run")["model"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_failed_run_goes_on_from_its_checkpoint_once_the_cause_is_gone(tmp_path, monkeypatch):
    for name in ("broken.py", "small.py"):
        (tmp_path / name).write_text((OWN / name).read_text())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError):
        run(tmp_path, own("NaN", step=7), checkpoint={"every": 3})
    text = (tmp_path / "broken.py").read_text()
    (tmp_path / "broken.py").write_text(text.replace('float("nan")', "1.0"))
    assert run(tmp_path, own("NaN", step=7), checkpoint={"every": 3}).step == 30


@pytest.mark.parametrize(("name", "message"), [
    ("EvaluateRaises", r"KeyError: 'accuracy' \(broken.py:\d+\)"),
    ("EvaluateFloat", r"what evaluate returns must be distml.Mean\(total, count\) values; 'loss' is float"),
    ("EvaluateNumber", "what evaluate returns must be a dict"),
])  # fmt: skip
@pytest.mark.parametrize("strategy", ["single", "async"])
def test_evaluations_that_fail_name_the_phase(tmp_path, name, message, strategy):
    block = ONE if strategy == "single" else {"name": "parameter_server", "mode": "async"}
    with pytest.raises(RunError, match=message) as caught:
        run(tmp_path, own(name), strategy=block, evaluate={"every": 10}, checkpoint={"every": 4})
    assert (caught.value.phase, caught.value.step) == ("evaluate", 10)
    assert result(tmp_path)["checkpoint"] == "checkpoints/step-00000008"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_test_evaluation_that_fails_is_the_tasks_failure(tmp_path, workers):
    with pytest.raises(RunError) as caught:
        run(tmp_path, own("NoTestSplit"), workers, steps=4)
    assert (caught.value.role, caught.value.phase, caught.value.step) == ("rank 0", "evaluate test", 4)
    assert str(caught.value).startswith("rank 0, evaluate test, step 4: KeyError: 'test' (broken.py:")
    assert result(tmp_path)["checkpoint"] == "checkpoints/step-00000004"


@pytest.mark.parametrize("strategy", [ONE, {"name": "parameter_server", "mode": "async"}])
def test_a_goal_that_is_never_reported_is_said_at_the_first_evaluation(tmp_path, strategy):
    goal = {"metric": "eval/acuracy", "at_least": 0.5}
    with pytest.raises(RunError, match=r"does not report 'eval/acuracy'.*reports \['eval/loss'\]"):
        run(tmp_path, "small:Small", strategy=strategy, stop={"steps": 30, "goal": goal}, evaluate={"every": 5})


def test_a_best_metric_that_is_never_reported_is_said_too(tmp_path):
    best = {"metric": "eval/acuracy", "mode": "max"}
    with pytest.raises(RunError, match=r"checkpoint.best: .*'eval/acuracy'; it reports \['eval/loss'\]"):
        run(tmp_path, "small:Small", checkpoint={"best": best}, evaluate={"every": 5})


# --------------------------------------------------------------------------------------------------- a stream's state
def stateful(**args) -> dict:
    return {"name": "stateful:Stateful", "args": args}


@pytest.mark.parametrize(("state", "message"), [
    ("set", "the stream's state()['a'][1]['b'] is a set; only JSON values, tensors and arrays can be saved"),
    ("generator", "the stream's state()['generator'] is a Generator; only"),
    ("key", "the stream's state()['seen'] has the key 3; keys must be text"),
    ("objects", "the stream's state()['names'] is a ndarray of object; only"),
    ("text array", "the stream's state()['names'] is a ndarray of <U1; only"),
    ("complex", "the stream's state()['z'] is a Tensor of torch.complex64; only"),
])  # fmt: skip
def test_a_state_that_cannot_be_saved_names_its_place(tmp_path, state, message):
    with pytest.raises(RunError) as caught:
        run(tmp_path, stateful(state=state), 2, checkpoint={"every": 3})
    assert (caught.value.role, caught.value.phase, caught.value.step) == ("rank 0", "checkpoint", 3)
    assert f"TypeError: {message}" in str(caught.value)
    assert result(tmp_path)["status"] == "failed"


@pytest.mark.parametrize("bad_rank", [None, 1])
def test_a_state_that_cannot_be_loaded_names_the_rank(tmp_path, bad_rank):
    task = stateful(state="good", bad_rank=bad_rank)
    run(tmp_path, task, 2, steps=4)
    if bad_rank is None:
        assert run(tmp_path, task, 2, steps=6).step == 6
        return
    with pytest.raises(
        UsageError, match=r"^rank 1: its stream cannot go on .*KeyError: 'position' \(stateful.py:\d+\)"
    ):
        run(tmp_path, task, 2, steps=6)


# ------------------------------------------------------------------------------------------------ own tasks, own files
SIBLING = "WIDTH = 4\n"
TASK = """
import distml, torch
from torch import nn
from {where} import WIDTH

class Mine(distml.Task):
    def build_model(self):
        return nn.Linear(2, WIDTH)
    def data(self, split):
        return (torch.ones(10, 2),)
    def loss(self, model, batch, progress):
        return model(batch[0]).square().mean()
"""


def test_a_task_with_a_module_beside_it_runs_from_its_directory_and_from_the_run_directory(tmp_path, monkeypatch):
    (tmp_path / "beside_mine.py").write_text(SIBLING)
    (tmp_path / "mine_flat.py").write_text(TASK.format(where="beside_mine"))
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "mine_flat:Mine", steps=3)
    assert saved(tmp_path / "run")["model"]["weight"].shape == (4, 2)
    assert (tmp_path / "run" / "beside_mine.py").read_text() == SIBLING
    again = distml.run(tmp_path / "run" / "spec.yaml", out=tmp_path / "again", runtime="inline")
    assert (again.step, saved(tmp_path / "again")["model"]["weight"].shape) == (3, (4, 2))


def test_a_task_in_a_package_brings_its_relative_imports(tmp_path, monkeypatch):
    package = tmp_path / "mypackage" / "inner"
    package.mkdir(parents=True)
    (tmp_path / "mypackage" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from .sizes import WIDTH\n")
    (package / "sizes.py").write_text("from ..base import WIDTH\n")
    (tmp_path / "mypackage" / "base.py").write_text(SIBLING)
    (package / "task.py").write_text(TASK.format(where=".sizes"))
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "mypackage.inner.task:Mine", steps=2)
    copied = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*.py")}
    assert copied == {"mypackage/__init__.py", "mypackage/base.py", "mypackage/inner/__init__.py",
                      "mypackage/inner/sizes.py", "mypackage/inner/task.py"}  # fmt: skip
    for name in [name for name in sys.modules if name.startswith("mypackage")]:
        del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]
    for path in (tmp_path / "mypackage").rglob("*.py"):
        path.unlink()
    again = distml.run(tmp_path / "run" / "spec.yaml", out=tmp_path / "again", runtime="inline")
    assert again.step == 2


def test_a_changed_sibling_is_imported_anew(tmp_path, monkeypatch):
    (tmp_path / "width_of.py").write_text(SIBLING)
    (tmp_path / "mine_anew.py").write_text(TASK.format(where="width_of"))
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "mine_anew:Mine", steps=1)
    (tmp_path / "width_of.py").write_text("WIDTH = 6\n")
    spec = spec_of("mine_anew:Mine", strategy=ONE, steps=1)
    distml.run(spec, out=tmp_path / "second", runtime="inline")
    assert saved(tmp_path / "second")["model"]["weight"].shape == (6, 2)


def test_an_import_that_fails_names_the_line(tmp_path, monkeypatch):
    (tmp_path / "mine_bad.py").write_text("import distml\nimport not_there_at_all\nclass Mine(distml.Task): pass\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be imported: ModuleNotFoundError.*\(mine_bad.py:2\)"):
        run(tmp_path, "mine_bad:Mine")


def test_two_tasks_of_one_name_in_two_directories_are_two(tmp_path, monkeypatch):
    for folder, width in (("a", 3), ("b", 5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine_twice.py").write_text(TASK.format(where="sizes_twice"))
        (tmp_path / folder / "sizes_twice.py").write_text(f"WIDTH = {width}\n")
    for folder, width in (("a", 3), ("b", 5), ("a", 3)):
        monkeypatch.chdir(tmp_path / folder)
        spec = spec_of("mine_twice:Mine", strategy=ONE, steps=1)
        distml.run(spec, out=tmp_path / "run", runtime="inline", fresh=True)
        assert saved(tmp_path / "run")["model"]["weight"].shape == (width, 2)
