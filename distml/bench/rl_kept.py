"""What a contender of `distml bench rl` keeps while it trains, and how its kept weights act afterwards.

Every contender copies its acting network at each multiple of 4,000 frames, in memory, together with the training time
at which it was so; the time that copying takes is not counted. Afterwards one and the same evaluator plays greedy
episodes with each of the copies, whoever they come from. Where networks are not small enough for that (Atari), the mean
return of the latest training episodes is kept instead.

Shapes: K kept copies, L layers, E episodes, O observation size, A actions or action dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt

EVERY = 4_000
EPISODES = 20
EVALUATION_SEED = 1_900_000_000  # far from the seeds that contenders derive from theirs
RETURN = "training_return"
ACTIVATION = "activation"
CONSECUTIVE = 3

Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = dict[str, Array]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh,
    "relu": lambda values: np.maximum(values, 0.0),
    "linear": lambda values: values,
}


def as_arrays(layers: Sequence[tuple[Any, Any]], moments: tuple[Any, Any] | None = None) -> Arrays:
    """A policy network's layers, (weight [out, in], bias [out]) each, as the arrays that are kept.

    Args:
        layers: from the observation to the logits or the mean.
        moments: mean and standard deviation [O] by which observations are normalised first.
    """
    found = {}
    for index, (weight, bias) in enumerate(layers):
        found[f"weight-{index}"], found[f"bias-{index}"] = _copied(weight), _copied(bias)
    if moments is not None:
        found["mean"], found["std"] = _copied(moments[0]), _copied(moments[1])
    return found


def _copied(values: Any) -> Array:
    return np.array(np.asarray(values), np.float32)


class Keeper:
    """Takes copies while a contender trains.

    Args:
        every: frames from one copy to the next.
        clock: seconds; the same in all processes of a host.
    """

    def __init__(self, every: int = EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self.clock = every, clock
        self.frames: list[int] = []
        self.seconds: list[float] = []
        self.at: list[float] = []
        self.copies: list[Arrays] = []
        self.started: float | None = None
        self.copying_s = 0.0

    def start(self) -> None:
        """Training begins; later calls change nothing."""
        if self.started is None:
            self.started = self.clock()

    def offer(self, frames: int, copy: Callable[[], Arrays]) -> None:
        """There are weights that saw this many frames; they are copied where a multiple of `every` has been reached."""
        if frames // self.every <= (self.frames[-1] // self.every if self.frames else 0):
            return
        before = self.clock()
        assert self.started is not None
        self.seconds.append(before - self.started - self.copying_s)
        self.at.append(before)
        self.frames.append(frames)
        self.copies.append(copy())
        self.copying_s += self.clock() - before

    def save(self, path: Path, activation: str = "linear") -> None:
        """Write all copies to a file that `Kept.load` reads.

        Args:
            path: of the file, which ends in .npz.
            activation: between the layers that were kept.
        """
        stacked = {name: np.stack([copy[name] for copy in self.copies]) for name in (self.copies or [{}])[0]}
        stacked |= {"frames": np.array(self.frames), "seconds": np.array(self.seconds), "at": np.array(self.at),
                    ACTIVATION: np.array(activation)}  # fmt: skip
        np.savez(path, **cast(Any, stacked))


@dataclass(frozen=True)
class Kept:
    """What a contender has kept.

    Attributes:
        frames: [K] that had been consumed.
        seconds: [K] of training until then.
        at: [K], when that was by the host's monotonic clock.
        activation: between layers.
        arrays: [K, ...] each.
    """

    frames: Array
    seconds: Array
    at: Array
    activation: str
    arrays: Mapping[str, Array]

    @classmethod
    def load(cls, path: Path) -> Kept:
        """What `Keeper.save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        frames, seconds, at, activation = (arrays.pop(name) for name in ("frames", "seconds", "at", ACTIVATION))
        return cls(frames, seconds, at, str(activation), arrays)

    @property
    def frames_per_s(self) -> float:
        """Between the first and the last copy: start-up does not count."""
        return float((self.frames[-1] - self.frames[0]) / (self.seconds[-1] - self.seconds[0]))

    def returns(self, environment: str) -> list[float]:
        """[K]: the mean return of greedy episodes, or of training episodes where those were kept (NaN before any)."""
        if RETURN in self.arrays:
            return [float(value) for value in self.arrays[RETURN]]
        copies = ({name: values[k] for name, values in self.arrays.items()} for k in range(len(self.frames)))
        environments = gym.make_vec(environment, num_envs=EPISODES)
        try:
            return [float(greedy_returns(copy, self.activation, environments).mean()) for copy in copies]
        finally:
            environments.close()


def outputs(arrays: Mapping[str, Array], activation: str, observations: Array) -> Array:
    """[E, A]: the logits or means that a kept network gives for observations [E, O]."""
    hidden = np.asarray(observations, np.float32).reshape(len(observations), -1)
    if "mean" in arrays:
        hidden = np.clip((hidden - arrays["mean"]) / arrays["std"], -10.0, 10.0)
    last = sum(name.startswith("weight-") for name in arrays) - 1
    for index in range(last + 1):
        hidden = hidden @ arrays[f"weight-{index}"].T + arrays[f"bias-{index}"]
        hidden = ACTIVATIONS[activation](hidden) if index < last else hidden
    return hidden


def greedy_actions(values: Array, space: gym.Space[Any]) -> Array:
    """[E] or [E, A]: the likeliest of discrete actions; the mean of continuous ones, within their bounds."""
    if isinstance(space, gym.spaces.Discrete):
        return np.asarray(space.start + values.argmax(axis=1))
    assert isinstance(space, gym.spaces.Box)
    return np.clip(values.reshape(len(values), *space.shape), space.low, space.high)


def greedy_returns(
    arrays: Mapping[str, Array], activation: str, environments: gym.vector.VectorEnv[Any, Any, Any]
) -> Array:
    """[E]: the return of each environment's first episode, which depends on nothing but the weights."""
    observations, _ = environments.reset(seed=EVALUATION_SEED)
    total, running = np.zeros(environments.num_envs), np.ones(environments.num_envs, bool)
    while running.any():
        actions = greedy_actions(outputs(arrays, activation, observations), environments.single_action_space)
        observations, rewards, terminated, truncated, _ = environments.step(actions)
        total += np.where(running, rewards, 0.0)
        running &= ~(terminated | truncated)
    return total


def first_solved(returns: Sequence[float], threshold: float) -> int | None:
    """Which copy is the first of three in a row that reach the threshold."""
    for index in range(len(returns) - CONSECUTIVE + 1):
        if all(value >= threshold for value in returns[index : index + CONSECUTIVE]):
            return index
    return None
