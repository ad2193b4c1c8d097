"""Rules of architecture searches: whether the task understands the space, and whether the reward can be measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pydantic import ValidationError

from distml.spec.architectures import STRUCTURED
from distml.spec.blocks import best_mode
from distml.spec.decisions import decision_space, structured
from distml.spec.messages import Problem, describe, problems_of, unknown
from distml.spec.nas import NasSpec
from distml.spec.rl import ActingBlock
from distml.spec.schema import ClassificationSpec

SPACE = ("space",)
MIN_TRIALS = 2


def check_nas(job: NasSpec) -> Iterator[Problem]:
    """Every rule that an architecture search breaks; dimensions by path are checked elsewhere."""
    if "name" in job.space:
        problems = list(_structured(job))
        yield from problems
        if not problems:
            yield from _is_search(job)
    yield from _measured(job)
    if job.base.init is not None and job.base.init.source is not None:
        yield Problem("base.init.from: children have models of their own and start from their own weights; remove it",
                      (("base", "init", "from"), ("base", "init")))  # fmt: skip


def _structured(job: NasSpec) -> Iterator[Problem]:
    name, task = job.space["name"], job.base.task
    if not isinstance(name, str) or name not in STRUCTURED:
        text = unknown("space", name, STRUCTURED) if isinstance(name, str) else f"space.name is {describe(name)}"
        yield Problem(f"{text}; else give dimensions by path", ((*SPACE, "name"),), "value")
        return
    if not isinstance(task, ClassificationSpec):
        yield Problem(f"space {name} is of images' models, and task {task.name} does not understand it; use task "
                      "classification, or dimensions by path", ((*SPACE, "name"),), "value")  # fmt: skip
    elif task.model.name != name:
        yield Problem(f"space {name} varies a model {name}, and base.task.model is {task.model.name}; set "
                      f"base.task.model to {name}, whose other keys every child has",
                      ((*SPACE, "name"),), "value")  # fmt: skip
    try:
        structured(job)
    except ValidationError as error:
        for problem in problems_of(error, STRUCTURED[name]):
            yield replace(problem, text=f"space: {problem.text}",
                          paths=tuple((*SPACE, *path) for path in problem.paths))  # fmt: skip


def _is_search(job: NasSpec) -> Iterator[Problem]:
    if decision_space(job).size < MIN_TRIALS:
        yield Problem("space has a single architecture; give it more options", (SPACE,), "value")


def _measured(job: NasSpec) -> Iterator[Problem]:
    reward, task = job.reward, job.base.task
    if best_mode(reward.metric) == "min":
        yield Problem(f"reward.metric {reward.metric} is better when it is lower, and a reward is maximised; use for "
                      "example eval/accuracy", (("reward", "metric"),), "value")  # fmt: skip
    if reward.cost == "flops" and isinstance(task, ActingBlock):
        yield Problem(f"reward.cost flops counts one example's forward, and task {task.name} has none; use cost: "
                      "parameters", (("reward", "cost"),), "value")  # fmt: skip
