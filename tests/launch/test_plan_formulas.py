"""Memory, bytes and operations by hand, and held against what distml's own strategies lay out and send.

Shapes: Ψ parameters, N ranks.
"""

from __future__ import annotations

import pytest
import torch
from own.oracle import job_of, spec_of, train
from torch import nn

from distml.exchange.flat import Carried, FlatModel
from distml.launch.plan.budget import Budget
from distml.launch.plan.cluster import LinkSpec
from distml.launch.plan.estimate import DEEPSPEED_S, step_of
from distml.launch.plan.flops import flops_per_token, model_flops_utilisation, product_parameters
from distml.launch.plan.machine import Machine
from distml.launch.plan.places import Places, nodes_of, places_of
from distml.launch.plan.states import Size, model_states, states_of
from distml.launch.plan.wire import LOOPBACK, Links, bytes_per_step, collectives_per_step, wire_seconds
from distml.strategies.in_place import sync_regions
from distml.strategies.moments import moment_names
from distml.strategies.shared_servers import async_regions

GB = 1e9
DIGITS = {"name": "classification", "data": "digits"}


# --------------------------------------------------------------------------------------------------------------- states
@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_the_papers_figure_1(stage, gigabytes):
    """Ψ = 7.5 B, N = 64, Adam in mixed precision (Rajbhandari et al. 2020)."""
    assert sum(model_states(7_500_000_000, stage, 64)) / GB == pytest.approx(gigabytes, rel=0.005)


def zero_job(stage, precision="bf16", optimizer="adamw", offload=(), gpus=1):
    strategy = {"name": "zero", "stage": stage, "offload": list(offload)}
    spec = spec_of(DIGITS, strategy=strategy, precision=precision, optimizer={"name": optimizer}, batch_size=64)
    return job_of(spec | {"resources": {"workers": 4, "gpus_per_worker": gpus}})


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer", "per_parameter"),
    [
        (1, "bf16", "adamw", (2, 2, 12 / 4)),
        (2, "bf16", "adamw", (2, 2 / 4, 12 / 4)),
        (3, "bf16", "adamw", (2 / 4, 2 / 4, 12 / 4)),
        (3, "fp16", "adamw", (2 / 4, 2 / 4, 12 / 4)),
        (2, "bf16", "sgd", (2, 2 / 4, 4 / 4)),
        (2, "bf16", "rmsprop", (2, 2 / 4, 8 / 4)),
        (2, "fp32", "adamw", (4, 4 / 4, 12 / 4)),  # stages 1 and 2 keep a clone of the weights
        (3, "fp32", "adamw", (4 / 4, 4 / 4, 8 / 4)),
    ],
)
def test_zero_by_stage_precision_and_optimizer(stage, precision, optimizer, per_parameter):
    size = Size({"w": (1000, 1000)})
    places = Places(4, 1, 4, True, "process_group")
    states = states_of(zero_job(stage, precision, optimizer), size, places)
    assert (states.weights, states.gradients, states.optimizer) == tuple(1e6 * number for number in per_parameter)


def test_offload_moves_the_optimiser_to_the_host_and_on_cpus_moves_nothing():
    size, places = Size({"w": (1000, 1000)}), Places(4, 1, 4, True, "process_group")
    states = states_of(zero_job(3, offload=["optimizer", "parameters"]), size, places)
    assert (states.weights, states.gradients, states.optimizer) == (0, 0, 0)
    assert sum(states.host.values()) == 1e6 / 4 * (12 + 4 + 2 + 2)  # optimiser, float32 and bf16 gradients, weights
    on_cpus = states_of(
        zero_job(3, "bf16", offload=["optimizer"], gpus=0), size, Places(4, 1, 4, False, "process_group")
    )
    assert not on_cpus.host
    assert sum(value for name, value in on_cpus.buffers.items() if "offloaded" in name) == 1e6 / 4 * (12 + 4 + 2)


def flat_model(width=700):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    return FlatModel(model, ["*"]), Size({name: tuple(p.shape) for name, p in model.named_parameters()})


@pytest.mark.parametrize("optimizer", [{"name": "adamw"}, {"name": "sgd", "momentum": 0.9}, {"name": "sgd"}])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("workers", [2, 3])
def test_shared_memory_is_what_the_segments_hold(optimizer, asynchronous, workers):
    strategy = {"name": "parameter_server", "mode": "async"} if asynchronous else "all_reduce"
    job = job_of(spec_of(DIGITS, strategy=strategy, optimizer=optimizer, workers=workers))
    flat, size = flat_model()
    moments = list(moment_names(job.optimizer))
    if asynchronous:
        regions = async_regions(flat, Carried(flat.model), moments, workers, True)
    else:
        regions = sync_regions(flat, moments, workers, True)
    vectors = [
        name for name in regions.places if name.startswith(("weights", "gradients", "moment-", "kept-0", "kept-1"))
    ]
    states = states_of(job, size, Places(workers, 1, workers, False, "shared_memory"))
    planned = workers * (states.model_states + sum(states.buffers.values()))
    assert planned == pytest.approx(4 * sum(regions.places[name][1] for name in vectors), rel=1e-4)


def test_a_single_worker_holds_what_its_strategy_has():
    trained = train(spec_of(DIGITS, optimizer={"name": "adamw"}, steps=2))
    strategy = trained.strategies[0]
    shapes = {entry.name: entry.shape for entry in strategy.layout.entries}
    states = states_of(strategy.job, Size(shapes), places_of(strategy.job, ["here"]))
    assert states.weights == strategy.flat.weights.nbytes
    assert states.gradients == pytest.approx(strategy.flat.gradients.nbytes, rel=1e-3)
    assert states.optimizer == sum(vector.nbytes for vector in strategy.optimizer.moments.values())
    copied = strategy.shared_state()
    assert sum(states.buffers.values()) == copied["weights"].nbytes + sum(v.nbytes for v in copied["moments"].values())


# ----------------------------------------------------------------------------------------------------------------- wire
@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "all_reduce"},
        *({"name": "all_reduce", "compression": {"name": name}} for name in ("bf16", "int8", "powersgd")),
        {"name": "all_reduce", "compression": {"name": "topk", "fraction": 0.125}},
        {"name": "parameter_server"},
        {"name": "parameter_server", "mode": "async"},
        {"name": "local_sgd", "inner_steps": 4},
    ],
    ids=lambda strategy: "-".join(str(value) for value in strategy.values()),
)
def test_bytes_per_step_are_those_that_a_run_counts(strategy):
    planned, counted = bytes_of(strategy, workers=2)
    assert planned == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("compression", [None, {"name": "topk", "fraction": 0.125}, {"name": "int8"}])
def test_of_three_ranks_largest_elements_go_to_both_others(compression):
    planned, counted = bytes_of({"name": "all_reduce", "compression": compression}, workers=3)
    assert planned == pytest.approx(counted, rel=0.05)


def bytes_of(strategy, workers) -> tuple[float, float]:
    """Bytes per rank and step: planned, and counted in a run."""
    spec = spec_of(DIGITS, strategy=strategy, workers=workers, batch_size=64, steps=8)
    trained = train(spec)
    counted = sum(report.values["bytes"] for report in trained.reports)
    steps = sum(report.values["steps"] for report in trained.reports)  # of every rank
    shapes = {entry.name: entry.shape for entry in trained.strategies[0].layout.entries}
    places = Places(workers, hosts=1, ranks_on_host=workers, gpus=False, transport="inline")
    return bytes_per_step(job_of(spec), Size(shapes), places), counted / steps


@pytest.mark.parametrize(("stage", "elements"), [(1, 2), (2, 2), (3, 3)])
def test_zero_sends_two_or_three_times_its_parameters(stage, elements):
    """Rajbhandari et al. 2020, section 7; stages 2 and 3 repeat their part in every micro-batch."""
    job, size, places = zero_job(stage), Size({"w": (1000, 1000)}), Places(4, 1, 4, True, "process_group")
    assert bytes_per_step(job, size, places) == pytest.approx(elements * 2e6 * 3 / 4)
    more = {1: 2, 2: 4, 3: 9}[stage]
    assert bytes_per_step(job, size, places, accumulation=3) == pytest.approx(more * 2e6 * 3 / 4)


@pytest.mark.parametrize(("stage", "collectives"), [(1, 2 + 1 + 2), (2, 3 * 2 + 1 + 2), (3, 3 * (2 * 2 + 2) + 1 + 2)])
def test_zeros_collectives_by_hand(stage, collectives):
    """Two of three modules are gathered one by one; two buckets of gradients; three micro-batches."""
    job = zero_job(stage)
    job.strategy.deepspeed["zero_optimization"] = {"reduce_bucket_size": 600_000, "allgather_bucket_size": 1_100_000}
    size = Size({"a.weight": (1000, 500), "a.bias": (500,), "b.c.weight": (1000, 500), "norm.weight": (500,)})
    places = Places(4, 1, 4, True, "process_group")
    assert collectives_per_step(job, size, places, accumulation=3) == collectives
    assert collectives_per_step(job, size, Places(1, 1, 1, True, "process_group")) == 0


@pytest.mark.parametrize(("stage", "layers", "counted"), [(1, 4, 4), (2, 4, 4), (3, 8, 70)])
def test_collectives_are_those_that_torch_was_asked_for_in_runs(stage, layers, counted):
    """Counted by wrapping torch.distributed's functions in runs of two workers; a layer's weights may be reused."""
    width, linear = 64, {"attention.qkv": 192, "attention.output": 64, "mlp.up": 256, "mlp.down": 256}
    shapes = {"tokens.weight": (512, width), "positions.weight": (32, width), "norm.weight": (width,)}
    shapes |= {f"layers.{n}.{name}.weight": (rows, width) for n in range(layers) for name, rows in linear.items()}
    places = Places(2, 1, 2, False, "process_group")
    planned = collectives_per_step(zero_job(stage, "fp32", gpus=0), Size(shapes), places)
    assert planned == pytest.approx(counted, rel=0.05)


def test_waiting_for_many_collectives_is_most_of_a_small_step():
    """Twelve modules of 100 elements on two ranks: 24 gathers and four others, each of which costs its latency."""
    job, places = zero_job(3, "fp32", gpus=0), Places(2, 1, 2, False, "process_group")
    size = Size({f"{number}.weight": (100,) for number in range(12)})
    machine = Machine(1e9, "", "", 1e12, "", 0.0)
    step = step_of(job, size, places, machine, None, 1)
    assert step.collectives == 24 + 1 + 1 + 2
    assert step.wire_s == pytest.approx(28 * LOOPBACK.latency_us * 1e-6, rel=0.01)
    assert step.least_s > 28 * DEEPSPEED_S
    assert step.is_small
    large = step_of(job, Size({"w": (10_000, 10_000)}), places, machine, None, 1)
    assert large.wire_s == pytest.approx(large.sent / (LOOPBACK.gb_per_s * 1e9), rel=0.01)
    assert not large.is_small


def test_a_ring_and_rings_between_nodes_by_hand():
    links = Links(LinkSpec(latency_us=10.0, gb_per_s=100.0), LinkSpec(latency_us=100.0, gb_per_s=10.0))
    ring = Places(4, 1, 4, True, "process_group")
    sent = 2 * 3 / 4 * 1e9  # of a vector of 1 GB
    assert wire_seconds(sent, ring, links) == pytest.approx(6 * 10e-6 + 1.5 / 100)
    nodes = Places(8, 2, 4, True, "process_group")
    sent = 2 * 7 / 8 * 1e9
    between = 2 * 100e-6 + 1 / 2 * 2 * (1 / 4) / 10  # a quarter of it, over two nodes
    assert wire_seconds(sent, nodes, links) == pytest.approx(6 * 10e-6 + 1.5 / 100 + between)
    assert wire_seconds(0.0, Places(1, 1, 1, False, "inline"), links) == 0.0


# --------------------------------------------------------------------------------------------------------------- places
def test_workers_are_placed_as_the_spec_says():
    from distml.launch.plan.cluster import ClusterSpec, GPUSpec

    cluster = ClusterSpec(nodes=2, gpus_per_node=4, gpu=GPUSpec(name="h100"))
    job = zero_job(2)
    assert nodes_of(job, cluster) == ["node 0"] * 4
    spread = job.model_copy(update={"resources": job.resources.model_copy(update={"placement": "spread"})})
    assert nodes_of(spread, cluster) == ["node 0"] * 2 + ["node 1"] * 2


# ----------------------------------------------------------------------------------------------------------- operations
def test_operations_of_gpt2_by_hand():
    """N without positions 123,653,376; 12 layers, 1,024 tokens, width 768."""
    width = 768
    shapes = {"tokens.weight": (50257, width), "positions.weight": (1024, width), "rest": (85_056_000,)}
    count = product_parameters(shapes)
    assert count == 123_653_376
    assert flops_per_token(count, 12, 1024, width) == 6 * 123_653_376 + 113_246_208 == 855_166_464
    untied = {**shapes, "output.weight": (50257, width)}
    assert product_parameters(untied) == count  # the table is looked up, the output multiplied with


def test_utilisation_is_a_share_of_the_peak():
    assert model_flops_utilisation(1_000.0, 2e9, 4e12) == 0.5


def test_a_populations_budget():
    said = str(Budget(20_000, 2.4, 2.4, 500))
    assert said == "20,000 children x 2.4 GPU-hours on 500 GPUs: 2,000 GPU-days, 4.0 days"


def test_children_come_in_rounds_of_as_many_as_there_is_room_for():
    """Five on four GPUs, two each: three rounds of half of the GPU-hours."""
    budget = Budget(5, 24.0, 48.0, gpus=4, each=2)
    assert (budget.days_of_work(24.0), budget.days(24.0), budget.days(48.0)) == (5.0, 1.5, 3.0)
    assert str(budget) == "5 children x 24 to 48 GPU-hours on 4 GPUs: 5 to 10 GPU-days, 36 h 00 min to 3.0 days"
    assert Budget(1, 24.0, 24.0, gpus=500).days(24.0) == 1.0
