"""`kind: rllib`: any algorithm of RLlib under the verbs, the run directory and the exit codes of a training job.

A step is one training iteration of the algorithm. `config` holds RLlib's own keys, checked one by one against
`rllib_table.py`; what distml decides itself (environment, evaluation, seed) or what would name Python code is refused
with the place where it belongs. Nothing in a spec is ever imported but the environment's class.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from distml.spec import rllib_table
from distml.spec.base import Block, Count, Positive
from distml.spec.environments import unknown_environment
from distml.spec.messages import Problem, describe, near, shorten
from distml.spec.rl import EnvironmentSpec
from distml.spec.schema import BestSpec, GoalSpec, LogSpec
from distml.spec.storage import Storage
from distml.spec.tables import check_value
from distml.spec.yaml import KeyPath, dotted

AlgorithmName = Literal["APPO", "BC", "CQL", "DQN", "DreamerV3", "IMPALA", "IQL", "MARWIL", "PPO", "SAC"]
ALGORITHMS: tuple[str, ...] = get_args(AlgorithmName)
OFFLINE = ("BC", "CQL", "IQL", "MARWIL")  # they learn from recorded episodes, `config.input_`

_CODE = "it takes Python code, which a spec cannot hold; write a program of your own with RLlib for that"
_OLD = "it belongs to RLlib's old API stack, and distml uses the new one"
REFUSED: dict[str, str] = {
    key: reason
    for reason, keys in (
        ("the environment stands in the key 'environment'", "env"),
        ("the environment's arguments stand in environment.args", "env_config"),
        ("the seed stands in the key 'seed'", "seed"),
        ("the algorithm stands in the key 'algorithm'", "algo_class"),
        ("the framework is always torch", "framework framework_str"),
        ("distml uses RLlib's new API stack", "enable_rl_module_and_learner enable_env_runner_and_connector_v2"),
        (
            "how a run is evaluated stands in evaluate.every and evaluate.episodes",
            "evaluation_interval evaluation_duration evaluation_duration_unit evaluation_config "
            "evaluation_num_env_runners evaluation_parallel_to_training evaluation_sample_timeout_s "
            "evaluation_force_reset_envs_before_iteration offline_evaluation_interval",
        ),
        (
            _CODE,
            "callbacks callbacks_class env_runner_cls learner_class learner_connector rl_module_spec "
            "env_to_module_connector module_to_env_connector custom_evaluation_function offline_data_class "
            "prelearner_class prelearner_buffer_class prelearner_buffer_kwargs policies policy_mapping_fn "
            "policies_to_train observation_fn observation_space action_space learner_config_dict "
            "before_learn_on_batch algorithm_config_overrides_per_module custom_stats_cls_lookup",
        ),
        (f"{_OLD}; use model_config", "model q_model_config policy_model_config"),
        (_OLD, "exploration_config optimizer sample_collector observation_filter"),
        (f"{_OLD}; use num_gpus_per_learner", "num_gpus"),
    )
    for key in keys.split()
}


class RLlibStopSpec(Block):
    """When the run ends: the first that is reached. At least one budget."""

    steps: Count | None = Field(None, description="training iterations of the algorithm")
    frames: Count | None = Field(None, description="environment steps, over all env runners")
    seconds: Positive | None = Field(None, description="of training, counted over resumes")
    goal: GoalSpec | None = None


class RLlibEvaluateSpec(Block):
    """Greedy episodes in environments of their own, on seeds that training never sees."""

    every: Count = Field(10, description="iterations between evaluations; there is always one at the end")
    episodes: Count = Field(10, description="per evaluation, all at once, each in an environment of its own")
    max_frames: Count = Field(27_000, description="of an episode: a longer one counts as it is then")


class RLlibCheckpointSpec(Block):
    every: Count = Field(10, description="iterations between checkpoints; there is always one at the end")
    keep: Count = Field(2, description="newest checkpoints that stay")
    best: BestSpec | None = Field(None, description="the checkpoint that is kept besides")


class RLlibLogSpec(LogSpec):
    every: Count = Field(1, description="iterations between reports")


class RLlibResourcesSpec(Block):
    cpus: Count | None = Field(
        None, description="logical CPUs of a private Ray; null: as many as the algorithm's processes reserve"
    )


class RLlibLimitsSpec(Block):
    start_s: Positive = Field(120.0, description="until the Ray cluster answers")
    lost_after_s: Positive = Field(300.0, description="of training without a new frame: env runners are taken for dead")


class RLlibSpec(Block):
    """A job that RLlib trains: algorithm x environment x stop."""

    distml: Literal["v1"]
    kind: Literal["rllib"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    algorithm: AlgorithmName
    environment: EnvironmentSpec
    config: dict[str, Any] = Field({}, description="the algorithm's own keys, as its builder methods name them")
    stop: RLlibStopSpec
    evaluate: RLlibEvaluateSpec = RLlibEvaluateSpec()
    checkpoint: RLlibCheckpointSpec = RLlibCheckpointSpec()
    log: RLlibLogSpec = RLlibLogSpec()
    resources: RLlibResourcesSpec = RLlibResourcesSpec()
    limits: RLlibLimitsSpec = RLlibLimitsSpec()
    storage: Storage = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @property
    def keys(self) -> dict[str, str]:
        """RLlib's keys for the algorithm: builder method and kinds of values of each."""
        return rllib_table.COMMON | rllib_table.ALGORITHMS[self.algorithm]

    @property
    def needs_msgpack(self) -> bool:
        """Whether RLlib writes or reads files of whole episodes."""
        writes = self.config.get("output") is not None and self.config.get("output_write_episodes", True)
        return bool(writes or self.config.get("input_read_episodes"))


# ---------------------------------------------------------------------------------------------------------------- rules
def check_rllib(job: RLlibSpec) -> Iterator[Problem]:
    """Every rule that the job breaks: those of `config`, and those across keys."""
    yield from _environment(job.environment)
    yield from _config(job)
    stop, goal = job.stop, job.stop.goal
    if stop.steps is None and stop.frames is None and stop.seconds is None:
        yield Problem("stop has no budget; set one of steps, frames, seconds", (("stop",),))
    if goal is not None and (goal.at_least is None) == (goal.at_most is None):
        found = "neither at_least nor at_most" if goal.at_least is None else "both at_least and at_most"
        yield Problem(f"stop.goal has {found}; give exactly one of them", (("stop", "goal"),))
    for block, path in ((goal, ("stop", "goal", "metric")), (job.checkpoint.best, ("checkpoint", "best", "metric"))):
        if block is not None and block.metric not in EVALUATED:
            hint = near(block.metric, EVALUATED) or EVALUATED[0]
            yield Problem(f"{dotted(path)}: an evaluation does not report {block.metric!r}; it reports "
                          f"{' and '.join(EVALUATED)}; did you mean {hint!r}?", (path, path[:-1]), "value")  # fmt: skip
    if job.seed and job.config.get("batch_mode") == "complete_episodes":
        yield Problem(
            f"seed {job.seed} would hold for evaluations alone: with config.batch_mode complete_episodes RLlib would "
            "begin every call in the same states, so it gets none; remove seed, or take batch_mode: truncate_episodes",
            (("seed",),),
        )
    if job.algorithm in OFFLINE:
        if stop.frames is not None:
            yield Problem(
                f"stop.frames counts environment steps, and {job.algorithm} learns from recorded episodes; "
                "set stop.steps or stop.seconds", (("stop", "frames"),),
            )  # fmt: skip
        if job.config.get("input_") is None:
            yield Problem(
                f"{job.algorithm} learns from recorded episodes; set config.input_, the folder that holds them",
                (("config",), ("algorithm",)),
            )


EVALUATED = ("eval/return_mean", "eval/episode_length_mean")


def _environment(environment: EnvironmentSpec) -> Iterator[Problem]:
    unknown = unknown_environment(environment.id)
    if unknown is not None:
        yield Problem(unknown, (("environment", "id"), ("environment",)), "value")
    for key, default in (("vectorization", "auto"), ("autoreset", None)):
        if getattr(environment, key) != default:
            yield Problem(
                f"environment.{key} is RLlib's to decide; remove it (config.num_envs_per_env_runner: how many)",
                (("environment", key),),
            )


def _config(job: RLlibSpec) -> Iterator[Problem]:
    for key, value in job.config.items():
        path: KeyPath = ("config", key)
        if key in REFUSED or key.startswith(("callbacks_", "on_")):
            yield Problem(f"config.{key} cannot be set: {REFUSED.get(key, _CODE)}", (path,))
        elif key not in job.keys:
            yield _unknown(path, job.keys, f"config of {job.algorithm}")
        else:
            yield from check_value(path, value, job.keys[key].split()[1:])
    model, buffer = job.config.get("model_config"), job.config.get("replay_buffer_config")
    if isinstance(model, dict):
        yield from _block(("config", "model_config"), model, rllib_table.MODEL)
    if isinstance(buffer, dict) and "replay_buffer_config" in job.keys:
        yield from _buffer(buffer)


def _block(path: KeyPath, block: dict[str, Any], known: dict[str, str]) -> Iterator[Problem]:
    for key, value in block.items():
        if key not in known:
            yield _unknown((*path, key), known, dotted(path))
        else:
            yield from check_value((*path, key), value, known[key].split())


def _buffer(buffer: dict[str, Any]) -> Iterator[Problem]:
    path: KeyPath = ("config", "replay_buffer_config")
    kinds = rllib_table.REPLAY_BUFFERS
    kind = buffer.get("type")
    if kind is None:
        yield Problem(f"the key 'type' is missing in {dotted(path)}; one of {', '.join(kinds)}", (path,), "value")
    elif kind not in kinds:
        hint = near(kind, kinds) if isinstance(kind, str) else None
        close = f"; did you mean {hint!r}?" if hint else ""
        yield Problem(f"{dotted(path)}.type must be one of {', '.join(kinds)}, got {describe(kind)}{close}",
                      ((*path, "type"),), "value")  # fmt: skip
    else:
        yield from (_unknown((*path, key), kinds[kind], dotted(path)) for key in buffer if key not in kinds[kind])


def _unknown(path: KeyPath, known: dict[str, str] | list[str], where: str) -> Problem:
    close = near(str(path[-1]), known)
    hint = f"did you mean {close!r}?" if close else f"RLlib has {len(known)} keys here, none of them like it"
    return Problem(f"unknown key {shorten(path[-1])} in {where}; {hint}", (path,))


# ---------------------------------------------------------------------------------------------------- recorded episodes
def find_recorded(job: RLlibSpec, directory: Path) -> tuple[RLlibSpec, list[Problem]]:
    """The job with local paths of recorded episodes and of recordings absolute, and those that are not there.

    Args:
        directory: where the spec lies: relative paths begin there, and the run directory's copy must mean the same.
    """
    config, problems = dict(job.config), []
    for key in ("input_", "output"):
        path = config.get(key)
        if isinstance(path, str) and "://" not in path:
            config[key] = str((directory / Path(path).expanduser()).resolve())
            if key == "input_" and not Path(config[key]).exists():
                text = f"config.input_: there is no {config[key]}; give the folder of recorded episodes"
                problems.append(Problem(text, (("config", "input_"),), "value"))
    return job.model_copy(update={"config": config}), problems
