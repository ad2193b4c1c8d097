"""Who proposes the values of a sweep's trials: a grid, chance, or Optuna. No ray, no torch.

Trial i of a grid or of chance is a function of the space, the seed and i alone: it does not matter which trial ends
first. Optuna learns from what it is told: trial i is proposed once all trials up to i - lag have ended, and from these
alone, told in the order of their numbers; so the same seed and lag (trials at the same time) give the same trials as
long as scores repeat themselves, whoever ends first. A resume asks and tells it again in the order of the journal.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from distml.errors import UsageError
from distml.population.explore import sample
from distml.spec.schema import BestSpec
from distml.spec.search_rules import objectives_of
from distml.spec.space import Dimension, Space
from distml.spec.sweep import SweepSpec

Values = dict[str, Any]
STARTUP_TRIALS = 10  # of Optuna's TPE, which are random


class Sampler(Protocol):
    """Proposes trials in order, and hears how they went.

    Attributes:
        num_trials: how many there are; None: any number.
        lag: trial i may be proposed once all up to i - lag have ended; None: at any time.
    """

    num_trials: int | None
    lag: int | None

    def propose(self, index: int) -> Values:
        """The values of trial `index` by path; called once for each, in order."""
        ...

    def tell(self, index: int, scores: Sequence[float] | None) -> None:
        """How trial `index` went: a finite or infinite number per objective, or None where it failed."""
        ...

    def recall(self, index: int, values: Mapping[str, Any]) -> None:
        """Take note of a proposal that an earlier process has made, instead of `propose`."""
        ...


def build_sampler(job: SweepSpec, space: Space) -> Sampler:
    """The sampler of a sweep.

    Raises:
        UsageError: Optuna is not installed.
    """
    if job.sampler.name == "grid":
        return GridSampler(space, job.trials)
    if job.sampler.name == "random":
        return RandomSampler(space, job.seed, job.trials)
    check_optuna()
    return OptunaSampler(space, job.seed, job.trials, objectives_of(job))


def check_optuna() -> None:
    """Refuse a sweep that needs Optuna where it is missing.

    Raises:
        UsageError: with the extra that brings it.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("sampler optuna needs the package optuna; pip install 'distml[optuna]', or use sampler random")


class GridSampler:
    """Every combination of choices, the last path fastest."""

    def __init__(self, space: Space, num_trials: int | None) -> None:
        self.space = space
        self.lag: int | None = None
        size = math.prod(len(dimension.values) for dimension in space)
        self.num_trials: int | None = size if num_trials is None else min(size, num_trials)

    def propose(self, index: int) -> Values:
        """The combination at `index`."""
        rows = itertools.product(*(dimension.values for dimension in self.space))
        row = next(itertools.islice(rows, index, None))
        return {dimension.path: value for dimension, value in zip(self.space, row, strict=True)}

    def tell(self, index: int, scores: Sequence[float] | None) -> None:
        """Nothing is learned."""

    def recall(self, index: int, values: Mapping[str, Any]) -> None:
        """Nothing is learned."""


class RandomSampler:
    """Every trial is drawn from its own generator, so that trials do not depend on each other."""

    def __init__(self, space: Space, seed: int, num_trials: int | None) -> None:
        self.space, self.seed, self.num_trials = space, seed, num_trials
        self.lag: int | None = None

    def propose(self, index: int) -> Values:
        """Drawn for `index`."""
        generator = random.Random(f"{self.seed}:{index}")
        return sample(self.space, generator)

    def tell(self, index: int, scores: Sequence[float] | None) -> None:
        """Nothing is learned."""

    def recall(self, index: int, values: Mapping[str, Any]) -> None:
        """Nothing is learned."""


class OptunaSampler:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011; several objectives: Ozaki et al. 2020)."""

    def __init__(self, space: Space, seed: int, num_trials: int | None, goals: Sequence[BestSpec]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.num_trials, self.goals = num_trials, goals
        self.distributions = {dimension.path: _distribution(dimension) for dimension in space}
        self.choices = {dimension.path: dimension.values for dimension in space if dimension.kind == "choice"}
        directions = [optuna.study.StudyDirection.MAXIMIZE if goal.mode == "max"
                      else optuna.study.StudyDirection.MINIMIZE for goal in goals]  # fmt: skip
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        self.study = optuna.create_study(directions=directions, sampler=sampler)
        self.asked: dict[int, Any] = {}
        self.lag: int | None = 1
        self.told: dict[int, Sequence[float] | None] = {}
        self.num_learned = 0

    def propose(self, index: int) -> Values:
        """Asked of the study, which learns first from those that this one may know."""
        while self.num_learned <= index - (self.lag or 0) and self.num_learned in self.told:
            self._learn(self.num_learned, self.told.pop(self.num_learned))
            self.num_learned += 1
        trial = self.study.ask(self.distributions)
        self.asked[index] = trial
        return {path: self._value(path, value) for path, value in trial.params.items()}

    def _value(self, path: str, value: Any) -> Any:
        return self.choices[path][value] if path in self.choices else value

    def tell(self, index: int, scores: Sequence[float] | None) -> None:
        """The study hears of it when its turn comes."""
        self.told[index] = scores

    def _learn(self, index: int, scores: Sequence[float] | None) -> None:
        """NaN is the worst there is."""
        import optuna

        if scores is None:
            self.study.tell(self.asked[index], state=optuna.trial.TrialState.FAIL)
            return
        worst = [math.inf if goal.mode == "min" else -math.inf for goal in self.goals]
        values = [bad if math.isnan(score) else score for score, bad in zip(scores, worst, strict=True)]
        self.study.tell(self.asked[index], values)

    def recall(self, index: int, values: Mapping[str, Any]) -> None:
        """Ask again: the same study answers the same; where it does not, the values that were used are what counts."""
        if self.propose(index) == dict(values):
            return
        self._learn(index, None)
        params = {path: self.choices[path].index(value) if path in self.choices else value
                  for path, value in values.items()}  # fmt: skip
        self.study.enqueue_trial(params)
        self.propose(index)


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.kind == "choice":  # by index: Optuna's choices are single values, ours may be lists
        return CategoricalDistribution(tuple(range(len(dimension.values))))
    low, high = dimension.ends
    if dimension.is_integer:
        return IntDistribution(int(low), int(high), log=dimension.is_log)
    return FloatDistribution(low, high, log=dimension.is_log)
