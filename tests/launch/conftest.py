"""Runs of a few steps, trained inline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import distml

SPEC = {
    "distml": "v1",
    "name": "tiny",
    "task": "classification",
    "strategy": "single",
    "optimizer": {"name": "adamw", "lr": 5.0e-3},
    "stop": {"steps": 30},
    "evaluate": {"every": 10},
    # Upside down on purpose: the worst loss, the first one, is the best, so that best and last differ.
    "checkpoint": {"every": 10, "keep": 2, "best": {"metric": "eval/loss", "mode": "max"}},
    "log": {"every": 10, "to": []},
}

OWN_TASK = """
import torch
from torch import nn

from distml import Mean, Task
from helper import OUTPUTS


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.out = nn.Linear(4, OUTPUTS)

    def forward(self, inputs):
        return self.out(self.tied(self.norm(self.first(inputs))))


class Own(Task):
    def build_model(self):
        return Net()

    def data(self, split):
        draw = torch.Generator().manual_seed(len(split))
        return torch.randn(64, 4, generator=draw), torch.randn(64, OUTPUTS, generator=draw)

    def loss(self, model, batch, progress):
        return nn.functional.mse_loss(model(batch[0]), batch[1])
"""


@pytest.fixture(scope="session")
def _finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny"
    # Slowly: a checkpoint that comes while two others are being written would take the waiting one's place.
    distml.run(SPEC, out=path, inject=["slow:rank=0,step=10"])
    return path


@pytest.fixture
def tiny_spec() -> dict:
    """What `tiny` is a run of."""
    return dict(SPEC)


@pytest.fixture
def tiny(_finished, tmp_path) -> Path:
    """A finished run's directory, to do with as one likes."""
    return Path(shutil.copytree(_finished, tmp_path / "tiny"))


LANGUAGE_SPEC = {
    "distml": "v1",
    "name": "letters",
    "task": {
        "name": "language_model", "data": {"path": "text.txt"}, "block": 24, "tokenizer": {"name": "characters"},
        "model": {"name": "gpt", "layers": 2, "heads": 2, "width": 32},
    },
    "strategy": "single",
    "optimizer": {"name": "adamw", "lr": 1.0e-2},
    "batch_size": 16,
    "stop": {"steps": 120},
    "evaluate": {"every": 120},
    "log": {"to": []},
}  # fmt: skip


@pytest.fixture(scope="session")
def language_run(tmp_path_factory) -> Path:
    """A finished run of a small GPT on lines that say one thing; not to be changed."""
    folder = tmp_path_factory.mktemp("language")
    lines = (f"line {number} says: one thing after another.\n\n" for number in range(300))
    (folder / "text.txt").write_text("".join(lines))
    spec = folder / "letters.yaml"
    spec.write_text(json.dumps(LANGUAGE_SPEC))
    distml.run(spec, out=folder / "run")
    return folder / "run"


@pytest.fixture
def own_run(tmp_path) -> Path:
    """A run of a user's own task: buffers, tied and frozen weights; its file is only in the run directory."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "own_net.py").write_text(OWN_TASK)
    (source / "helper.py").write_text("OUTPUTS = 2\n")
    (source / "own.yaml").write_text(
        "distml: v1\nname: own\ntask: 'own_net:Own'\nstrategy: single\nbatch_size: 16\nstop: {steps: 5}\n"
        "init: {freeze: ['out.*']}\nlog: {to: []}\n"
    )
    distml.run(source / "own.yaml", out=tmp_path / "own")
    shutil.rmtree(source)
    return tmp_path / "own"
