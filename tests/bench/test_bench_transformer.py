"""`distml bench transformer`: the plain peer is the same model, what is measured of runs, targets and tables."""

from __future__ import annotations

import json

import pytest
import torch

from distml.bench import transformer, transformer_gpu, transformer_loss, transformer_memory, transformer_zero
from distml.bench.memory_rank import held, storages
from distml.bench.peers.plain_gpt import PlainGPT, train
from distml.bench.transformer_speed import SPEC
from distml.errors import RunError, UsageError
from distml.loop import Trainer
from distml.spec.language import GPTSpec
from distml.spec.loader import load_train
from distml.tasks.build import build_task
from distml.tasks.gpt import GPT

NAMES = {"norm_1": "attention_norm", "norm_2": "mlp_norm", "qkv": "attention.qkv", "out": "attention.output",
         "up": "mlp.up", "down": "mlp.down"}  # fmt: skip


def ours(name):
    """Our name of the plain model's parameter."""
    parts = name.split(".")
    if parts[0] == "layers":
        parts[2] = NAMES[parts[2]]
    return ".".join(parts)


def test_the_plain_peer_computes_what_our_model_does():
    torch.manual_seed(3)
    plain = PlainGPT(50, 16, 2, 2, 32)
    model = GPT(GPTSpec(name="gpt", layers=2, heads=2, width=32), 50, 16)
    state = {ours(name): value for name, value in plain.state_dict().items() if name != "head.weight"}
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"output.weight"}
    tokens = torch.randint(50, (3, 16))
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-5, atol=1e-6)


def test_the_plain_loop_learns_and_says_so():
    torch.manual_seed(0)
    tokens = torch.arange(64).reshape(4, 16) % 7
    said = []
    model = PlainGPT(7, 15, 1, 1, 16)
    train(model, lambda step: (tokens[:, :-1], tokens[:, 1:]), 60, lambda step: 1e-2,
          lambda step, loss: said.append((step, loss)), every=20, betas=(0.9, 0.99))  # fmt: skip
    assert [step for step, _ in said] == [20, 40, 60]
    assert said[-1][1] < 0.3 < said[0][1]


# ----------------------------------------------------------------------------------------------------------------- zero
def test_numbers_of_a_run_are_medians_of_windows_after_the_warm_up():
    times = [(10, 100.0), (20, 101.0), (30, 101.5), (40, 102.1), (50, 105.1)]
    found = transformer_zero._numbers(times, start_s=4.0, loss=2.5)
    assert found == {"ms_per_step": pytest.approx(60.0), "start_s": 4.0, "last_train_loss": 2.5}
    with pytest.raises(RunError, match="--steps"):
        transformer_zero._numbers(times[:2], 4.0, 2.5)


def test_targets_are_ratios_within_a_repeat():
    ours_, theirs = [{"ms_per_step": 10.0, "start_s": 4.0}] * 2, [{"ms_per_step": 8.0, "start_s": 8.0}] * 2
    found = transformer_zero.targets({"zero_1": ours_, "deepspeed_1": theirs, "zero_2": ours_})
    assert [(one["value"], one["met"]) for one in found] == [(1.25, False), (0.5, True)]


def test_the_peer_is_told_what_our_run_tells_deepspeed(tmp_path):
    spec = {**SPEC, "strategy": {"name": "zero", "stage": 2}, "resources": {"workers": 2}, "stop": {"steps": 100}}
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(spec))
    settings = transformer_zero.settings_of(path)
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["train_micro_batch_size_per_gpu"] == 6
    assert settings["gradient_clipping"] == 1.0


# --------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize(
    ("stage", "ranks", "expected"), [(1, 1, 16), (1, 2, 4 + 6), (2, 2, 2 + 7), (3, 2, 8), (3, 4, 4), (2, 4, 2 + 3.5)]
)
def test_formulas_by_hand(stage, ranks, expected):
    assert transformer_memory.formula(stage, ranks, 1) == expected


def test_the_peak_counts_nothing_twice_that_was_there_before():
    tiny = {**SPEC["task"], "block": 8, "model": {"name": "gpt", "layers": 1, "heads": 1, "width": 256}}
    job = load_train({**SPEC, "task": tiny, "batch_size": 1, "strategy": {"name": "zero", "stage": 1},
                      "stop": {"steps": 200}}).job  # fmt: skip
    trainer = Trainer(job, build_task(job), 0, 1)
    trainer.build()
    trainer.connect(None, None)
    try:
        held(trainer)
        found = held(trainer)
    finally:
        trainer.strategy.close()
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert found["weights"] == pytest.approx(4 * size, rel=0.02)
    assert found["optimizer"] == pytest.approx(12 * size, rel=0.02)
    assert 20 * size <= found["peak"] <= 33 * size  # weights, gradients, optimiser; with a vector or two for the update
    there = torch.zeros(3)
    assert there.untyped_storage()._cdata in storages()


# ------------------------------------------------------------------------------------------------------------------ gpu
def test_mfu_by_hand():
    shape = transformer_gpu.SHAPES["plain"]
    with torch.device("meta"):
        whole = sum(parameter.numel() for parameter in PlainGPT(50304, 1024, 12, 12, 768).parameters())
    assert shape.parameters == whole - 1024 * 768  # positions are looked up
    assert shape.flops_per_token == 6 * shape.parameters + 12 * 12 * 1024 * 768
    found = transformer_gpu.numbers(shape, [0.1, 0.2, 0.3], 989e12)
    assert found["tokens_per_s"] == 12 * 1024 / 0.2
    assert found["mfu"] == pytest.approx(12 * 1024 / 0.2 * shape.flops_per_token / 989e12)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="needs a GPU"):
        transformer_gpu.measure()


@pytest.mark.parametrize("name", ["gpt2_124m", "gpt2_1.5b"])
def test_the_specs_for_gpus_are_valid(name):
    job = load_train(transformer_gpu.spec_of(transformer_gpu.SHAPES[name], 100)).job
    assert job.resources.gpus_per_worker == 1


# ------------------------------------------------------------------------------------------------------------ the whole
def test_wrong_parts_and_missing_texts_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--part tempo is not known"):
        transformer.measure(part=["tempo"])
    with pytest.raises(UsageError, match="--text FILE"):
        transformer.measure(part=["loss"])
    with pytest.raises(UsageError, match="no such file"):
        transformer.measure(part=["loss"], text=tmp_path / "nothing.txt")
    with pytest.raises(UsageError, match="--contenders"):
        transformer_loss.measure(tmp_path, contenders=["nobody"])


def test_tables_say_whether_targets_are_met():
    one = {"weights": 2e6, "gradients": 2e6, "optimizer": 12e6, "held": 16e6, "formula": 16e6, "plan": 16.2e6,
           "peak": 20e6, "plan_peak": 30e6, "parameters": 1_000_000}  # fmt: skip
    found = {"contenders": {"alone": one}, "targets": transformer_memory.targets({"alone": one})}
    conditions = {"cpus": 2, "load_before": 0.1, "torch": "2", "ray": "2"}
    report = {
        "bench": "transformer",
        "parts": {"memory": found},
        "conditions": conditions,
        "errors": {"zero": "it broke"},
    }
    [(title, header, body, lines)] = transformer.tables(report)
    assert "1,000,000 parameters" in title
    assert len(header) == len(body[0]) == 9
    assert [line.endswith("met)") for line in lines[:3]] == [True, True, False]
    assert transformer.failure(report) == "zero: it broke"
