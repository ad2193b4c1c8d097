"""The contenders of `distml bench rl`: our shipped jobs and the peers, each in processes of its own, one at a time."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distml.bench.contenders import EVERYWHERE, NEVER, ThisHost, run_all
from distml.bench.rl_kept import EVERY, Kept
from distml.errors import RunError
from distml.spec.loader import load_spec
from distml.spec.rl import ActingBlock, OnPolicyBlock
from distml.spec.schema import JobSpec
from distml.strategies.agenda import Agenda

START_S = 180.0
CLASSES = {"actor_critic": "KeepingActorCritic", "ppo": "KeepingPPO", "reinforce": "KeepingReinforce",
           "trpo": "KeepingTRPO"}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """Who trains.

    Attributes:
        label: in tables and pictures.
        frames: its budget; None: the shipped job's own.
        job: of ours, by name; None for a peer.
        peer: module of `rl_peers` and algorithm.
        package: what a peer needs that distml does not bring.
        workers: of ours; None: as many as the job has.
    """

    label: str
    frames: int | None = None
    job: str | None = None
    peer: tuple[str, str] | None = None
    package: str | None = None
    workers: int | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """How a contender is to train.

    Attributes:
        frames: budget; None: the contender's own.
        overrides: laid over the specs of our jobs.
        seed: of everything drawn.
    """

    frames: int | None = None
    overrides: tuple[str, ...] = ()
    seed: int = 1


@dataclass(frozen=True)
class Suite:
    """What is learned.

    Attributes:
        environment: Gymnasium's id.
        threshold: mean return at which it counts as solved.
        returns: what the curve shows.
        seeds: how many by default.
        contenders: by name.
        least_frames_per_s: a contender that is slower is ended.
    """

    environment: str
    threshold: float
    returns: str
    seeds: int
    contenders: Mapping[str, Contender]
    least_frames_per_s: float = 200.0


def sb3(algorithm: str, environments: int, frames: int) -> Contender:
    """A contender of Stable-Baselines3."""
    label = f"SB3 {algorithm.upper()}, {environments} envs"
    return Contender(label, frames, peer=("sb3", algorithm), package="stable_baselines3")


def rllib(algorithm: str, frames: int) -> Contender:
    """A contender of RLlib."""
    return Contender(f"RLlib {algorithm.upper()}, 2 x 8 envs", frames, peer=("rllib", algorithm))


OWN_POLICY = "task.policy={name: 'distml.bench.rl_own:ActorAndCritic'}"
OWN_RATES = "optimizer.groups=[{match: 'module.value.*', lr: 5.0e-3}]"  # as the job's, under the module's names
GREEDY = "mean return of 20 greedy episodes"
SUITES = {
    "cartpole": Suite("CartPole-v1", 475.0, GREEDY, 3, {
        "a3c": Contender("distml A3C", job="a3c-cartpole"),
        "a2c": Contender("distml A2C", job="a2c-cartpole"),
        "ppo": Contender("distml PPO", job="ppo-cartpole"),
        "trpo": Contender("distml TRPO", job="trpo-cartpole"),
        "reinforce": Contender("distml REINFORCE", job="reinforce-cartpole"),
        "a3c_own": Contender("distml A3C, own nn.Module", job="a3c-cartpole", overrides=(OWN_POLICY, OWN_RATES)),
        "sb3_a2c": sb3("a2c", 16, 400_000),
        "sb3_ppo": sb3("ppo", 8, 200_000),
        "rllib_impala": rllib("impala", 400_000),
        "rllib_ppo": rllib("ppo", 200_000),
    }),
    "pendulum": Suite("Pendulum-v1", -250.0, GREEDY, 3, {
        "ppo": Contender("distml PPO", job="ppo-pendulum"),
        "sb3_ppo": sb3("ppo", 4, 300_000),
    }),
    "pong": Suite("ALE/Pong-v5", 18.0, "mean return of the last 100 training episodes", 1, {
        "a3c": Contender("distml A3C", 100_000, job="a3c-pong"),
        "sb3_a2c": sb3("a2c", 16, 100_000),
    }, least_frames_per_s=30.0),
}  # fmt: skip


def missing(contender: Contender) -> str | None:
    """What has to be installed first, or None."""
    if contender.package is None or importlib.util.find_spec(contender.package) is not None:
        return None
    return f"needs {contender.package}, which is not installed; install distml[bench]"


def train(suite: Suite, contender: Contender, ask: Ask, folder: Path) -> Kept:
    """Run a contender to its end; what it has kept.

    Args:
        suite: what is learned.
        contender: who trains.
        ask: how.
        folder: for its files.

    Raises:
        UsageError: its job does not exist, or cannot have this many workers.
        RunError: one of its processes failed, took too long, or kept too little.
    """
    path, frames = folder / "kept.npz", ask.frames or contender.frames
    if contender.job is not None:
        spec, frames = write_spec(contender, ask, path)
        arguments = ["-m", "distml", "run", str(spec), "--out", str(folder / "run"), "--runtime", "ray"]
    else:
        assert contender.peer is not None
        module, algorithm = contender.peer
        config = {"algorithm": algorithm, "environment": suite.environment, "frames": frames, "seed": ask.seed,
                  "every": EVERY, "path": str(path), "atari": atari(suite)}  # fmt: skip
        arguments = ["-m", f"distml.bench.rl_peers.{module}", json.dumps(config)]
    assert frames is not None
    limit_s = START_S + frames / suite.least_frames_per_s
    run_all([(ThisHost(), arguments)], EVERYWHERE, folder, limit_s)
    kept = Kept.load(path) if path.exists() else None
    if kept is None or len(kept.frames) < 2:
        raise RunError(f"{contender.label} kept its weights less than twice; give at least {2 * EVERY} frames",
                       phase="bench")  # fmt: skip
    return kept


def atari(suite: Suite) -> dict[str, Any] | None:
    """Id and arguments of our job's environment, so that a peer's images are made alike; None: it has no images."""
    if not suite.environment.startswith("ALE/"):
        return None
    block = load_spec(str(suite.contenders["a3c"].job)).job.task
    assert isinstance(block, ActingBlock)
    return {"id": block.environment.id, **block.environment.args}


def write_spec(contender: Contender, ask: Ask, path: Path) -> tuple[Path, int]:
    """The shipped job with a task that keeps its weights, in the folder of `path`; and how many frames it takes.

    Nothing else differs but the overrides, the budget, the seed, and that it neither evaluates nor writes checkpoints
    on the way. Only where observations are normalised its (empty) evaluations stay, because workers' statistics are
    merged at them.
    """
    overrides = [*contender.overrides, *ask.overrides, f"seed={ask.seed}"]
    if contender.workers is not None:
        overrides.append(f"resources.workers={contender.workers}")
    if frames := ask.frames or contender.frames:
        overrides.append(f"stop.frames={frames}")
    job = load_spec(str(contender.job), overrides).job
    assert isinstance(job, JobSpec)
    assert isinstance(job.task, OnPolicyBlock)
    assert job.stop.frames is not None
    document = json.loads(job.model_dump_json(by_alias=True))
    args = {"block": document["task"], "path": str(path), "every": EVERY, "max_failures": job.limits.max_restarts}
    document["task"] = {"name": f"distml.bench.rl_task:{CLASSES[job.task.name]}", "args": args}
    document["stop"] = budget(job)
    document["checkpoint"] = {"every": NEVER}
    if not job.task.normalise.observations:
        document["evaluate"] = {"every": NEVER}
    spec = path.with_name("spec.yaml")
    spec.write_text(yaml.safe_dump(document), encoding="utf-8")
    return spec, job.stop.frames


def budget(job: JobSpec) -> dict[str, int]:
    """The stop of a job whose schedules are to end where those of `job` do: in steps, where they are known."""
    assert job.stop.frames is not None
    updates_per_round = 1 if job.strategy.is_synchronous else job.resources.workers
    steps = Agenda(job, updates_per_round=updates_per_round).budget_steps
    return {"frames": job.stop.frames} if steps is None else {"steps": steps}
