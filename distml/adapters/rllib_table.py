"""Writes `distml/spec/rllib_table.py`: which config keys each RLlib algorithm has, read off the installed RLlib.

RLlib's configs take any key from a dict and forget it; their builder methods (`config.training(lr=…)`) have signatures.
The table holds these, so that a spec is checked, with line and column, without importing ray. A test compares the table
with what `table()` says, and this module's `EXCLUDED` with what is left over.

    python -m distml.adapters.rllib_table        rewrites the file, for another version of RLlib
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.registry import ALGORITHMS
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.utils import replay_buffers
from ray.rllib.utils.from_config import NotProvided

Keys = dict[str, str]
INNER = {"COMMON": "str", "ALGORITHMS": "dict[str, str]", "MODEL": "str", "REPLAY_BUFFERS": "list[str]"}

METHODS = (
    "resources", "framework", "environment", "env_runners", "learners", "training", "offline_data", "rl_module",
    "reporting", "debugging", "fault_tolerance",
)  # fmt: skip
EXCLUDED = {
    # what a spec says elsewhere
    "env", "env_config", "seed", "framework",
    # code, by its class or function
    "env_runner_cls", "learner_class", "learner_connector", "env_to_module_connector", "module_to_env_connector",
    "sample_collector", "rl_module_spec", "offline_data_class", "prelearner_class", "prelearner_buffer_class",
    "prelearner_buffer_kwargs", "before_learn_on_batch", "custom_stats_cls_lookup", "observation_space",
    "action_space", "learner_config_dict",
    # several agents, which need a function that maps them to policies
    "algorithm_config_overrides_per_module",
    # TensorFlow, the old API stack, tests of RLlib's own
    "eager_tracing", "eager_max_retraces", "tf_session_args", "local_tf_session_args", "enable_tf1_exec_eagerly",
    "model", "optimizer", "exploration_config", "q_model_config", "policy_model_config", "num_gpus",
    "preprocessor_pref", "observation_filter", "sampler_perf_stats_ema_coef", "remote_worker_envs",
    "remote_env_batch_wait_ms",
    "use_worker_filter_stats", "update_worker_filter_stats", "create_env_on_local_worker", "input_config",
    "output_config", "fake_sampler", "optimization_config", "is_atari", "opt_type",
    "torch_ddp_kwargs", "input_filesystem_kwargs", "output_filesystem_kwargs", "render_env",
}  # fmt: skip


def table() -> dict[str, Any]:
    """The table's constants by name."""
    algorithms = {name: entry()[1] for name, entry in sorted(ALGORITHMS.items())}
    base = AlgorithmConfig()
    common = {key: value for method in METHODS for key, value in _parameters(type(base), method, base).items()}
    own = {
        name: {
            key: value
            for method in METHODS
            for above in type(config).__mro__
            if method in vars(above)
            for key, value in _parameters(above, method, config).items()
            if common.get(key) != value
        }
        for name, config in algorithms.items()
    }
    return {
        "COMMON": dict(sorted(common.items())),
        "ALGORITHMS": {name: dict(sorted(keys.items())) for name, keys in own.items()},
        "MODEL": {field.name: _kinds(field.type, _default(field)) for field in dataclasses.fields(DefaultModelConfig)},
        "REPLAY_BUFFERS": _replay_buffers(),
    }


def leftover() -> set[str]:
    """Parameters of RLlib's builder methods that the table leaves out."""
    configs = [entry()[1] for entry in ALGORITHMS.values()]
    everything = {
        name
        for config in configs
        for above in type(config).__mro__
        for method in METHODS
        if method in vars(above)
        for name, parameter in inspect.signature(vars(above)[method]).parameters.items()
        if _is_current(parameter)
    }
    told = table()
    return everything - set(told["COMMON"]) - {key for keys in told["ALGORITHMS"].values() for key in keys}


def _parameters(owner: type, method: str, config: AlgorithmConfig) -> Keys:
    """`method kind kind …` of each parameter of a builder method."""
    found = {}
    for name, parameter in inspect.signature(getattr(owner, method)).parameters.items():
        if _is_current(parameter) and name not in EXCLUDED:
            default = vars(config).get(name)
            found[name] = f"{method} {_kinds(parameter.annotation, default, schedule=method == 'training')}"
    return found


def _is_current(parameter: inspect.Parameter) -> bool:
    is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return is_named and not parameter.name.startswith("_") and parameter.default is NotProvided


def _kinds(annotation: Any, default: Any, *, schedule: bool = False) -> str:
    """The kinds of YAML values that a parameter takes; null, which is always one, is not named.

    RLlib's annotations are not exact: the default's own kind counts too, and in `training` a schedule is a list that
    stands for a float.
    """
    kinds = set(_annotated(annotation))
    for kind in (bool, int, float, str, list, dict):
        if type(default) is kind:
            kinds.add(kind.__name__)
    if "float" in kinds:
        kinds |= {"int", "list"} if schedule else {"int"}
    return " ".join(sorted(kinds)) or "any"


def _annotated(annotation: Any) -> Iterable[str]:
    origin = typing.get_origin(annotation)
    if annotation in (bool, int, float, str, dict, list):
        yield annotation.__name__
    elif origin in (list, tuple):
        yield "list"
    elif origin is dict:
        yield "dict"
    elif origin is typing.Union:
        for inner in typing.get_args(annotation):
            yield from _annotated(inner)


def _default(field: dataclasses.Field[Any]) -> Any:
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def _replay_buffers() -> dict[str, list[str]]:
    """The keys of `replay_buffer_config` for each buffer of episodes: arguments, and what RLlib's defaults have."""
    defaults = [vars(entry()[1]).get("replay_buffer_config") for entry in ALGORITHMS.values()]
    buffers = {}
    for name in ("EpisodeReplayBuffer", "PrioritizedEpisodeReplayBuffer"):
        found = {key for default in defaults if default and default["type"] == name for key in default}
        for above in getattr(replay_buffers, name).__mro__:
            if "__init__" in vars(above) and above is not object:
                names = inspect.signature(above.__init__).parameters
                found |= {name for name in names if name not in ("self", "args", "kwargs")}
        buffers[name] = sorted(found)
    return buffers


HEADER = """\"\"\"RLlib's config keys: written by `python -m distml.adapters.rllib_table`, not by hand.

A key's text is the builder method that takes it and the kinds of YAML values it may have; null is always one. MODEL and
REPLAY_BUFFERS are the keys of `model_config` and of `replay_buffer_config`.
\"\"\"
"""


def source() -> str:
    """The table's file, before it is formatted."""
    constants = [f"{name}: dict[str, {INNER[name]}] = {json.dumps(value, indent=4)}" for name, value in table().items()]
    return "\n".join([HEADER, *constants, ""])


if __name__ == "__main__":
    (Path(__file__).parents[1] / "spec" / "rllib_table.py").write_text(source(), encoding="utf-8")
