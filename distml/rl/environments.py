"""Several environments of one kind that are stepped together, whatever vector form and autoreset mode they have.

Gymnasium's vector environments begin anew by themselves, in one of two ways. `next_step`: after an episode's end the
next call ignores the action and answers with the first observation; that row is a dummy, marked as not `valid`.
`same_step`: the call that ends an episode already answers with the next one's first observation, and the last one of
the episode that ended comes as `final`. Whoever uses `Environments` sees both through one `Transition`.

Seeds: training's are at least 2^30, those of evaluations below it (the test split's from 2^29), so that they never
meet.

Shapes: E environments, O one observation, A one action.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from distml.errors import UsageError
from distml.spec.environments import unknown_environment
from distml.spec.rl import EnvironmentSpec, WrapperSpec
from distml.tasks.data import mix

Array: TypeAlias = NDArray[Any]
T = TypeVar("T")

TRAINING_SEEDS = 2**30  # and above; below: evaluation
MODES = {"next_step": AutoresetMode.NEXT_STEP, "same_step": AutoresetMode.SAME_STEP}


def training_seeds(seed: int, num_envs: int) -> list[int]:
    """Of a worker's environments, from its own seed."""
    return [TRAINING_SEEDS + mix(seed, index) % TRAINING_SEEDS for index in range(num_envs)]


def evaluation_seeds(split: str, episodes: Sequence[int]) -> list[int]:
    """Of an evaluation's episodes, by their number: the same in every run, so that scores compare."""
    return [(TRAINING_SEEDS // 2 if split == "test" else 0) + episode for episode in episodes]


class EnvironmentFailed(RuntimeError):
    """An environment raised, or gave something that is not a number; named by its index, seed and step."""


@dataclass(slots=True)
class Transition:
    """What one step of all environments brought.

    Attributes:
        observations: [E, *O] after the step.
        rewards: float32 [E]; 0 in dummy rows.
        terminated, truncated: bool [E]: the episode ended here, by its own rules or by a limit.
        valid: bool [E]; false: a dummy row, in which an environment only began anew.
        final: [E, *O] or None: with `same_step`, rows of environments whose episode ended hold its last observation.
    """

    observations: Array
    rewards: Array
    terminated: Array
    truncated: Array
    valid: Array
    final: Array | None = None


class Environments:
    """E environments with their seeds.

    Args:
        spec: which, and in what vector form.
        seeds: of each, see `training_seeds` and `evaluation_seeds`.
        together: step them in the environment's own vector form if it has one; False: only if that seeds each.

    Raises:
        UsageError: the environment cannot be made.
    """

    def __init__(self, spec: EnvironmentSpec, seeds: Sequence[int], *, together: bool = True) -> None:
        self.spec, self.seeds, self.num_envs = spec, list(seeds), len(seeds)
        self.vector = make_vector(spec, self.num_envs, together)
        self.observation_space: gym.Space[Any] = self.vector.single_observation_space
        self.action_space: gym.Space[Any] = self.vector.single_action_space
        mode = self.vector.metadata.get("autoreset_mode")
        if mode not in MODES.values():
            raise UsageError(f"environment {spec.id} has autoreset mode {mode}; next_step and same_step work")
        self.resets_in_same_step = mode == AutoresetMode.SAME_STEP
        self.steps = 0
        self._ended = np.zeros(self.num_envs, dtype=bool)
        self._all_valid = np.ones(self.num_envs, dtype=bool)

    def reset(self, *, seeded: bool = True) -> Array:
        """Begin all episodes; the first observations [E, *O].

        Args:
            seeded: from the seeds; False: other episodes than before, as the environments' own generators go on.

        Raises:
            EnvironmentFailed: one raised.
        """
        seeds: Any = self.seeds
        if not isinstance(self.vector, SyncVectorEnv):
            seeds = np.asarray(self.seeds) if takes_many_seeds(self.vector) else self.seeds[0]
        with self._named("reset"):
            observations, _ = self.vector.reset(seed=seeds if seeded else None)
        self.steps = 0
        self._ended = np.zeros(self.num_envs, dtype=bool)
        return np.asarray(observations)

    def step(self, actions: Array) -> Transition:
        """One step of all.

        Args:
            actions: [E, *A].

        Raises:
            EnvironmentFailed: one raised.
            UsageError: episodes ended whose last observation is missing.
        """
        with self._named("step"):
            observations, rewards, terminated, truncated, infos = self.vector.step(actions)
        self.steps += 1
        final = None
        if self.resets_in_same_step:
            valid = self._all_valid
            if "final_obs" in infos:
                final = final_observations(infos["final_obs"], np.asarray(observations))
            elif (terminated | truncated).any():
                raise UsageError(f"environment {self.spec.id} begins anew in the same step without infos['final_obs'], "
                                 "the last observations of the episodes that ended; give them, or begin anew in the "
                                 "next step")  # fmt: skip
        else:
            valid = ~self._ended
            self._ended = terminated | truncated
        return Transition(
            np.asarray(observations), np.asarray(rewards, np.float32), terminated, truncated, valid, final
        )

    @contextlib.contextmanager
    def _named(self, doing: str) -> Any:
        try:
            yield
        except EnvironmentFailed:
            raise
        except Exception as error:
            which = f"seed {self.seeds[0]}" if self.num_envs == 1 else f"seeds {self.seeds[0]} and following"
            raise EnvironmentFailed(failed(self.spec.id, which, self.steps, doing, error)) from error

    def close(self) -> None:
        """End what they hold."""
        self.vector.close()


class Guard(gym.Wrapper[Any, Any, Any, Any]):
    """Names the environment, of several, that raised."""

    def __init__(self, env: gym.Env[Any, Any], name: str, index: int) -> None:
        super().__init__(env)
        self.name, self.index, self.seed, self.count = name, index, -1, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As the environment does."""
        self.seed = self.seed if seed is None else seed
        try:
            return self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise EnvironmentFailed(self._failed("reset", error)) from error

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As the environment does."""
        self.count += 1
        try:
            return self.env.step(action)
        except Exception as error:
            raise EnvironmentFailed(self._failed("step", error)) from error

    def _failed(self, doing: str, error: Exception) -> str:
        return failed(self.name, f"environment {self.index}, seed {self.seed}", self.count, doing, error)


def failed(name: str, which: str, steps: int, doing: str, error: Exception) -> str:
    """One line about an environment that raised."""
    message = " ".join(str(error).split()) or "no message"
    return f"{name} raised in {doing} ({which}, after {steps} steps): {type(error).__name__}: {message[:300]}"


# ------------------------------------------------------------------------------------------------------------- making
def make_vector(spec: EnvironmentSpec, num_envs: int, together: bool = True) -> VectorEnv[Any, Any, Any]:
    """The vector environment that a block describes.

    Raises:
        UsageError: unknown id, missing extra, or arguments that it does not take.
    """
    own = own_class(spec)
    if own is not None and issubclass(own, VectorEnv):
        _check_own_vector(spec)
        make_own: Callable[..., VectorEnv[Any, Any, Any]] = own
        return _checked(spec, lambda: make_own(num_envs=num_envs, **spec.args))
    if uses_own_vector_form(spec, together):
        arguments = {**spec.args, **one_thread(spec)}
        if spec.autoreset is not None:
            arguments["autoreset_mode"] = MODES[spec.autoreset]
        return _checked(
            spec, lambda: gym.make_vec(spec.id, num_envs, vectorization_mode="vector_entry_point", **arguments)
        )
    autoreset = MODES[spec.autoreset or "next_step"]

    def guarded(index: int) -> gym.Env[Any, Any]:
        return Guard(make_one(spec), spec.id, index)

    makers = [functools.partial(guarded, index) for index in range(num_envs)]
    return _checked(spec, lambda: SyncVectorEnv(makers, autoreset_mode=autoreset))


def _check_own_vector(spec: EnvironmentSpec) -> None:
    """Refuse what is done to single environments."""
    for key in ("wrappers", "max_episode_steps", "vectorization", "autoreset"):
        if getattr(spec, key) != EnvironmentSpec.model_fields[key].default:
            raise UsageError(f"environment {spec.id} is a VectorEnv, on which task.environment.{key} has no effect; "
                             "remove it and let the class do that, or derive the class from gymnasium.Env")  # fmt: skip


def make_one(spec: EnvironmentSpec, **more: Any) -> gym.Env[Any, Any]:
    """One environment with its wrappers.

    Raises:
        UsageError: as `make_vector`.
    """
    own = own_class(spec)
    limit = spec.max_episode_steps

    def make() -> gym.Env[Any, Any]:
        if own is None:
            return gym.make(spec.id, max_episode_steps=limit, disable_env_checker=True, **{**spec.args, **more})
        env: gym.Env[Any, Any] = own(**{**spec.args, **more})
        return env if limit is None else gym.wrappers.TimeLimit(env, limit)

    register(spec.id)
    env: gym.Env[Any, Any] = _checked(spec, make)
    for wrapper in spec.wrappers:
        env = _checked(spec, functools.partial(wrapper_class(spec, wrapper), env, **wrapper.args))
    return env


def wrapper_class(spec: EnvironmentSpec, wrapper: WrapperSpec) -> type[gym.Wrapper[Any, Any, Any, Any]]:
    """A wrapper of `gymnasium.wrappers`.

    Raises:
        UsageError: there is none of this name.
    """
    kind = getattr(gym.wrappers, wrapper.name, None)
    if not (isinstance(kind, type) and issubclass(kind, gym.Wrapper)):
        raise UsageError(f"environment {spec.id}: gymnasium.wrappers has no wrapper {wrapper.name!r}")
    return kind


def uses_own_vector_form(spec: EnvironmentSpec, together: bool) -> bool:
    """Whether the environment's own vector entry point is taken: what it cannot do is done by single ones."""
    if own_class(spec) is not None:
        return False
    register(spec.id)
    try:
        entry = gym.spec(spec.id)
    except gym.error.Error as error:
        raise UsageError(unknown_environment(spec.id) or f"environment {spec.id}: {error}") from None
    if entry.vector_entry_point is None or spec.vectorization == "sync":
        return False
    is_atari = spec.id.startswith("ALE/")
    plain = not spec.wrappers and spec.max_episode_steps is None and not entry.additional_wrappers
    return plain and (is_atari or (together and spec.autoreset is None))


def one_thread(spec: EnvironmentSpec) -> dict[str, Any]:
    """One thread per worker, where a vector form would take all of the machine's by itself."""
    return {"num_threads": 1} if spec.id.startswith("ALE/") and "num_threads" not in spec.args else {}


def takes_many_seeds(vector: VectorEnv[Any, Any, Any]) -> bool:
    """Whether a vector form seeds each of its environments; others have one generator for all."""
    return type(vector).__name__ == "AtariVectorEnv"


def register(name: str) -> None:
    """Make a package's environments known to Gymnasium.

    Raises:
        UsageError: the package is not installed.
    """
    if name.startswith("ALE/") and name not in gym.registry:
        try:
            ale_py = importlib.import_module("ale_py")
        except ImportError:
            raise UsageError(f"environment {name} needs the extra 'atari': pip install 'distml[atari]'") from None
        gym.register_envs(ale_py)


def own_class(spec: EnvironmentSpec) -> type[Any] | None:
    """A user's own class by import path; None for an id of the registry.

    Raises:
        UsageError: it cannot be imported, or is no environment.
    """
    module_name, _, class_name = spec.id.partition(":")
    if not class_name.isidentifier():
        return None
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except Exception as error:
        raise UsageError(f"environment {spec.id!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, (gym.Env, VectorEnv))):
        raise UsageError(f"environment {spec.id!r}: {class_name} is not a subclass of gymnasium.Env or VectorEnv")
    return found


def episode_limit(spec: EnvironmentSpec) -> int | None:
    """After how many steps an episode is truncated at the latest; None: it may go on for ever."""
    if spec.max_episode_steps is not None or own_class(spec) is not None:
        return spec.max_episode_steps
    register(spec.id)
    return gym.spec(spec.id).max_episode_steps


EXTRAS = {"mujoco": "mujoco", "Box2D": "box2d", "box2d": "box2d", "ale": "atari", "pygame": "render"}


def _checked(spec: EnvironmentSpec, make: Callable[[], T]) -> T:
    try:
        return make()
    except (UsageError, EnvironmentFailed):
        raise
    except gym.error.DependencyNotInstalled as error:
        extra = next((extra for word, extra in EXTRAS.items() if word in str(error)), None)
        hint = f"needs the extra {extra!r}: pip install 'distml[{extra}]'" if extra else f"needs more: {error}"
        raise UsageError(f"environment {spec.id} {hint}") from None
    except Exception as error:
        if isinstance(error, gym.error.NameNotFound | gym.error.VersionNotFound | gym.error.NamespaceNotFound):
            raise UsageError(unknown_environment(spec.id) or str(error)) from None
        message = " ".join(str(error).split())
        raise UsageError(f"environment {spec.id} cannot be made: {type(error).__name__}: {message[:300]}") from error


def final_observations(found: Any, like: Array) -> Array:
    """[E, *O] from what a vector form gives: an array of its own, or one observation or None per environment."""
    if isinstance(found, np.ndarray) and found.dtype != object:
        return found
    final = np.zeros_like(like)
    for index, observation in enumerate(found):
        if observation is not None:
            final[index] = observation
    return final


def spaces_of(spec: EnvironmentSpec) -> tuple[gym.Space[Any], gym.Space[Any]]:
    """(observation space, action space) of one environment."""
    vector = make_vector(spec, 1)
    try:
        return vector.single_observation_space, vector.single_action_space
    finally:
        vector.close()


def check_recurrent(spec: EnvironmentSpec) -> None:
    """Refuse what rollouts of a recurrent policy cannot be made of.

    Raises:
        UsageError: environments begin anew in the same step.
    """
    vector = make_vector(spec, 1)
    vector.close()
    if vector.metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP:
        raise UsageError(f"environment {spec.id} begins anew in the same step, and a policy with a memory cannot judge "
                         "an episode's last observation then; let it begin anew in the next step")  # fmt: skip


def check_finite(name: str, observations: Array, rewards: Array, seeds: Sequence[int], steps: int) -> None:
    """Refuse a rollout that is not all numbers.

    Args:
        observations: [T + 1, E, *O].
        rewards: [T, E].
        seeds: of each environment.
        steps: taken before the rollout.

    Raises:
        EnvironmentFailed: with the first step and environment.
    """
    for what, values in (("an observation", observations), ("a reward", rewards)):
        if values.dtype.kind != "f" or np.isfinite(values).all():
            continue
        bad = ~np.isfinite(values.reshape(values.shape[0], values.shape[1], -1)).all(-1)
        step, index = (int(place) for place in np.argwhere(bad)[0])
        raise EnvironmentFailed(
            f"{name} gave {what} that is not finite (environment {index}, seed {seeds[index]}, "
            f"step {steps + step}): {values[step, index]}"
        )
