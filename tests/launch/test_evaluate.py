"""A run's weights after training: scores, plain-PyTorch files, and what is said when they are not there."""

from __future__ import annotations

import json
import shutil
import stat
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distml.cli import main
from distml.launch.evaluate import load_model, verify_export
from distml.launch.run import as_result
from distml.runs.directory import RunDirectory


def scores(capsys) -> dict[str, float]:
    """What `evaluate` printed."""
    return {name: float(value) for name, value in (line.split(" ") for line in capsys.readouterr().out.splitlines())}


def row(run, step, prefix) -> dict[str, float]:
    """The run's own scores at a step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {key: value for line in lines if line["step"] == step for key, value in line.items() if prefix in key}


def damage(run, step) -> None:
    """Flip a bit of a checkpoint's weights."""
    file = run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def result_of(run):
    """As `distml.run` returned it."""
    return as_result(RunDirectory.view(run).result.read(), run)


def refused(arguments, capsys) -> str:
    """The one line with which a command ends, with exit code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


# ------------------------------------------------------------------------------------------------------------- evaluate
def test_evaluate_prints_what_the_run_measured_on_its_best_checkpoint(tiny, capsys):
    assert main(["evaluate", str(tiny)]) == 0
    assert scores(capsys) == row(tiny, 10, "test/")
    assert main(["evaluate", str(tiny), "--split", "validation"]) == 0
    found = scores(capsys)
    assert found == row(tiny, 10, "eval/")
    assert found != row(tiny, 30, "eval/")  # the control: the last one scores otherwise
    assert main(["evaluate", str(tiny), "--split", "train"]) == 0
    assert scores(capsys).keys() == {"train/accuracy", "train/loss"}


def test_without_a_best_one_the_last_checkpoint_counts(tiny, capsys):
    result = json.loads((tiny / "result.json").read_text())
    (tiny / "result.json").write_text(json.dumps({**result, "best": None}))
    (tiny / "checkpoints" / "best.json").unlink()
    assert load_model(tiny).step == 30
    (tiny / "result.json").write_text(json.dumps({**result, "best": None, "checkpoint": "checkpoints/step-00000020"}))
    assert load_model(tiny).step == 20
    (tiny / "result.json").unlink()  # a run that was killed before it said anything
    assert load_model(tiny).step == 30


def test_a_damaged_checkpoint_is_passed_over_and_said(tiny, capsys):
    damage(tiny, 10)
    assert main(["evaluate", str(tiny), "--split", "validation"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("checkpoint step-00000010 is damaged (model.safetensors: hash differs); using step-00000030")
    assert dict(line.split(" ") for line in out.splitlines()) == {k: repr(v) for k, v in row(tiny, 30, "eval/").items()}
    for step in (20, 30):
        damage(tiny, step)
    assert "no good checkpoint" in refused(["evaluate", tiny], capsys)


def test_what_explains_that_there_is_nothing_to_evaluate(tiny, tmp_path, capsys):
    assert "unknown split 'tset'; known: train, validation, test" in refused(
        ["evaluate", tiny, "--split", "tset"], capsys
    )
    assert "there is no such folder" in refused(["evaluate", tmp_path / "nowhere"], capsys)
    (tmp_path / "folder").mkdir()
    assert "is not a run directory" in refused(["evaluate", tmp_path / "folder"], capsys)
    shutil.rmtree(tiny / "checkpoints")
    assert "has no checkpoint yet" in refused(["evaluate", tiny], capsys)
    (tiny / "spec.yaml").unlink()
    assert "has no spec.yaml" in refused(["export", tiny, "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


def test_an_own_task_that_changed_or_fails_is_one_line(own_run, capsys):
    file = own_run / "own_net.py"
    text = file.read_text()
    file.write_text(text.replace("nn.Linear(4, OUTPUTS)", "nn.Linear(4, OUTPUTS + 1)"))
    message = refused(["evaluate", own_run], capsys)
    assert "is of another model: out.weight has shape (2, 4) there, (3, 4) here" in message
    file.write_text(text.replace("draw = ", "raise ValueError('no data today'); draw = "))
    message = refused(["evaluate", own_run], capsys)
    assert "evaluation of the test split failed: ValueError: no data today (own_net.py:" in message


def test_the_model_is_ready_to_use_and_nothing_else_has_changed(own_run):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = result_of(own_run).model()
    assert torch.equal(torch.rand(3), expected)
    assert not model.training
    assert model.tied.weight is model.first.weight
    assert int(model.norm.num_batches_tracked) == 5


# --------------------------------------------------------------------------------------------------------------- export
def test_an_export_needs_no_distml_and_is_the_run_s_model(own_run, tmp_path, capsys):
    out = tmp_path / "deep" / "export"
    assert main(["export", str(own_run), "--out", str(out)]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir()) == ["metadata.json", "model.safetensors"]
    assert list(out.parent.iterdir()) == [out]
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (out / "metadata.json").stat().st_mode
    )
    net = sys.modules["own_net"].Net()  # the user's own class; nothing of distml's
    net.load_state_dict(load_file(out / "model.safetensors"))  # strict: tied, frozen and buffers are all there
    inputs = torch.randn(8, 4)
    own = load_model(own_run).model
    assert torch.equal(net.eval()(inputs), own(inputs))
    untrained = sys.modules["own_net"].Net().eval()
    assert not torch.equal(untrained(inputs), own(inputs))
    about = json.loads((out / "metadata.json").read_text())
    assert (about["name"], about["step"], about["task"]["name"]) == ("own", 5, "own_net:Own")
    assert about["metrics"] == row(own_run, 5, "eval/")


def test_an_export_that_differs_is_found(tiny, tmp_path):
    trained = load_model(tiny)
    out = tmp_path / "out"
    assert main(["export", str(tiny), "--out", str(out)]) == 0
    verify_export(trained, out / "model.safetensors")
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(RuntimeError, match="differs from the checkpoint in layers"):
        verify_export(trained, out / "model.safetensors")


def test_an_export_never_overwrites(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert main(["export", str(tiny), "--out", str(out)]) == 0  # empty: fine
    before = (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert "is not an empty directory" in refused(["export", tiny, "--out", out], capsys)
    assert "unknown format 'onnx'; known: safetensors, hf" in refused(
        ["export", tiny, "--out", tmp_path / "x", "--format", "onnx"], capsys
    )
    (tmp_path / "file").write_text("mine")
    assert "is not an empty directory" in refused(["export", tiny, "--out", tmp_path / "file"], capsys)
    assert "cannot write" in refused(["export", tiny, "--out", tmp_path / "file" / "below"], capsys)
    assert (out / "model.safetensors").read_bytes() == before
    assert isinstance(load_model(tiny).model, nn.Module)
