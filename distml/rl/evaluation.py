"""Whole episodes on seeds that training never sees: one per environment, so that short ones do not count more often."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distml.rl.acting import build_actor
from distml.rl.atari import human_normalised
from distml.rl.environments import Environments, check_finite, evaluation_seeds, uses_own_vector_form, wrapper_class
from distml.rl.policies import Policy
from distml.spec.rl import EnvironmentSpec, EvaluationSpec
from distml.tasks.base import Mean, Part
from distml.tasks.data import mix

Array = NDArray[Any]
Act: TypeAlias = Callable[[Array, Array], Array]
"""From observations [E, *O] and whether each is an episode's first [E] to actions as environments take them."""


@runtime_checkable
class Plays(Protocol):
    """A task that can show an episode."""

    spec: Any

    def greedy(self, model: nn.Module, num_envs: int) -> Act:
        """How the model acts, from an episode's start on, when it does what it thinks best."""
        ...


def evaluate_policy(
    policy: Policy, environment: EnvironmentSpec, evaluation: EvaluationSpec, part: Part
) -> dict[str, Mean]:
    """Returns and lengths of this part's episodes, per mode.

    Returns:
        `return_greedy_mean`, `episode_length_greedy_mean` and the same for `sampled`; for games of Atari also
        `human_normalised`: 0 is a random player's score, 1 a human tester's.
    """
    episodes = range(part.index, evaluation.episodes, part.count)
    means: dict[str, Mean] = {}
    with frozen_anew(policy):
        for mode in evaluation.modes:
            returns, lengths = play(policy, environment, evaluation, part, episodes, greedy=mode == "greedy")
            means[f"return_{mode}_mean"] = Mean(float(returns.sum()), len(episodes))
            means[f"episode_length_{mode}_mean"] = Mean(float(lengths.sum()), len(episodes))
    score = human_normalised(environment.id, means[f"return_{evaluation.modes[0]}_mean"])
    return means if score is None else {**means, "human_normalised": score}


def play(
    policy: Policy, environment: EnvironmentSpec, evaluation: EvaluationSpec, part: Part, episodes: Sequence[int],
    greedy: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """Returns and lengths [E] of the episodes with these numbers, played by a policy."""
    generator = None if greedy else np.random.default_rng(mix(part.seed, part.index))
    act = acting(policy, len(episodes), part.device, generator)
    return play_by(act, environment, evaluation.max_frames, part.split, episodes)


def acting(policy: Policy, num_envs: int, device: torch.device, generator: np.random.Generator | None = None) -> Act:
    """How a policy acts from an episode's start: what it draws, or without a generator what is most probable."""
    actor, distribution = build_actor(policy, device), policy.distribution
    actor.refresh()
    state = actor.initial_state(num_envs)

    def act(observations: Array, resets: Array) -> Array:
        nonlocal state
        parameters, state = actor.act(observations, state, resets)
        actions = distribution.mode(parameters) if generator is None else distribution.sample(parameters, generator)
        return distribution.to_environment(actions)

    return act


def play_by(
    act: Act, environment: EnvironmentSpec, max_frames: int, split: str, episodes: Sequence[int]
) -> tuple[Array, Array]:
    """Returns and lengths [E] of the episodes with these numbers, each in an environment of its own.

    Args:
        act: see `Act`.
        environment: what is played, see `unclipped`.
        max_frames: of an episode.
        split: whose seeds.
        episodes: numbers of episodes, of which seeds follow.

    Raises:
        EnvironmentFailed: an environment raised or gave what is not a number.
    """
    if not len(episodes):
        return np.zeros(0), np.zeros(0)
    environments = Environments(unclipped(environment), evaluation_seeds(split, episodes), together=False)
    num_envs = environments.num_envs
    returns, lengths = np.zeros(num_envs), np.zeros(num_envs)
    plays, resets = np.ones(num_envs, dtype=bool), np.ones(num_envs, dtype=bool)
    with contextlib.closing(environments):
        observations = environments.reset()
        for _ in range(max_frames):
            transition = environments.step(act(observations, resets))
            check_finite(environment.id, transition.observations[None], transition.rewards[None], environments.seeds,
                         environments.steps - 1)  # fmt: skip
            observations, resets = transition.observations, np.zeros(num_envs, dtype=bool)
            returns += np.where(plays, transition.rewards, 0.0)
            lengths += plays
            plays &= ~(transition.terminated | transition.truncated)
            if not plays.any():
                break
    return returns, lengths


def unclipped(environment: EnvironmentSpec) -> EnvironmentSpec:
    """The environment with the game's own score and whole games, whatever training simplifies.

    Wrappers that change rewards (of `gymnasium.RewardWrapper`: ClipReward) are left out, the others stay.
    """
    kept = [one for one in environment.wrappers
            if not issubclass(wrapper_class(environment, one), gymnasium.RewardWrapper)]  # fmt: skip
    if len(kept) < len(environment.wrappers):  # a vector form's observations may be others than those of single ones
        return environment.model_copy(update={"wrappers": kept, "vectorization": "sync"})
    if not uses_own_vector_form(environment, together=False):  # games of Atari have one that seeds each
        return environment
    own = {"reward_clipping": False, "episodic_life": False}
    return environment.model_copy(update={"args": {**environment.args, **own}})


@contextlib.contextmanager
def frozen_anew(policy: Policy) -> Any:
    """Inside, observations are normalised with all that was seen; afterwards as the rollout in hand was."""
    if policy.observation_moments is None:
        yield
        return
    with policy.observation_moments.newest():
        yield
