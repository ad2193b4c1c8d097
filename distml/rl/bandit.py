"""`task: bandit`: the testbed of k-armed bandits (Sutton & Barto 2018, 2.3), its learners and its pictures.

Each run is one bandit: the values of its arms are drawn from N(0, 1), an arm pays N(value, 1). In each run one learner
per epsilon estimates the values by sample averages, Q += (reward - Q) / n, and plays the best estimate, or with
probability epsilon any arm. The learners of a run see the same luck: their pulls explore together (the larger epsilon
wherever the smaller does) and their arms' noise is the same, so that what differs between them is what they learned.

How this is a task: the model is all estimates, with the number of pulls behind each. A step plays once in every run;
its loss is 1/2 (reward - Q)^2 / n, whose plain gradient step is the sample average, and a linear term that counts the
pulls. Both are scaled by the number of runs, because an update divides by the count of examples: with learning rate 1
what is left is the sum, and the result does not depend on who played which runs. All luck is a function of the seed,
the run and the version, so a run goes on exactly wherever it stopped, with any number of workers.

Shapes: R runs of this worker, L learners (epsilons), K arms.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distml.spec.tabular import BanditSpec
from distml.tasks.base import Loss, Mean, Part, Progress, Task

Array = NDArray[Any]
BLOCK = 128  # plays that are drawn at once: a generator per run and play would cost more than the play


class Pulls(NamedTuple):
    """One play in each of this worker's runs.

    Attributes:
        runs: int64 [R].
        arms: int64 [R, L], what each learner played.
        rewards: float32 [R, L].
        are_best: float32 [R, L], 1 where it was the arm of the largest value.
    """

    runs: Tensor
    arms: Tensor
    rewards: Tensor
    are_best: Tensor


class Estimates(nn.Module):
    """What all learners of all runs know: [runs, L, K]."""

    def __init__(self, runs: int, learners: int, arms: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(runs, learners, arms))
        self.pulls = nn.Parameter(torch.zeros(runs, learners, arms))

    def best(self, first: int, stop: int) -> Array:
        """The arm of the largest estimate for some runs, int64 [R, L]; of several the first, which is any: the arms'
        values are drawn alike."""
        found: Array = self.values.detach()[first:stop].cpu().numpy().argmax(2)
        return found


class Bandit(Task):
    """Args:
    spec: the task's block.
    seed: the job's.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"whole_weights", "one_version"})

    def __init__(self, spec: BanditSpec, seed: int) -> None:
        self.spec, self.seed = spec, seed

    def build_model(self) -> Estimates:
        return Estimates(self.spec.runs, len(self.spec.epsilons), self.spec.arms)

    def values(self, first: int, stop: int) -> Array:
        """What the arms of these runs pay on average, [R, K]."""
        return np.stack([np.random.default_rng([self.seed, run, 0]).normal(size=self.spec.arms)
                         for run in range(first, stop)])  # fmt: skip

    def stream(self, part: Part) -> BanditStream:
        return BanditStream(self, *share(self.spec.runs, part))

    def loss(self, model: nn.Module, batch: Pulls, progress: Progress) -> Loss:
        assert isinstance(model, Estimates)
        where = batch.runs[:, None], torch.arange(batch.arms.shape[1], device=batch.arms.device), batch.arms
        pulls = model.pulls[where]
        num_pulls = pulls.detach() + 1.0
        squares = 0.5 * (batch.rewards - model.values[where]).square() / num_pulls
        total = squares.sum() - (pulls - pulls.detach()).sum()  # of no value, but with the gradient -1 per pull
        metrics = {}
        for learner, epsilon in enumerate(self.spec.epsilons):
            count = len(batch.runs)
            metrics[f"rl/optimal_share_{epsilon:g}"] = Mean(float(batch.are_best[:, learner].sum()), count)
            metrics[f"rl/reward_{epsilon:g}"] = Mean(float(batch.rewards[:, learner].double().sum()), count)
        return Loss(self.spec.runs * total, len(batch.runs), metrics)

    def evaluate(self, model: nn.Module, part: Part, progress: Progress) -> dict[str, Mean]:
        """What the next play brings in expectation over its luck: the share of optimal arms, and the reward."""
        assert isinstance(model, Estimates)
        first, stop = share(self.spec.runs, part)
        if first == stop:
            return {}
        values, best = self.values(first, stop), model.best(first, stop)
        is_best = best == values.argmax(1)[:, None]
        paid = np.take_along_axis(values, best, 1)
        means = {}
        for learner, epsilon in enumerate(self.spec.epsilons):
            shares = (1 - epsilon) * is_best[:, learner] + epsilon / self.spec.arms
            rewards = (1 - epsilon) * paid[:, learner] + epsilon * values.mean(1)
            means[f"optimal_share_{epsilon:g}"] = Mean(float(shares.sum()), len(values))
            means[f"reward_{epsilon:g}"] = Mean(float(rewards.sum()), len(values))
        return means


class BanditStream:
    """Plays runs [first, stop); all it has is a function of the seed and of the version of the estimates."""

    def __init__(self, task: Bandit, first: int, stop: int) -> None:
        self.task, self.first, self.stop = task, first, stop
        self.values = task.values(first, stop)
        self.best = self.values.argmax(1)[:, None]
        self.epsilons = np.asarray(task.spec.epsilons)
        self.block = -1

    def next(self, model: nn.Module, progress: Progress) -> Pulls:
        """One play of every run."""
        assert isinstance(model, Estimates)
        block, play = divmod(progress.version, BLOCK)
        if block != self.block:
            self._draw(block)
        explores = self.explores[:, play, None] < self.epsilons
        arms = np.where(explores, self.arms[:, play, None], model.best(self.first, self.stop))
        rewards = np.take_along_axis(self.values, arms, 1) + self.noise[:, play, None]
        columns = (np.arange(self.first, self.stop), arms, rewards.astype(np.float32),
                   (arms == self.best).astype(np.float32))  # fmt: skip
        return Pulls(*map(torch.from_numpy, columns))

    def _draw(self, block: int) -> None:
        """The luck of `BLOCK` plays, each [R, BLOCK]."""
        self.block = block
        size = (self.stop - self.first, BLOCK)
        self.explores, self.noise, self.arms = np.empty(size), np.empty(size), np.empty(size, np.int64)
        for row, run in enumerate(range(self.first, self.stop)):
            generator = np.random.default_rng([self.task.seed, run, 1 + block])
            self.explores[row] = generator.random(BLOCK)
            self.noise[row] = generator.normal(size=BLOCK)
            self.arms[row] = generator.integers(self.task.spec.arms, size=BLOCK)

    def state(self) -> dict[str, Any]:
        """Nothing: the version says where it stands."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


def share(runs: int, part: Part) -> tuple[int, int]:
    """[first, stop) of the runs that are this part's."""
    return runs * part.index // part.count, runs * (part.index + 1) // part.count
