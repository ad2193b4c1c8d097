"""What a spec with `strategy: zero` may say: settings of DeepSpeed at every depth, three batch sizes, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distml.errors import UsageError
from distml.spec.deepspeed import notes
from distml.spec.loader import load_spec
from distml.spec.schema import JobSpec

SPEC = """\
distml: v1
name: z
task: regression
optimizer: {name: sgd, lr: 0.1}
stop: {steps: 4}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> JobSpec:
    path = tmp_path / "z.yaml"
    path.write_text(SPEC + text)
    return load_spec(path, overrides).job


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).removeprefix(f"{tmp_path}/")


def zero(**settings: Any) -> str:
    return yaml.safe_dump({"strategy": {"name": "zero", "stage": 2, **settings}})


DEEP = "strategy:\n  name: zero\n  stage: 3\n  offload: [optimizer]\n  deepspeed:\n"


@pytest.mark.parametrize(("text", "place", "hint"), [
    (f"{DEEP}    zero_optimisation: {{}}\n", "z.yaml:11:5", "did you mean 'zero_optimization'?"),
    (f"{DEEP}    zero_optimization:\n      reduce_bukcet_size: 4\n", "z.yaml:12:7", "mean 'reduce_bucket_size'"),
    (f"{DEEP}    zero_optimization:\n      offload_optimizer: {{pin_memry: true}}\n", "z.yaml:12:27", "'pin_memory'?"),
    (f"{DEEP}    gradient_clipp1ng: 1.0\n", "z.yaml:11:5", "unknown key"),
    (f"{DEEP}    fp16: {{hysteressis: 2}}\n", "z.yaml:11:12", "did you mean 'hysteresis'?"),
])  # fmt: skip
def test_a_typo_is_found_at_any_depth(tmp_path, text, place, hint):
    message = refused(tmp_path, text)
    assert message.startswith(f"{place}: unknown key ")
    assert hint in message


@pytest.mark.parametrize(("deepspeed", "reason"), [
    ({"optimizer": {}}, "set the key 'optimizer'"),
    ({"gradient_clipping": 1.0}, "set optimizer.clip_norm"),
    ({"zero_optimization": {"stage": 3}}, "set strategy.stage"),
    ({"bf16": {"enabled": True}}, "set the key 'precision'"),
    ({"pipeline": {}}, "another way to train"),
    ({"elasticity": {}}, "any number of workers"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "compiles at the start"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "set strategy.offload: [optimizer]"),
    ({"zero_optimization": {"stage3_module_granularity_threshold": 10000}}, "name modules in leaf_module"),
])  # fmt: skip
def test_what_is_said_elsewhere_or_not_run_is_refused_with_the_place_or_reason(tmp_path, deepspeed, reason):
    message = refused(tmp_path, zero(deepspeed=deepspeed))
    assert "cannot be set" in message
    assert reason in message


@pytest.mark.parametrize(("block", "wrong"), [
    ({"reduce_bucket_size": "big"}, "must be an integer, got the string 'big'"),
    ({"reduce_bucket_size": True}, "must be an integer, got true"),
    ({"reduce_bucket_size": 0}, "must be greater than 0, got 0"),
    ({"reduce_bucket_size": 1.5}, "must be an integer, got 1.5"),
    ({"allgather_bucket_size": 7.0}, "DeepSpeed asks for an even number; set 8"),
    ({"overlap_comm": 1}, "must be true or false, got 1"),
    ({"allgather_bucket_size": 7}, "DeepSpeed asks for an even number; set 8"),
    ({"sub_group_size": 4}, "is for stage 3, the stage is 2"),
    ({"offload_optimizer": {"device": "disk"}}, "must be one of none, cpu, nvme"),
    ({"offload_optimizer": {"device": "nvme"}}, "needs nvme_path"),
    ({"offload_optimizer": {"pin_memory": True}}, "set strategy.offload: [optimizer], or device: nvme"),
    ({"offload_param": {"device": "nvme", "nvme_path": "/n"}}, "needs stage 3"),
])  # fmt: skip
def test_values_are_checked(tmp_path, block, wrong):
    assert wrong in refused(tmp_path, zero(deepspeed={"zero_optimization": block}))


def test_whole_numbers_may_be_written_as_deepspeeds_documentation_writes_them(tmp_path):
    deepspeed = "{zero_optimization: {reduce_bucket_size: 5e8}, train_batch_size: 3.2e1}"
    job = load(tmp_path, f"strategy: {{name: zero, deepspeed: {deepspeed}}}\n")
    size = job.strategy.deepspeed["zero_optimization"]["reduce_bucket_size"]
    assert (size, type(size), job.batch_size) == (500_000_000, int, 32)


@pytest.mark.parametrize(("deepspeed", "wrong"), [
    ({"fp16": {"loss_scale_window": 100}}, "strategy.deepspeed.fp16 is for precision fp16, the precision is fp32"),
    ({"bf16": {"check_grad_overflow": True}}, "strategy.deepspeed.bf16 is for precision bf16, the precision is fp32"),
    ({"aio": {"queue_depth": 8}}, "aio is for what is offloaded to a drive"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "gradients in bf16 are for precision bf16, the precision is fp32"),
])  # fmt: skip
def test_what_would_have_no_effect_is_refused(tmp_path, deepspeed, wrong):
    assert wrong in refused(tmp_path, zero(deepspeed=deepspeed))


def test_what_has_an_effect_is_taken(tmp_path):
    bf16 = {"bf16": {"check_grad_overflow": True}, "data_types": {"grad_accum_dtype": "bf16"}}
    assert load(tmp_path, zero(deepspeed=bf16), "precision=bf16").strategy.deepspeed == bf16
    drive = {"device": "nvme", "nvme_path": "/n"}
    nvme = {"aio": {"queue_depth": 8}, "zero_optimization": {"offload_optimizer": drive}}
    assert load(tmp_path, zero(deepspeed=nvme)).strategy.deepspeed == nvme


def test_nvme_is_passed_on_and_said_to_be_unverified(tmp_path):
    block = {"offload_optimizer": {"device": "nvme", "nvme_path": "/n"}, "round_robin_gradients": True}
    job = load(tmp_path, zero(deepspeed={"zero_optimization": block}))
    assert job.strategy.deepspeed == {"zero_optimization": block}
    assert notes(job) == ["offload_optimizer to NVMe is passed to DeepSpeed as it is, and unverified here"]
    assert notes(load(tmp_path, zero())) == []


def test_parameters_are_offloaded_under_stage_3_only(tmp_path):
    assert "offloading parameters needs stage 3" in refused(tmp_path, zero(offload=["parameters"]))
    assert load(tmp_path, zero(offload=["parameters"], stage=3)).strategy.offload == ["parameters"]


def test_nothing_is_offloaded_twice(tmp_path):
    message = refused(tmp_path, zero(offload=["optimizer", "optimizer"]))
    assert message == "z.yaml:8:3: strategy.offload has optimizer twice; keep one"
    assert load(tmp_path, zero(offload=["optimizer", "parameters"], stage=3)).strategy.offload  # the control


def test_gradients_in_fp32_are_for_stages_that_keep_them(tmp_path):
    types = {"deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}}
    assert "set strategy.stage: 2" in refused(tmp_path, zero(stage=1, **types), "precision=bf16")
    assert load(tmp_path, zero(**types), "precision=bf16").precision == "bf16"
    assert load(tmp_path, zero(stage=1, **types)).precision == "fp32"


# ------------------------------------------------------------------------------------------------------------ precision
def test_fp16_is_for_zero_and_for_gpus(tmp_path):
    assert "loss scaling, which strategy all_reduce" in refused(tmp_path, "precision: fp16\n")
    assert "gpus_per_worker is 0" in refused(tmp_path, zero(), "precision=fp16")
    assert load(tmp_path, zero(), "precision=fp16", "resources.gpus_per_worker=1").precision == "fp16"


# ---------------------------------------------------------------------------------------------------------- batch sizes
STEPS = "gradient_accumulation_steps"
MICRO = "train_micro_batch_size_per_gpu"


def sizes(job: JobSpec) -> tuple[int, int | None]:
    assert job.strategy.deepspeed == {}  # what was there is in the spec's own keys
    return job.batch_size, job.micro_batch_size


@pytest.mark.parametrize(("more", "deepspeed", "expected"), [
    ({}, {}, (64, None)),
    ({"batch_size": 96}, {STEPS: 4}, (96, 12)),
    ({"batch_size": 96, "micro_batch_size": 8}, {}, (96, 8)),
    ({"micro_batch_size": 8}, {STEPS: 4}, (64, 8)),
    ({}, {MICRO: 3, STEPS: 4}, (24, 3)),
    ({}, {"train_batch_size": 40}, (40, None)),
    ({}, {"train_batch_size": 40, MICRO: 5}, (40, 5)),
    ({"batch_size": 40}, {"train_batch_size": 40, MICRO: 5, STEPS: 4}, (40, 5)),
    ({"batch_size": 30}, {STEPS: 4}, (30, 4)),
])  # fmt: skip
def test_of_three_batch_sizes_two_are_enough(tmp_path, more, deepspeed, expected):
    text = yaml.safe_dump({"resources": {"workers": 2}, **more}) + zero(deepspeed=deepspeed)
    job = load(tmp_path, text)
    assert sizes(job) == expected
    path = tmp_path / "again.yaml"
    path.write_text(load_spec(tmp_path / "z.yaml").dump())
    assert sizes(load_spec(path).job) == expected


@pytest.mark.parametrize(("deepspeed", "wrong"), [
    ({STEPS: "auto"}, "gradient_accumulation_steps must be an integer, got the string 'auto'"),
    ({"train_batch_size": "auto"}, "train_batch_size must be an integer, got the string 'auto'"),
    ({"train_batch_size": -10}, "train_batch_size must be greater than 0, got -10"),
    ({MICRO: True}, "train_micro_batch_size_per_gpu must be an integer, got true"),
])  # fmt: skip
def test_a_batch_size_that_is_no_number_is_not_passed_over(tmp_path, deepspeed, wrong):
    assert wrong in refused(tmp_path, zero(deepspeed=deepspeed))


def test_a_conflict_names_all_three_and_where_each_came_from(tmp_path):
    text = "batch_size: 256\nmicro_batch_size: 4\nstrategy: {name: zero, deepspeed: {gradient_accumulation_steps: 8}}\n"
    message = refused(tmp_path, text)
    assert message.startswith("z.yaml:6:1: batch_size 256 (line 6) is not micro_batch_size 4 (line 7) x "
                              "gradient_accumulation_steps 8 (line 8) x 1 worker = 32; ")  # fmt: skip
    overridden = refused(tmp_path, text, "batch_size=24", "resources.workers=2")
    assert "batch_size 24 (--set batch_size=24) is not micro_batch_size 4 (line 7)" in overridden
    assert "x 2 workers = 64" in overridden


def test_two_names_of_one_number_must_agree(tmp_path):
    message = refused(tmp_path, "batch_size: 60\n" + zero(deepspeed={"train_batch_size": 8}))
    assert "batch_size 60 (line 6) and train_batch_size 8 (line 9) are two names of the same number" in message


def test_every_worker_makes_as_many_micro_batches(tmp_path):
    message = refused(tmp_path, "batch_size: 13\nmicro_batch_size: 3\nresources: {workers: 2}\n" + zero())
    assert "strategy zero adds up gradients in every micro-batch" in message
    assert "3 micro-batches on some and 2 on others" in message
    assert "so many pieces of equal size" in refused(tmp_path, "batch_size: 10\n" + zero(deepspeed={STEPS: 7}))
