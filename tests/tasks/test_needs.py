"""Needs that only importing a task shows: inherited, computed, unknown."""

from __future__ import annotations

import pytest

import distml
from distml.errors import UsageError

MODULE = """
import torch
from torch import nn
from distml import Task

class Base(Task):
    needs = frozenset({"one_version"})

    def build_model(self):
        return nn.Linear(2, 1)

    def data(self, split):
        return torch.ones(20, 2), torch.ones(20, 1)

    def loss(self, model, batch, progress):
        return (model(batch[0]) - batch[1]).square().mean()

class Inherits(Base):
    pass

class Wild(Base):
    needs = frozenset("one version".split())
"""


def run(tmp_path, monkeypatch, name: str, mode: str) -> distml.Result:
    (tmp_path / "needing.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    spec = {"distml": "v1", "name": "needs", "task": f"needing:{name}", "stop": {"steps": 2}, "batch_size": 4,
            "strategy": {"name": "parameter_server", "mode": mode}, "resources": {"workers": 2}}  # fmt: skip
    return distml.run(spec, out=tmp_path / "run", runtime="inline")


def test_inherited_needs_are_held_against_the_strategy(tmp_path, monkeypatch):
    with pytest.raises(
        UsageError, match=r"needs one_version, which parameter_server/async does not offer; .*all_reduce"
    ):
        run(tmp_path, monkeypatch, "Inherits", "async")
    assert run(tmp_path, monkeypatch, "Inherits", "sync").status == "done"


def test_a_need_that_is_not_known_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"which is none of group_mean, one_version, whole_weights"):
        run(tmp_path, monkeypatch, "Wild", "sync")
