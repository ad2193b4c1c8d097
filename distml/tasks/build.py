"""From a task's block in the spec to a `Task`, importing a user's own class where the block names one."""

from __future__ import annotations

import importlib
import inspect
import os
import sysconfig
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distml.errors import UsageError
from distml.memory import out_of_memory
from distml.spec.base import ALL_OFFERS, StrategyBlock
from distml.spec.language import LanguageModelSpec, MaskedLanguageModelSpec
from distml.spec.matrix import refusal
from distml.spec.rl import ActingTaskSpecs, ActorCriticSpec, OnPolicyBlock, PPOSpec, ReinforceSpec, TRPOSpec
from distml.spec.schema import ClassificationSpec, JobSpec, OwnTaskSpec, RegressionSpec
from distml.spec.tabular import BanditSpec, QLearningSpec, TabularBlock
from distml.tasks.base import Task

if TYPE_CHECKING:
    from distml.rl.on_policy import OnPolicyTask

PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
STANDARD = sysconfig.get_path("stdlib") + os.sep
ON_POLICY: dict[type[OnPolicyBlock], tuple[str, str]] = {  # imported only when one is built
    ActorCriticSpec: ("distml.rl.actor_critic", "ActorCritic"),
    PPOSpec: ("distml.rl.ppo", "PPO"),
    ReinforceSpec: ("distml.rl.reinforce", "Reinforce"),
    TRPOSpec: ("distml.rl.trpo", "TRPO"),
}


def build_task(job: JobSpec, directory: Path | None = None) -> Task:
    """The task that a job names.

    Args:
        directory: of a run of this job, where one is looked at: a language model's tokeniser is there.

    Raises:
        UsageError: an own task cannot be imported or constructed (one line with the file and line of the cause), or
            needs what the strategy does not offer.
    """
    spec = job.task
    if isinstance(spec, OwnTaskSpec):
        task = build_own_task(spec)
        check_needs(spec.name, frozenset(task.needs), len(task.phases), job.strategy)
        return task
    if isinstance(spec, RegressionSpec):
        from distml.tasks.regression import Regression

        return Regression(spec.features, spec.rows, spec.noise, split_seed=job.seed)
    if isinstance(spec, LanguageModelSpec):
        from distml.tasks.language_model import LanguageModel

        return LanguageModel(spec, job.seed, directory)
    if isinstance(spec, MaskedLanguageModelSpec):
        from distml.tasks.masked_language_model import MaskedLanguageModel

        return MaskedLanguageModel(spec, job.seed, directory)
    if isinstance(spec, ActingTaskSpecs):
        module_name, class_name = ON_POLICY[type(spec)]
        acting: type[OnPolicyTask[Any]] = getattr(importlib.import_module(module_name), class_name)
        return acting(spec, job.limits.max_restarts)
    if isinstance(spec, TabularBlock):
        from distml.rl.tabular import QLearning, Sarsa

        tabular = QLearning if isinstance(spec, QLearningSpec) else Sarsa
        return tabular(spec, job.limits.max_restarts)
    if isinstance(spec, BanditSpec):
        from distml.rl.bandit import Bandit

        return Bandit(spec, job.seed)
    from distml.tasks.classification import Classification

    assert isinstance(spec, ClassificationSpec)
    return Classification(spec.data, spec.model, job.seed, spec.path, spec.label_noise)


def check_needs(name: str, needs: frozenset[str], num_phases: int, strategy: StrategyBlock) -> None:
    """Hold a task's needs against the strategy, also those that it inherits or computes.

    Raises:
        UsageError: one is unknown or not offered.
    """
    unknown = sorted(needs - ALL_OFFERS)
    if unknown:
        raise UsageError(f"task {name!r} needs {unknown[0]!r}, which is none of {', '.join(sorted(ALL_OFFERS))}")
    reason = refusal(repr(name), needs, strategy, num_phases)
    if reason is not None:
        raise UsageError(reason)


def build_own_task(spec: OwnTaskSpec) -> Task:
    """Import and construct a user's own class."""
    module_name, class_name = spec.name.split(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(f"task {spec.name!r} cannot be imported: {describe(error)}") from error
    task_class = getattr(module, class_name, None)
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise UsageError(f"task {spec.name!r}: {class_name} in {module_name} is not a subclass of distml.Task")
    try:
        inspect.signature(task_class).bind(**spec.args)
        return task_class(**spec.args)
    except Exception as error:
        raise UsageError(f"task {spec.name!r} cannot be constructed: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """An exception in one line, with the innermost file and line that it comes from outside the libraries."""
    lacking = out_of_memory(error)
    if lacking is not None:
        return lacking
    message = " ".join(str(error).split()) or "no message"
    frames = traceback.extract_tb(error.__traceback__)
    elsewhere = (PACKAGE, STANDARD, "<")
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(elsewhere)]
    where = f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {message[:500]}{where}"
