"""Rules across keys: each is broken once, and names values, fix and place."""

# ruff: noqa: E501 (tables: one case per line)
from __future__ import annotations

import pytest

from distml.errors import UsageError
from distml.spec.loader import load_spec

HEAD = "distml: v1\nname: x\ntask: classification\n"
STOP = "stop: {steps: 100}\n"  # line 4

BROKEN = {
    "staleness without ssp": (
        STOP + "strategy: {name: parameter_server, mode: async, max_staleness: 4}",
        "5:49", "max_staleness 4 is for mode ssp, the mode is async",
    ),
    "ssp without staleness": (
        STOP + "strategy: {name: parameter_server, mode: ssp}", "5:36", "mode ssp needs strategy.max_staleness",
    ),
    "single with two": (
        STOP + "strategy: single\nresources: {workers: 2}", "6:13", "strategy single has one worker, resources.workers is 2",
    ),
    "batch smaller than workers": (
        STOP + "batch_size: 2\nresources: {workers: 4}", "5:1", "batch_size 2 is shared out over 4 workers",
    ),
    "default batch smaller than workers": (
        STOP + "resources: {workers: 65}", "5:13", "batch_size 64 is shared out over 65 workers",
    ),
    "micro-batch larger than the share": (
        STOP + "batch_size: 9\nmicro_batch_size: 6\nresources: {workers: 2}", "6:1", "micro_batch_size 6 is larger",
    ),
    "no budget": ("stop: {goal: {metric: eval/loss, at_most: 1}}", "4:1", "stop has no budget"),
    "no budget, nothing": ("stop: {}", "4:1", "stop has no budget; set one of steps, examples, epochs, frames, tokens, seconds"),
    "goal without a bound": ("stop: {steps: 1, goal: {metric: eval/loss}}", "4:18", "neither at_least nor at_most"),
    "goal with two": (
        "stop: {steps: 1, goal: {metric: eval/loss, at_least: 1, at_most: 2}}", "4:18", "both at_least and at_most",
    ),
    "too many servers": (
        STOP + "strategy: {name: parameter_server, servers: 65}", "5:36", "strategy.servers is 65, at most 64",
    ),
    "nesterov": (STOP + "optimizer: {name: sgd, nesterov: true}", "5:24", "nesterov: true needs momentum"),
    "cosine without an end": (
        "stop: {seconds: 5}\noptimizer: {name: sgd, schedule: cosine}", "5:24", "schedule cosine must know where it ends",
    ),
    "linear without an end": (
        "stop: {seconds: 5}\noptimizer: {name: sgd, schedule: {name: linear}}", "5:35", "schedule linear must know",
    ),
    "step without every": (
        STOP + "optimizer: {name: sgd, schedule: {name: step}}", "5:35", "schedule step needs optimizer.schedule.every",
    ),
    "every without step": (
        STOP + "optimizer: {name: sgd, schedule: {every: 5}}", "5:35", "schedule.every 5 is for schedule step",
    ),
    "factor without step": (
        STOP + "optimizer: {name: sgd, schedule: {name: linear, factor: 0.5}}", "5:49", "schedule.factor 0.5 is for",
    ),
    "final without a ramp": (
        STOP + "optimizer: {name: sgd, schedule: {final: 0.5}}", "5:35", "is for schedule linear and cosine",
    ),
    "steps without a ramp": (
        STOP + "optimizer: {name: sgd, schedule: {steps: 5}}", "5:35", "schedule.steps 5 is for schedule linear and cosine",
    ),
    "warmup past the end": (
        STOP + "optimizer: {name: sgd, schedule: {warmup: 101}}", "5:35", "warmup 101 is longer than the run, stop.steps 100",
    ),
    "speeds for a synchronous strategy": (
        STOP + "inline: {speeds: [1, 1]}\nresources: {workers: 2}", "5:10", "under all_reduce all workers wait",
    ),
    "speeds of other workers": (
        STOP + "strategy: {name: parameter_server, mode: async}\ninline: {speeds: [1]}\nresources: {workers: 2}",
        "6:10", "inline.speeds has 1 entries, resources.workers is 2",
    ),
    "transport of the other": (
        STOP + "transport: object_store", "5:1", "does not fit strategy all_reduce; use auto, shared_memory or process_group",
    ),
    "transport of servers": (
        STOP + "strategy: parameter_server\ntransport: process_group", "6:1", "use auto, shared_memory or object_store",
    ),
    "compression in shared memory": (
        STOP + "strategy: {name: all_reduce, compression: bf16}\ntransport: shared_memory", "5:30",
        "strategy.compression is for a wire, and shared_memory has none; remove it, or set transport to process_group",
    ),
    "prefetch in shared memory": (
        STOP + "strategy: {name: parameter_server, mode: async, prefetch: true}\ntransport: shared_memory", "5:49",
        "strategy.prefetch is for a wire, and shared_memory has none; remove it, or set transport to object_store",
    ),
    "gpus in shared memory": (
        STOP + "resources: {workers: 2, gpus_per_worker: 1}\ntransport: shared_memory", "6:1",
        "transport shared_memory is for gradients on CPUs, not on GPUs; set process_group or auto",
    ),
    "prefetch without staleness": (
        STOP + "strategy: {name: parameter_server, prefetch: true}", "5:36",
        "prefetch is for modes async and ssp, the mode is sync; remove it or change the mode",
    ),
    "transport of one": (STOP + "strategy: single\ntransport: process_group", "6:1", "strategy single; use auto"),
    "two rules": (
        STOP + "optimizer: {name: sgd, nesterov: true}\ntransport: object_store", "5:24", "momentum: 0.9 (and 1 more)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_names_values_fix_and_place(case, fails):
    text, place, phrase = BROKEN[case]
    message = fails(f"{HEAD}{text}\n")
    assert message.startswith(f"job.yaml:{place}: "), message
    assert phrase in message


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy": {"name": "parameter_server", "mode": "ssp", "max_staleness": 0, "servers": 64}},
        {"strategy": "single", "resources": {"workers": 1}},
        {"batch_size": 4, "resources": {"workers": 4}},
        {"batch_size": 9, "micro_batch_size": 5, "resources": {"workers": 2}},
        {"optimizer": {"name": "sgd", "nesterov": True, "momentum": 0.9}},
        {"optimizer": {"name": "sgd", "schedule": {"name": "step", "every": 5, "factor": 0.5}}},
        {"optimizer": {"name": "sgd", "schedule": {"name": "cosine", "steps": 9}}, "stop": {"seconds": 1}},
        {"optimizer": {"name": "sgd", "schedule": "linear"}, "stop": {"epochs": 0.5}},
        {"optimizer": {"name": "sgd", "schedule": {"warmup": 100}}},
        {"inline": {"speeds": [1, 0.5]}, "strategy": {"name": "parameter_server", "mode": "async"},
         "resources": {"workers": 2}},
        {"transport": "process_group"},
        {"transport": "object_store", "strategy": "parameter_server"},
    ],
)  # fmt: skip
def test_the_rules_let_pass_what_is_at_their_edge(keys):
    base = {"distml": "v1", "name": "x", "task": "regression", "stop": {"steps": 100}}
    loaded = load_spec({**base, **keys})
    assert loaded.job.name == "x"


OWN = """import distml


class Centred(distml.Task):
    needs = frozenset({"group_mean"})


class Plain(distml.Task):
    needs = frozenset()


class Unknown(distml.Task):
    needs = Centred.needs
"""


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "counts"),
    [
        (9, 4, 2, (2, 1)), (10, 3, 3, (2, 1)), (5, 1, 4, (2, 1)),  # refused
        (9, 3, 2, None), (9, None, 2, None), (8, 2, 2, None), (10, 4, 3, None), (11, 2, 1, None),
    ],
)  # fmt: skip
def test_a_collective_in_every_micro_batch_needs_equally_many_of_them(
    tmp_path, monkeypatch, batch, micro, workers, counts
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN)

    def spec(task: str, strategy: str = "all_reduce") -> dict:
        return {"distml": "v1", "name": "x", "task": {"name": f"mine:{task}"}, "stop": {"steps": 1}, "strategy": strategy,
                "batch_size": batch, "micro_batch_size": micro, "resources": {"workers": workers}}  # fmt: skip

    for task in ("Plain", "Unknown"):
        load_spec(spec(task), directory=tmp_path)
    for strategy in ("all_reduce", "parameter_server"):
        if counts is None:
            load_spec(spec("Centred", strategy), directory=tmp_path)
            continue
        text = f"is {counts[0]} micro-batches on some and {counts[1]} on others; set batch_size to a multiple"
        with pytest.raises(UsageError, match=text):
            load_spec(spec("Centred", strategy), directory=tmp_path)
