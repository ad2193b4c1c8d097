"""Deaths in the midst of an exchange in shared memory, on real processes, and how the transport is chosen.

A synchronous run that loses a worker at any stage ends with the very weights of an undisturbed one. An asynchronous one
goes on where nothing was being written, and else goes back to a whole state; a torn vector would show in `Ones`, whose
weights are all equal to minus the version.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from own import on_ray
from own.on_ray import Notes, assert_same, weights

import distml
from distml.errors import UsageError
from distml.runtime import ray as ray_runtime
from distml.runtime.transport import choose, fall_back
from distml.spec.loader import load_spec

pytestmark = pytest.mark.usefixtures("shared_ray")

SPEC = {**on_ray.SPEC, "evaluate": {"every": 1000}, "checkpoint": {"every": 1000}}
LARGE = {"name": "classification", "model": {"name": "mlp", "hidden": [256, 256]}}  # its states stay in the segment
ONES = Path(__file__).parents[1] / "own" / "ones.py"


MASKED = """
import torch
from torch import nn
import distml

class Masked(distml.Task):
    def build_model(self):
        model = nn.Linear(2, 1)
        model.register_buffer("mask", torch.ones(768, 768).tril().bool())
        return model

    def data(self, split):
        return torch.ones(40, 2), torch.ones(40, 1)

    def loss(self, model, batch, progress):
        return (model(batch[0]) - batch[1]).square().mean()
"""


def run(out: Path, runtime: str = "ray", inject=(), display=None, **keys) -> distml.Result:
    return distml.run({**SPEC, **keys}, out=out, runtime=runtime, inject=inject, display=display)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(out, "inline", task=LARGE)
    return weights(out)


@pytest.mark.parametrize(
    ("injection", "strategy"),
    [
        pytest.param("kill:rank=1,step=34,at=gradients", "all_reduce", marks=pytest.mark.slow),
        ("kill:rank=0,step=34,at=sums", "all_reduce"),
        pytest.param("kill:rank=1,step=34,at=weights", {"name": "parameter_server"}, marks=pytest.mark.slow),
        pytest.param("stop:rank=0,step=34,at=sums", {"name": "parameter_server"}, marks=pytest.mark.slow),
    ],
)
def test_a_death_at_any_stage_of_a_synchronous_exchange_is_undone(injection, strategy, undisturbed, tmp_path):
    notes = Notes()
    result = run(tmp_path / "run", task=LARGE, strategy=strategy, inject=[injection], display=notes)
    assert result.metrics["runtime/restarts"] == 1
    # What a process said just before it was stopped may be lost with it: then it is the state before.
    assert [line for line in notes.lines if "from step 30" in line or "from step 20" in line], notes.lines
    assert_same(weights(tmp_path / "run"), undisturbed)


def test_both_workers_may_die_the_state_is_the_drivers_too(undisturbed, tmp_path):
    inject = ["kill:rank=1,step=34,at=sums", "kill:rank=0,step=34,at=gradients"]
    result = run(tmp_path / "run", task=LARGE, inject=inject)
    assert result.status == "done"
    assert_same(weights(tmp_path / "run"), undisturbed)


def test_a_kept_state_that_is_gone_is_replaced_by_the_newest_checkpoint(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_runtime.RayRuntime, "kept", lambda self, version: None)
    notes = Notes()
    keep = {"every": 20}
    inject = ["kill:rank=1,step=37"]
    run(tmp_path / "run", task=LARGE, checkpoint=keep, inject=inject, display=notes)
    assert [line for line in notes.lines if "from step 20" in line]
    assert_same(weights(tmp_path / "run"), undisturbed)


@pytest.mark.parametrize(
    ("stage", "goes_back"),
    [
        pytest.param("lock", True, marks=pytest.mark.slow),
        pytest.param("update", True, marks=pytest.mark.slow),
        pytest.param("publish", True, marks=pytest.mark.slow),
        ("answer", False),
    ],
)
def test_a_death_at_any_stage_of_an_asynchronous_exchange_leaves_no_torn_vector(stage, goes_back, tmp_path):
    """Momentum makes a state of its own: half an update twice, or one lost, would change it.

    The other worker is slow, so that the run is not over before the death is noticed.
    """
    (tmp_path / "ones.py").write_text(ONES.read_text())
    spec = {**SPEC, "task": "ones:Ones", "strategy": {"name": "parameter_server", "mode": "async"},
            "optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.5}, "stop": {"steps": 80}}  # fmt: skip
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    notes = Notes()
    result = distml.run(tmp_path / "spec.yaml", out=tmp_path / "run", runtime="ray", display=notes,
                        inject=[f"kill:rank=1,step=34,at={stage}", "slow:rank=0,step=0"])  # fmt: skip
    assert result.metrics["runtime/restarts"] == 1
    assert [line for line in notes.lines if "was lost" in line and ("all go on from step" in line) == goes_back], (
        notes.lines
    )
    found = weights(tmp_path / "run", result.step)
    momentum, weight = 0.0, 0.0
    for _ in range(result.step):
        momentum = 0.5 * momentum + 1.0
        weight -= momentum
    assert np.allclose(found["weight"], weight, rtol=1e-5)
    assert np.unique(found["weight"]).size == 1


def test_bounded_staleness_goes_on_when_a_worker_dies_for_whom_others_wait(tmp_path):
    strategy = {"name": "parameter_server", "mode": "ssp", "max_staleness": 1}
    result = run(tmp_path / "run", strategy=strategy, inject=["stop:rank=1,step=34"])
    assert (result.status, result.metrics["runtime/restarts"]) == ("done", 1)


@pytest.mark.parametrize(
    "strategy",
    [pytest.param("all_reduce", marks=pytest.mark.slow), {"name": "parameter_server", "mode": "async"}],
)
def test_two_of_three_workers_die_at_once(strategy, tmp_path):
    inject = ["kill:rank=1,step=20", "kill:rank=2,step=20"]
    limits = {**SPEC["limits"], "max_restarts": 3}
    result = run(tmp_path / "run", strategy=strategy, inject=inject, resources={"workers": 3}, limits=limits)
    assert result.status == "done"
    assert result.step == 60


def test_large_buffers_of_asynchronous_workers_take_the_wire(tmp_path):
    """A mask of half a million elements has no place in what the workers keep books of."""
    (tmp_path / "masked.py").write_text(MASKED)
    spec = {**SPEC, "task": "masked:Masked", "strategy": {"name": "parameter_server", "mode": "async"},
            "stop": {"steps": 4}}  # fmt: skip
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    assert distml.run(tmp_path / "spec.yaml", out=tmp_path / "run", runtime="ray").status == "done"
    used = json.loads((tmp_path / "run" / "environment.json").read_text())["transport"]
    assert used.startswith("object_store (1 server: 589,824 elements of buffers are too many")


def test_a_failure_of_servers_that_are_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no servers with transport shared_memory .* transport=object_store"):
        run(tmp_path / "run", strategy={"name": "parameter_server"}, inject=["kill:server=0,step=5"])


# --------------------------------------------------------------------------------------------------------- the choice
def job(**keys):
    return load_spec({**SPEC, **keys}).job


def test_what_auto_chooses_and_why():
    one, two = ["a", "a"], ["a", "b"]
    served = {"name": "parameter_server", "servers": 2}
    cases = [
        (job(), one, "shared_memory (2 workers on one host)"),
        (job(), two, "process_group (gloo: one worker on each of 2 hosts)"),
        (job(resources={"workers": 4}), ["a", "b", "a", "b"],
         "shared_memory (4 workers on 2 hosts, gloo between the hosts)"),
        (job(strategy=served), one, "shared_memory (2 workers on one host, who are the servers too)"),
        (job(strategy=served), two, "object_store (2 servers: the workers are on 2 hosts)"),
        (job(strategy={"name": "all_reduce", "compression": "bf16"}), one,
         "process_group (gloo: compression is for a wire)"),
        (job(strategy={"name": "parameter_server", "mode": "async", "prefetch": True}), one,
         "object_store (1 server: prefetch is for a wire)"),
        (job(transport="process_group"), one, "process_group (gloo: asked for)"),
        (job(resources={"workers": 1}), ["a"], "none (one worker)"),
        (job(resources={"workers": 2, "gpus_per_worker": 1}), one, "process_group (nccl: the gradients are on GPUs)"),
    ]  # fmt: skip
    for spec, nodes, expected in cases:
        assert str(choose(spec, nodes)) == expected


def test_shared_memory_that_is_asked_for_and_impossible_is_refused():
    with pytest.raises(UsageError, match="one worker on each of 2 hosts; set transport to process_group or auto"):
        choose(job(transport="shared_memory"), ["a", "b"])
    lack = "/dev/shm has 3 MiB to give, 8 MiB are needed on host a"
    asked = job(transport="shared_memory")
    with pytest.raises(UsageError, match="8 MiB are needed on host a; free or enlarge it, or set transport to"):
        fall_back(asked, choose(asked, ["a", "a"]), lack)
    assert str(fall_back(job(), choose(job(), ["a", "a"]), lack)) == f"process_group (gloo: {lack})"


def test_too_little_shared_memory_falls_back_and_says_so(tmp_path, monkeypatch):
    """The workers say that they have nothing to give; the run goes over the wire and ends the same."""
    original = ray_runtime.RayRuntime._build_workers

    def poor(self, ranks):
        original(self, ranks)
        for facts in self.facts.values():
            facts["shared_bytes_free"] = 1000

    monkeypatch.setattr(ray_runtime.RayRuntime, "_build_workers", poor)
    for name, wire in (("all_reduce", "process_group (gloo"), ("parameter_server", "object_store (1 server")):
        result = run(tmp_path / name, strategy={"name": name}, stop={"steps": 20})
        assert result.status == "done"
        used = json.loads((tmp_path / name / "environment.json").read_text())["transport"]
        assert used.startswith(f"{wire}: /dev/shm has 0 MiB to give, ")
