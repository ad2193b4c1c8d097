"""`task: q_learning` and `task: sarsa`: one value per state and action, learned by temporal differences.

    TabularStream.next:  act epsilon-greedily with the table of now ▶ step ▶ Transitions
    loss:                1/2 (target - Q[s, a])^2, summed; the target r + gamma * (...) is a constant

so that plain SGD with learning rate alpha is the textbook's update, Q[s, a] += alpha (target - Q[s, a])
(Sutton & Barto 2018, 6.4 and 6.5), and every strategy carries it. Q-learning's target takes the best next action,
SARSA's the one that is really taken next, also from one batch to the next. After a terminal state there is nothing to
come; an episode that was only cut off goes on in its last state (for SARSA: with the action drawn there).

Shapes: S states, A actions, E environments, B transitions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Discrete
from numpy.typing import NDArray
from torch import Tensor, nn

from distml.errors import UsageError
from distml.rl.environments import Environments, check_finite, spaces_of, training_seeds
from distml.rl.evaluation import Act, play_by
from distml.rl.restarts import Restarting, Restarts
from distml.spec.tabular import EpsilonSpec, TabularBlock
from distml.tasks.base import Loss, Mean, Part, Progress, Task
from distml.tasks.data import mix

Array = NDArray[Any]


class Transitions(NamedTuple):
    """A batch; only steps that really happened.

    Attributes:
        states, actions: int64 [B].
        rewards: float32 [B].
        next_states, next_actions: int64 [B]; the action is the one drawn in the next state (SARSA), else 0.
        goes_on: float32 [B], 0 where the next state is terminal.
        ended: float32 [B], 1 where an episode ended or was cut off.
        returns, lengths: float32 [B], of the episode that ended, else 0.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    next_states: Tensor
    next_actions: Tensor
    goes_on: Tensor
    ended: Tensor
    returns: Tensor
    lengths: Tensor


class Table(nn.Module):
    """Q, zero at the start; its rows and columns count from the first state and action, which need not be 0."""

    def __init__(self, observations: Discrete[Any], actions: Discrete[Any]) -> None:
        super().__init__()
        self.first_state, self.first_action = int(observations.start), int(actions.start)
        self.values = nn.Parameter(torch.zeros(int(observations.n), int(actions.n)))

    def forward(self, states: Tensor) -> Tensor:
        """[B] -> [B, A]."""
        return self.values[states]

    def array(self) -> Array:
        """Q [S, A] as it is now; on CPUs a view."""
        table: Array = self.values.detach().cpu().numpy()
        return table


class TabularTask(Task):
    """What both share; a subclass says what the next state is worth.

    Args:
        spec: the task's block.
        max_failures: how often environments that fail are begun anew.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"whole_weights"})
    chooses_next: ClassVar[bool]  # whether the next action is drawn together with the transition, and then taken

    def __init__(self, spec: TabularBlock, max_failures: int = 0) -> None:
        self.spec, self.restarts = spec, Restarts(max_failures)

    def build_model(self) -> Table:
        observations, actions = spaces_of(self.spec.environment)
        if isinstance(observations, Discrete) and isinstance(actions, Discrete):
            return Table(observations, actions)
        what, space = ("actions", actions) if isinstance(observations, Discrete) else ("observations", observations)
        raise UsageError(
            f"environment {self.spec.environment.id} has {what} {' '.join(str(space).split())}, and a table is for "
            "Discrete ones; take another environment, or a task with a network such as actor_critic"
        )

    def stream(self, part: Part) -> TabularStream:
        return TabularStream(self.spec, part, self.chooses_next, self.restarts)

    @abstractmethod
    def next_values(self, model: Table, batch: Transitions) -> Tensor:
        """What the next states are worth to the target, [B]."""

    def loss(self, model: nn.Module, batch: Transitions, progress: Progress) -> Loss:
        assert isinstance(model, Table)
        with torch.no_grad():
            targets = batch.rewards + self.spec.gamma * batch.goes_on * self.next_values(model, batch)
        errors = targets - model.values[batch.states, batch.actions]
        num_ended = float(batch.ended.sum())
        episodes = {
            "rl/episode_return_mean": Mean(float(batch.returns.sum()), num_ended),
            "rl/episode_length_mean": Mean(float(batch.lengths.sum()), num_ended),
        }
        count = len(batch.states)
        return Loss(0.5 * errors.square().sum(), count, episodes if num_ended else {}, frames=count)

    def evaluate(self, model: nn.Module, part: Part, progress: Progress) -> dict[str, Mean]:
        assert isinstance(model, Table)
        means: dict[str, Mean] = {}
        episodes = range(part.index, self.spec.evaluation.episodes, part.count)
        for mode in self.spec.evaluation.modes:
            epsilon = 0.0 if mode == "greedy" else epsilon_at(self.spec.epsilon, progress)
            returns, lengths = self._play(model, epsilon, part, episodes)
            means[f"return_{mode}_mean"] = Mean(float(returns.sum()), len(episodes))
            means[f"episode_length_{mode}_mean"] = Mean(float(lengths.sum()), len(episodes))
        return means

    def _play(self, model: Table, epsilon: float, part: Part, episodes: Sequence[int]) -> tuple[Array, Array]:
        """Returns and lengths [E] of the episodes with these numbers."""
        act = acting(model, epsilon, np.random.default_rng(mix(part.seed, part.index)))
        return play_by(act, self.spec.environment, self.spec.evaluation.max_frames, part.split, episodes)

    def greedy(self, model: nn.Module, num_envs: int) -> Act:
        """How the table's best actions are taken."""
        assert isinstance(model, Table)
        return acting(model, 0.0, np.random.default_rng(0))


def acting(model: Table, epsilon: float, generator: np.random.Generator) -> Act:
    """How a table acts epsilon-greedily."""
    table = model.array()

    def act(observations: Array, resets: Array) -> Array:
        return epsilon_greedy(table[observations - model.first_state], epsilon, generator) + model.first_action

    return act


class QLearning(TabularTask):
    """Off-policy: the best next action, whatever is taken."""

    chooses_next = False

    def next_values(self, model: Table, batch: Transitions) -> Tensor:
        best: Tensor = model(batch.next_states).amax(1)
        return best


class Sarsa(TabularTask):
    """On-policy: the action that is taken next."""

    chooses_next = True

    def next_values(self, model: Table, batch: Transitions) -> Tensor:
        return model.values[batch.next_states, batch.next_actions]


class TabularStream(Restarting):
    """One worker's environments; they cannot be saved, so it begins anew at checkpoints."""

    def __init__(self, spec: TabularBlock, part: Part, chooses_next: bool, restarts: Restarts) -> None:
        self.spec, self.chooses_next = spec, chooses_next
        assert spec.n_steps is not None
        self.num_steps: int = spec.n_steps
        super().__init__(part, restarts)

    def begin(self) -> None:
        """Environments and episodes as new."""
        num_envs, seed = self.spec.envs_per_worker, self.part.seed
        if self.failures:
            seed = mix(seed, self.failures)
        self.environments = Environments(self.spec.environment, training_seeds(seed, num_envs))
        self.generator = np.random.default_rng(mix(seed, 1))
        self.observations = self.environments.reset()
        self.actions: Array | None = None  # chosen beforehand
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs)

    def next(self, model: nn.Module, progress: Progress) -> Transitions:
        """`n_steps` of all environments, and more while all that happened is that episodes began anew.

        Raises:
            EnvironmentFailed: an environment raised or gave what is not a number, once more than it may.
        """
        assert isinstance(model, Table)
        return self.attempt(lambda: self._steps(model, epsilon_at(self.spec.epsilon, progress)))

    def _steps(self, model: Table, epsilon: float) -> Transitions:
        rows = [self._step(model, epsilon) for _ in range(self.num_steps)]
        while not any(len(row[0]) for row in rows):
            rows.append(self._step(model, epsilon))
        columns = (np.concatenate(column) for column in zip(*rows, strict=True))
        return Transitions(*(torch.from_numpy(column) for column in columns))

    def _step(self, model: Table, epsilon: float) -> tuple[Array, ...]:
        """One step of all environments, as `Transitions` in NumPy."""
        table, states, actions = model.array(), self.observations - model.first_state, self.actions
        if actions is None:
            actions = epsilon_greedy(table[states], epsilon, self.generator)
        after = self.environments.step(actions + model.first_action)
        check_finite(self.spec.environment.id, after.observations[None], after.rewards[None], self.environments.seeds,
                     self.environments.steps - 1)  # fmt: skip
        self.observations = after.observations
        ended = after.terminated | after.truncated
        begun = reached = after.observations - model.first_state
        if after.final is not None:
            reached = np.where(ended, after.final - model.first_state, begun)
        next_actions = np.zeros_like(actions)
        if self.chooses_next:
            next_actions = self.actions = epsilon_greedy(table[reached], epsilon, self.generator)
            if after.final is not None:  # an episode's first action belongs to its first state
                self.actions = np.where(ended, epsilon_greedy(table[begun], epsilon, self.generator), next_actions)
        self.returns += after.rewards  # a dummy row's reward is 0
        self.lengths += after.valid
        columns = (states, actions, after.rewards, reached, next_actions, ~after.terminated, ended,
                   self.returns * ended, self.lengths * ended)  # fmt: skip
        self.returns[ended] = self.lengths[ended] = 0.0
        kinds = (np.int64, np.int64, np.float32, np.int64, np.int64, *[np.float32] * 4)
        return tuple(column[after.valid].astype(kind) for column, kind in zip(columns, kinds, strict=True))

    def state(self) -> None:
        """None: it begins anew."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Never called: there is no state."""
        raise TypeError("environments cannot go on from a state")


def epsilon_at(spec: EpsilonSpec, progress: Progress) -> float:
    """How often a random action is taken: linear from `start` to `end` over the first `fraction` of the budget."""
    share = min(1.0, progress.fraction / spec.fraction) if spec.fraction > 0 else 1.0
    return spec.start + share * (spec.end - spec.start)


def epsilon_greedy(values: Array, epsilon: float, generator: np.random.Generator) -> Array:
    """An action per row of `values` [E, A]: any with probability epsilon, else the best, of several any (int64 [E])."""
    num_envs, num_actions = values.shape
    draws = generator.random((num_envs, num_actions + 2))
    best = np.where(values == values.max(1, keepdims=True), draws[:, 2:], -1.0).argmax(1)
    anything = (draws[:, 1] * num_actions).astype(np.int64)
    actions: Array = np.where(draws[:, 0] < epsilon, anything, best)
    return actions
