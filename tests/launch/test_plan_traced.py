"""What is traced without memory, held against real tensors: the same bytes saved, and the peak that torch counts."""

from __future__ import annotations

import contextlib

import pytest
import torch
from own.oracle import job_of, spec_of
from torch import nn
from torch.profiler import ProfilerActivity, profile

from distml.launch.plan.facts import size_of
from distml.tasks import traced
from distml.tasks.build import build_task
from distml.tasks.footprint import footprint
from distml.tasks.language_model import cross_entropy
from distml.tasks.traced import NotTracedError, model_without_memory, plan_facts, rows_of, trace_activations

GPT2 = {"layers": 12, "heads": 12, "width": 768, "vocabulary": 50257}
GPT3 = {"layers": 96, "heads": 96, "width": 12288, "vocabulary": 50257}
BERT_LARGE = {
    "name": "bert",
    "layers": 24,
    "heads": 16,
    "width": 1024,
    "vocabulary": 30000,
    "pooler": True,
    "head": "tied",
}
LLAMA = {"positions": "rotary", "norm": "rms_norm", "activation": "swiglu", "bias": False, "tied": False, "kv_heads": 2}


def text_job(model=None, task="language_model", block=64, tokenizer="bytes", **changes):
    model = {"name": "gpt", "layers": 2, **(model or {})}
    text = {"name": task, "block": block, "model": model, "tokenizer": tokenizer}
    return job_of(spec_of(text, **{"batch_size": 4, "strategy": "single", "optimizer": {"name": "adamw"}, **changes}))


@pytest.mark.parametrize(
    ("job", "count"),
    [
        (text_job(GPT2, block=1024), 124_439_808),
        (text_job(GPT3, block=2048), 174_604_259_328),
        (text_job(BERT_LARGE, "masked_language_model", 512, {"name": "bpe"}), 334_607_360),
    ],
    ids=["gpt2", "gpt3", "bert-large"],
)
def test_parameters_are_counted_exactly(job, count):
    assert size_of(model_without_memory(build_task(job))).trained == count


def test_states_of_gpt3_fill_19_cards():
    trained = size_of(model_without_memory(build_task(text_job(GPT3, block=2048)))).trained
    assert 18 < 16 * trained / (139 * 2**30) <= 19


def really(job, monkeypatch):
    """The same trace with real tensors."""

    class Real:
        from_tensor = staticmethod(lambda tensor: tensor)

    with monkeypatch.context() as patched:
        patched.setattr(traced, "without_memory", lambda: contextlib.nullcontext(Real))
        return traced._layers(job, build_task(job), job.task.model.layers, rows_of(job))


VARIANTS = [
    {}, {"activation_checkpointing": True}, {"dropout": 0.1}, LLAMA, {**LLAMA, "activation_checkpointing": True},
    {"norm_place": "post", "activation": "gelu"},
]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", VARIANTS, ids=lambda model: "-".join(map(str, model.values())) or "plain")
def test_many_layers_are_a_line_through_two_and_three(model, precision, monkeypatch):
    """Saved bytes and both peaks: of five layers from the trace, and with real tensors."""
    job = text_job({**model, "layers": 5}, precision=precision)
    found = trace_activations(job, build_task(job), rows_of(job))
    assert found == really(job, monkeypatch)
    assert found.saved <= found.in_forward


def test_checkpointing_saves_and_a_larger_micro_batch_costs():
    """Controls: the trace does see what changes."""
    small = trace_activations(text_job({"layers": 6}), build_task(text_job({"layers": 6})), 4)
    job = text_job({"layers": 6, "activation_checkpointing": True})
    assert trace_activations(job, build_task(job), 4).saved < 0.4 * small.saved
    assert trace_activations(text_job({"layers": 6}), build_task(text_job({"layers": 6})), 8).saved > 1.9 * small.saved


def peak_of(run) -> float:
    """The most bytes that torch's allocator gave out at one time, beyond those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize("model", VARIANTS[:4], ids=["plain", "checkpointing", "dropout", "llama"])
def test_the_peak_is_that_of_the_allocator(model):
    job = text_job(model, batch_size=8)
    task = build_task(job)
    net = task.build_model().train()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.zeros(8, 64, dtype=torch.int64)
    cross_entropy(net(tokens), tokens).backward()  # once, for what is made only the first time
    planned = trace_activations(job, task, 8).peak
    assert planned == pytest.approx(peak_of(lambda: cross_entropy(net(tokens), tokens).backward()), rel=0.15)


def test_masked_language_models_and_zeros_low_precision():
    model = {"name": "bert", "layers": 4, "width": 64, "heads": 2, "vocabulary": 300}
    job = text_job(model, "masked_language_model", 32, {"name": "bpe", "vocabulary": 300})
    full = trace_activations(job, build_task(job), 4)
    low = job.model_copy(update={"precision": "bf16", "strategy": zero_strategy()})
    assert 0.4 * full.saved < trace_activations(low, build_task(low), 4).saved < 0.75 * full.saved
    on_gpu = low.model_copy(update={"resources": low.resources.model_copy(update={"gpus_per_worker": 1})})
    more = trace_activations(on_gpu, build_task(on_gpu), 4).saved
    assert more > trace_activations(low, build_task(low), 4).saved  # CUDA's autocast widens what norms see


def zero_strategy():
    return job_of(spec_of({"name": "classification", "data": "digits"}, strategy={"name": "zero"})).strategy


def test_datasets_are_traced_on_their_own_first_examples():
    job = job_of(spec_of({"name": "classification", "data": "digits"}, batch_size=12))
    task = build_task(job)
    found = trace_activations(job, task, 12)
    images, labels = (tensor[:12] for tensor in task.data("train"))
    model = task.build_model()
    real = footprint(
        model, [images, labels], lambda: nn.functional.cross_entropy(model(images), labels, reduction="sum")
    )
    assert found == real


def test_what_acts_is_left_out_and_what_needs_values_is_said():
    job = job_of(spec_of({"name": "actor_critic", "environment": "CartPole-v1"}, batch_size=48))
    with pytest.raises(NotTracedError, match="acting"):
        trace_activations(job, build_task(job), 8)
    assert plan_facts(job, build_task(job))["unknown"] is not None

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            assert self.weight.sum().item() == 3.0

    class Task:
        build_model = staticmethod(Reads)

    with pytest.raises(NotTracedError, match="without values"):
        model_without_memory(Task())
