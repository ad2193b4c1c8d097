"""ZeRO between real processes comes to what all_reduce comes to, at every stage, and its state to the same elements."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from own.oracle import Trained, job_of, spec_of, train
from own.ranks import CPU, on_ranks, trainer_of

from distml.errors import UsageError
from distml.events import Report
from distml.exchange.channel import PeerLost
from distml.exchange.deepspeed import SumScaler, library
from distml.exchange.layout import Layout
from distml.loop import Trainer, check_parts
from distml.strategies.build import import_libraries

STAGES = (1, 2, 3)
FLOAT32 = {"dtype": "float32"}
SMALL = {"name": "small:Small", "args": FLOAT32}
ADAMW = {"name": "adamw", "lr": 0.02, "weight_decay": 0.1, "schedule": {"name": "cosine", "warmup": 5, "steps": 60}}
NESTEROV = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
GROUPS = [{"match": "*.bias", "weight_decay": 0.0, "lr": 0.05}]
UNEVEN = {"task": {"name": "uneven:Uneven", "args": FLOAT32}, "optimizer": {"name": "sgd", "lr": 0.05}}
GPT = {"name": "language_model", "data": {"path": "rhymes.txt", "validation": 0.2, "test": 0.2}, "block": 8,
       "model": {"name": "gpt", "layers": 2, "heads": 2, "width": 8}}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": ADAMW, "steps": 50},
    "adam, clipped": {"optimizer": {"name": "adam", "lr": 0.02, "clip_norm": 0.05}},
    "nesterov, groups": {"optimizer": {**NESTEROV, "groups": GROUPS}},
    "rmsprop, accumulated": {"optimizer": {"name": "rmsprop", "lr": 0.005, "momentum": 0.5}, "micro_batch_size": 2},
    "uneven": {**UNEVEN, "micro_batch_size": 3},
    "partly idle": {"task": {"name": "branching:Branching", "args": {"uses": "first"}}, "optimizer": ADAMW},
    "tied": {"task": GPT, "optimizer": {"name": "adamw", "lr": 0.02}, "batch_size": 4},
}
PLACES = [(case, stage) for case in CASES for stage in STAGES]
TURNS = [(case, stage) for case, stage in PLACES if case in ("adamw", "uneven", "tied")]  # those that all stages run
TURNS += [("adam, clipped", 1), ("adam, clipped", 3), ("nesterov, groups", 2), ("nesterov, groups", 3),
          ("partly idle", 1), ("partly idle", 3), ("rmsprop, accumulated", 2), ("rmsprop, accumulated", 3)]  # fmt: skip


def spec(case: str, strategy: Any) -> dict[str, Any]:
    """One more step than is taken: the last one's duties are others' tests."""
    settings = {"task": SMALL, "steps": 10} | CASES[case]
    return spec_of(**settings | {"steps": settings["steps"] + 1, "strategy": strategy, "workers": 2,
                                 "evaluate": {"every": 100}, "log": {"every": 1, "to": []}})  # fmt: skip


def steps(case: str) -> int:
    return spec(case, "all_reduce")["stop"]["steps"] - 1


def advance(trainer: Trainer, until: int) -> list[tuple[float, float]]:
    """This rank's sums and counts of the loss, step by step."""
    return [event.means["loss"] for event in trainer.advance(until) if isinstance(event, Report)]


def pieces(trainer: Trainer) -> list[tuple[str, str, int, np.ndarray]]:
    return [(kind, name, start, tensor.clone().numpy()) for kind, name, start, tensor in trainer.strategy.pieces()]


# ------------------------------------------------------------------------------------------------------ in each process
def trained(rank: int, join: Any) -> dict[Any, Any]:
    """What every case comes to on this rank; last, one whose division is by the nominal count, as raw DeepSpeed's."""
    found: dict[Any, Any] = {}
    for case, stage in [*TURNS, ("uneven", "off")]:
        zero = {"name": "zero", "stage": 2 if stage == "off" else stage}
        trainer = trainer_of(spec(case, zero), rank, 2)
        trainer.connect(join(), None)
        if stage == "off":
            trainer.strategy.engine.scaler.expect = lambda count: None
        found[case, stage] = {
            "losses": advance(trainer, steps(case)), "pieces": pieces(trainer),
            "clock": trainer.strategy.clock_state(), "norm": trainer.strategy.engine.grad_norm(),
            "metrics": trainer.evaluate("validation"), "layout": trainer.strategy.layout,
        }  # fmt: skip
        trainer.strategy.close()
    return found | {"said": uneven_use(rank, join), "said of evaluations": uneven_evaluations(rank, join)}


@pytest.fixture(scope="module")
def zero() -> list[dict[Any, Any]]:
    return on_ranks(2, trained)


def replica_of(case: str) -> Trained:
    return train(spec(case, "all_reduce") | {"stop": {"steps": steps(case)}})


@pytest.fixture(scope="module")
def replicas() -> dict[str, Trained]:
    return {case: replica_of(case) for case in CASES}


def mean_losses(zero: list[dict[Any, Any]], case: str, stage: Any) -> np.ndarray:
    sums = np.array([one[case, stage]["losses"] for one in zero]).sum(0)
    return sums[:, 0] / sums[:, 1]


def replicas_losses(trained: Trained) -> np.ndarray:
    sums = np.array([[r.means["loss"] for r in trained.reports if r.rank == rank] for rank in range(2)]).sum(0)
    return sums[:, 0] / sums[:, 1]


# ---------------------------------------------------------------------------------------------------------- equivalence
@pytest.mark.parametrize(("case", "stage"), TURNS)
def test_losses_are_those_of_all_reduce(zero, replicas, case, stage):
    expected, found = replicas_losses(replicas[case]), mean_losses(zero, case, stage)
    assert len(found) == steps(case)
    assert np.abs(found - expected).max() <= 1e-5
    last = replicas[case].reports[-1].values
    assert zero[0][case, stage]["norm"] == pytest.approx(last["grad_norm"], rel=1e-3)
    evaluated = replicas[case].evaluated[-1].metrics["eval/loss"]
    assert zero[1][case, stage]["metrics"]["eval/loss"] == pytest.approx(evaluated, abs=1e-5)


def test_a_mean_of_unequal_means_would_be_another(zero, replicas):
    expected = replicas_losses(replicas["uneven"])
    assert np.abs(mean_losses(zero, "uneven", "off") - expected).max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------- state
def joined(ranks: list[list[tuple[str, str, int, np.ndarray]]], layout: Layout) -> dict[str, np.ndarray]:
    """Kind -> flat vector of all ranks' pieces; each element is there once."""
    offsets = {entry.name: entry.offset for entry in layout.entries}
    kinds = {kind for rank in ranks for kind, *_ in rank}
    whole = {kind: np.full(layout.numel, np.nan, np.float32) for kind in kinds}
    for rank in ranks:
        for kind, name, start, values in rank:
            place = whole[kind][offsets[name] + start :][: len(values)]
            assert np.isnan(place).all()
            place[:] = values
    assert not any(np.isnan(vector).any() for vector in whole.values())
    return whole


@pytest.mark.parametrize(("case", "stage"), TURNS)
def test_the_ranks_pieces_are_the_replicas_state_each_element_once(zero, replicas, case, stage):
    strategy = replicas[case].strategies[0]
    whole = joined([one[case, stage]["pieces"] for one in zero], zero[0][case, stage]["layout"])
    assert whole.keys() == {"model", *strategy.optimizer.moments}
    for name, vector in {"model": strategy.flat.weights, **strategy.optimizer.moments}.items():
        apart = np.abs(whole[name] - vector.numpy())
        assert apart.mean() <= 1e-6  # Adam's step is as large where a gradient is nothing but rounding
        assert apart.max() <= 1e-2
    assert zero[0][case, stage]["clock"] == zero[1][case, stage]["clock"]
    assert zero[0][case, stage]["clock"]["updates"] == steps(case) == strategy.optimizer.updates


def test_both_ranks_hold_about_half(zero):
    for case, stage in TURNS:
        held = [
            sum(len(values) for kind, _, _, values in one[case, stage]["pieces"] if kind == "model") for one in zero
        ]
        assert abs(held[0] - held[1]) <= 16 + (len(zero[0][case, stage]["layout"].entries) if stage == 3 else 0)


class Reader:
    """Elements of a state, as a checkpoint's reader gives them."""

    def __init__(self, whole: dict[str, np.ndarray], layout: Layout) -> None:
        self.whole, self.offsets = whole, {entry.name: entry.offset for entry in layout.entries}

    def __call__(self, kind: str, name: str, start: int, stop: int) -> np.ndarray | None:
        offset = self.offsets[name]
        return self.whole[kind][offset + start : offset + stop].copy() if kind in self.whole else None


def resumed(rank: int, join: Any, size: int, states: list[tuple[int, Any, Any, Any]]) -> list[Any]:
    """From each state, under another stage: what is taken back at once, and the losses of the next steps."""
    found = []
    for stage, whole, layout, clock in states:
        trainer = trainer_of(spec("adamw", {"name": "zero", "stage": stage}), rank, size)
        trainer.connect(join() if size > 1 else None, None)
        trainer.strategy.load_pieces(Reader(whole, layout), clock)
        trainer.stream.load_state({"round": clock["version"]})
        before = pieces(trainer)
        found.append((before, advance(trainer, clock["version"] + 5), trainer.strategy.updates))
        trainer.strategy.close()
    return found


@pytest.fixture(scope="module")
def half_way() -> Trained:
    return train(spec("adamw", "all_reduce") | {"stop": {"steps": 20}})


@pytest.fixture(scope="module")
def state(half_way: Trained) -> tuple[dict[str, np.ndarray], Layout, dict[str, Any]]:
    """All_reduce's, after 20 steps."""
    strategy = half_way.strategies[0]
    moments = {name: vector.numpy().copy() for name, vector in strategy.optimizer.moments.items()}
    clock = {**strategy.clock_state(), "updates": strategy.optimizer.updates}
    return {"model": strategy.flat.weights.numpy().copy(), **moments}, strategy.layout, clock


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_any_stage_goes_on_from_a_state_at_any_size(replicas, state, size):
    whole, layout, clock = state
    stages = STAGES if size == 1 else (1, 3)
    states = [(stage, whole, layout, clock) for stage in stages]
    answers = on_ranks(size, resumed, size, states) if size > 1 else [resumed(0, None, 1, states)]
    expected = replicas_losses(replicas["adamw"])[20:25]
    for index in range(len(stages)):
        taken = joined([one[index][0] for one in answers], layout)
        assert all(np.array_equal(taken[kind], whole[kind]) for kind in whole)
        sums = np.array([one[index][1] for one in answers]).sum(0)
        assert np.abs(sums[:, 0] / sums[:, 1] - expected).max() <= 1e-5
        assert {one[index][2] for one in answers} == {25}


def test_without_its_moments_a_state_goes_on_otherwise(replicas, state):
    whole, layout, clock = state
    answers = resumed(0, None, 1, [(2, {"model": whole["model"]}, layout, clock)])
    sums = np.array(answers[0][1])
    assert np.abs(sums[:, 0] / sums[:, 1] - replicas_losses(replicas["adamw"])[20:25]).max() > 1e-4


# ----------------------------------------------------------------------------------------------------------- failures
def uneven_use(rank: int, join: Any) -> list[str]:
    """What is said where the parameters that the loss depends on are not always the same."""
    said = []
    for uses in ("by step", "by batch"):
        trainer = trainer_of(spec_of({"name": "branching:Branching", "args": {"uses": uses}}, steps=9, batch_size=2,
                                     strategy={"name": "zero", "stage": 1}, workers=2), rank, 2)  # fmt: skip
        trainer.connect(join(), None)
        try:
            list(trainer.advance(8))
        except ValueError as error:
            said.append(f"step {trainer.strategy.progress.version}: {error}")
        trainer.strategy.close()
    return said


def test_losses_that_do_not_always_depend_on_the_same_parameters_are_refused(zero):
    by_step, by_batch = zero[0]["said"]
    assert by_step.startswith("step 1: the loss of this step depends on 1.weight, that of the first does not; ")
    assert "depends on 1.weight, that of " in by_batch
    assert by_batch.endswith("on all ranks and in all steps; use all_reduce")


def uneven_evaluations(rank: int, join: Any) -> list[str]:
    """What each rank says of evaluations that use the model differently on the other."""
    said = []
    for walks in ("row by row", "by module"):
        trainer = trainer_of(spec_of({"name": "walking:Walking", "args": {"walks": walks}}, steps=9, workers=2,
                                     strategy={"name": "zero", "stage": 3}), rank, 2)  # fmt: skip
        trainer.connect(join(), None)
        advance(trainer, 1)
        with pytest.raises(ValueError, match="zero/3") as caught:
            trainer.evaluate("validation")
        said.append(str(caught.value))
        trainer.strategy.close()
    return said


def test_evaluations_that_use_the_model_differently_are_refused_on_all_ranks(zero):
    by_row, by_module = zero[0]["said of evaluations"]
    assert by_row.startswith("rank 1 makes 2 forwards or more in evaluate, rank 0 1; under zero/3 each is a collective")
    assert "part.batches()" in by_row
    assert by_module.startswith("forward 1 in evaluate is of model on rank 0, of model.0 on rank 1; ")
    assert zero[1]["said of evaluations"] == zero[0]["said of evaluations"]


def bereaved(rank: int, join: Any, stage: int) -> str:
    """Rank 1 dies after two steps; what rank 0 says."""
    trainer = trainer_of(spec("adamw", {"name": "zero", "stage": stage}), rank, 2)
    trainer.connect(join(), None)
    advance(trainer, 2)
    if rank == 1:
        os._exit(1)
    try:
        list(trainer.advance(4))
    except PeerLost as lost:
        return f"{trainer.activity}: {lost}"
    return "nothing"


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)])
def test_a_peer_that_is_gone_is_told_from_an_error(stage):
    said = on_ranks(2, bereaved, stage, survivors=1)[0]
    assert said.split(":")[0] in ("loss", "backward", "exchange")
    assert "rank 0, " in said
    assert "of 2 ranks" in said


def test_forwards_that_are_collectives_are_made_by_all():
    check_parts("validation", 2, 2)
    with pytest.raises(ValueError, match="validation split has 1 examples for 2 workers, who evaluate together"):
        check_parts("validation", 1, 2)
    computes_together = [trainer.strategy.computes_together for trainer in each_stage(task=SMALL)]
    assert computes_together == [False, False, True]


def test_a_model_of_other_floats_is_refused():
    with pytest.raises(UsageError, match=r"updates float32 weights, those of Small are torch.float64"):
        trainer_of(spec_of("small:Small", strategy="zero"), 0, 1)


def each_stage(**settings: Any) -> Iterator[Trainer]:
    """A connected trainer of one worker at each stage; closed afterwards."""
    for stage in STAGES:
        trainer = trainer_of(spec_of(**{"strategy": {"name": "zero", "stage": stage}} | settings), 0, 1)
        trainer.connect(None, None)
        try:
            yield trainer
        finally:
            trainer.strategy.close()


def test_no_rank_waits_for_the_tail_before_its_last_backward(monkeypatch):
    """Its sum is under way while that computes, and ours is one collective a step, however many micro-batches."""
    for trainer in each_stage(task=SMALL, micro_batch_size=4):
        done, group, engine = list[str](), trainer.strategy.group, trainer.strategy.engine.engine
        for owner, name in ((group, "start_all_reduce"), (group, "all_reduce"), (engine, "backward"), (engine, "step")):

            def noted(*arguments: Any, name=name, run=getattr(owner, name), done=done, **settings: Any) -> Any:
                done.append(name)
                return run(*arguments, **settings)

            monkeypatch.setattr(owner, name, noted)
        assert sum(1 for _ in trainer.advance(2)) > 0
        assert done == ["backward", "backward", "start_all_reduce", "backward", "step"] * 2


def test_a_loss_that_fails_is_the_users(monkeypatch):
    for trainer in each_stage(task=SMALL):
        monkeypatch.setattr(trainer.task, "loss", lambda *_: (_ for _ in ()).throw(RuntimeError("mine")))
        with pytest.raises(RuntimeError, match=r"^mine$"):
            list(trainer.advance(1))


def test_gradients_that_are_not_finite_end_the_run(monkeypatch):
    for trainer in each_stage(task=SMALL):
        backward = trainer.strategy.engine.backward
        monkeypatch.setattr(trainer.strategy.engine, "backward", lambda total, run=backward: run(total * float("inf")))
        with pytest.raises(FloatingPointError, match="not finite at step 0"):
            list(trainer.advance(1))


# ---------------------------------------------------------------------------------------------------------- the library
def test_no_compiler_is_tried_at_the_start(monkeypatch):
    import deepspeed
    from deepspeed.ops.op_builder.builder import OpBuilder

    tried: list[Any] = []
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    monkeypatch.setattr(OpBuilder, "has_function", lambda *arguments: tried.append(arguments))
    assert library(CPU).ops.__compatible_ops__.get("deepspeed_shm_comm", False) is False
    assert tried == []


def test_nothing_of_it_is_compiled_by_torch_at_the_start(monkeypatch):
    muon = "deepspeed.runtime.zero.muon"
    compiled: list[Any] = []
    library(CPU)
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero.utils import is_zero_supported_optimizer

    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 1)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    for is_ours in (True, False):
        for name in [name for name in sys.modules if name.startswith(muon)]:
            monkeypatch.delitem(sys.modules, name)
        if is_ours:
            library(CPU)
            assert compiler.compile() is torch.compile, "put back"
        assert is_zero_supported_optimizer(optimizer)
        assert bool(compiled) != is_ours, "the control: DeepSpeed by itself does"


def test_a_worker_imports_it_beforehand_if_it_will_need_it(monkeypatch):
    imported: list[Any] = []
    monkeypatch.setattr("distml.exchange.deepspeed.library", imported.append)
    import_libraries(job_of(spec_of(workers=2, strategy="all_reduce")), CPU)
    assert imported == []
    import_libraries(job_of(spec_of(workers=2, strategy="zero")), CPU)
    assert imported == [CPU]


def test_its_hooks_of_a_first_layer_are_not_warned_of(recwarn):
    def backward() -> None:
        layer = torch.nn.Linear(2, 2)
        layer.register_full_backward_hook(lambda *_: None)
        layer(torch.ones(1, 2)).sum().backward()

    backward()
    assert [str(one.message)[:28] for one in recwarn] == ["Full backward hook is firing"], "the control"
    recwarn.clear()
    library(CPU)
    backward()
    assert not recwarn


def test_the_scaler_divides_by_what_the_gradients_are_a_sum_over():
    class Inner:
        dynamic, cur_scale = True, 8.0

        def update_scale(self, overflow: bool) -> None:
            self.cur_scale *= 0.5 if overflow else 2.0

    scaler = SumScaler(Inner(), world_size=2, nominal=10.0)
    assert scaler.scale_loss(np.float64(5.0)) == 5.0 * 8.0 * 2 / 10.0
    scaler.expect(4.0)
    assert scaler.cur_scale == 8.0 * 4.0 / 10.0
    scaler.update_scale(False)
    assert scaler.cur_scale == 8.0 * 4.0 / 10.0  # of this step, whatever the next one's will be
    assert scaler.loss_scale == 16.0
    scaler.expect(0.0)
    assert scaler.cur_scale == 16.0
