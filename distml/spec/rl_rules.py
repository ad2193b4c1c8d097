"""What tasks that act add to the rules: batches that follow from environments and steps, and pairs that cannot work."""

from __future__ import annotations

from collections.abc import Iterator

from distml.spec.base import Block
from distml.spec.environments import unknown_environment
from distml.spec.messages import Problem
from distml.spec.rl import (
    ActingBlock,
    ActorCriticSpec,
    OnPolicyBlock,
    OwnPolicySpec,
    PPOSpec,
    RecurrentPolicySpec,
    ReinforceSpec,
    RolloutBlock,
    TRPOSpec,
)
from distml.spec.schema import JobSpec, SGDSpec
from distml.spec.tabular import BanditSpec, TabularBlock

CHECKPOINT_EVERY = 10_000  # steps, where nothing is said: all environments begin anew at each checkpoint
STEPS = (("task", "n_steps"), ("batch_size",), ("task", "envs_per_worker"))


def follows_workers(job: Block) -> bool:
    """Whether `batch_size` is nothing but a multiple of the number of workers, for an unchanged task."""
    return isinstance(job, JobSpec) and isinstance(job.task, RolloutBlock | TabularBlock | ReinforceSpec)


def complete(job: JobSpec, batch_given: bool) -> tuple[JobSpec, list[Problem]]:
    """The job with what follows from other keys: of `batch_size` and `n_steps` one, and `checkpoint.every`.

    Args:
        job: valid key by key.
        batch_given: whether its `batch_size` was written, or is the schema's default.

    Returns:
        The job, and what is wrong with it.
    """
    if isinstance(job.task, ActingBlock) and "every" not in job.checkpoint.model_fields_set:
        every = -(-CHECKPOINT_EVERY // updates_per_rollout(job.task)) * updates_per_rollout(job.task)
        job = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"every": every})})
    return _batches(job, batch_given)


def updates_per_rollout(task: ActingBlock) -> int:
    """How many updates learn from the same frames, unless a bound ends them early."""
    if isinstance(task, PPOSpec):
        return task.epochs * task.minibatches
    return task.epochs if isinstance(task, ReinforceSpec) else 1


def _batches(job: JobSpec, batch_given: bool) -> tuple[JobSpec, list[Problem]]:
    task, workers = job.task, job.resources.workers
    if isinstance(task, ReinforceSpec):
        return _episodes(job, task, batch_given)
    if isinstance(task, BanditSpec):
        return _runs(job, task, batch_given)
    if not isinstance(task, RolloutBlock | TabularBlock):
        return job, []
    envs, pieces = workers * task.envs_per_worker, task.num_minibatches
    what = f"workers {workers} x envs_per_worker {task.envs_per_worker}"
    if task.n_steps is None and batch_given:
        if job.batch_size * pieces % envs:
            return job, [Problem(
                f"batch_size {job.batch_size}{_times(pieces)} is not a multiple of {what} = {envs}; "
                "change it, or give task.n_steps and leave batch_size out", STEPS)]  # fmt: skip
        task = task.model_copy(update={"n_steps": job.batch_size * pieces // envs})
        return job.model_copy(update={"task": task}), []
    if task.n_steps is None:
        task = task.model_copy(update={"n_steps": task.default_n_steps})
    assert task.n_steps is not None
    rows = envs * task.n_steps
    if rows % pieces:
        return job, [Problem(
            f"{what} x n_steps {task.n_steps} = {rows} frames cannot be cut into {pieces} minibatches of equal size; "
            "change task.minibatches or task.n_steps", (("task", "minibatches"), *STEPS))]  # fmt: skip
    if batch_given and job.batch_size != rows // pieces:
        return job, [Problem(
            f"batch_size {job.batch_size} is not {what} x n_steps {task.n_steps}{_over(pieces)} = {rows // pieces}; "
            f"leave batch_size out, set it to {rows // pieces}, or change another of them", STEPS)]  # fmt: skip
    return job.model_copy(update={"task": task, "batch_size": rows // pieces}), []


def _times(pieces: int) -> str:
    return f" x minibatches {pieces}" if pieces > 1 else ""


def _over(pieces: int) -> str:
    return f" / minibatches {pieces}" if pieces > 1 else ""


def _episodes(job: JobSpec, task: ReinforceSpec, batch_given: bool) -> tuple[JobSpec, list[Problem]]:
    episodes = job.resources.workers * task.envs_per_worker
    if batch_given and job.batch_size != episodes:
        return job, [Problem(
            f"batch_size {job.batch_size} is not workers {job.resources.workers} x envs_per_worker "
            f"{task.envs_per_worker} = {episodes} episodes; leave batch_size out, set it to {episodes}, or change "
            "another of them",
            (("batch_size",), ("task", "envs_per_worker")))]  # fmt: skip
    return job.model_copy(update={"batch_size": episodes}), []


def _runs(job: JobSpec, task: BanditSpec, batch_given: bool) -> tuple[JobSpec, list[Problem]]:
    if batch_given and job.batch_size != task.runs:
        return job, [Problem(
            f"batch_size {job.batch_size} is not task.runs {task.runs}, of which every step plays all; "
            "leave batch_size out, or change one of them", (("batch_size",), ("task", "runs")))]  # fmt: skip
    return job.model_copy(update={"batch_size": task.runs}), []


def check_acting(job: JobSpec, task: ActingBlock) -> Iterator[Problem]:
    """Every rule that a job whose task acts breaks."""
    if job.precision != "fp32":
        yield Problem(
            f"precision {job.precision} is not for tasks that act, whose small models it would slow down; set fp32",
            (("precision",),),
        )
    unknown = unknown_environment(task.environment.id)
    if unknown is not None:
        yield Problem(unknown, (("task", "environment", "id"), ("task", "environment")), "value")
    yield from _checkpoints(job, task)
    yield from _wrappers(task)
    if isinstance(task, OnPolicyBlock):
        yield from _policy(task)
    if isinstance(task, RolloutBlock) and isinstance(task.policy, RecurrentPolicySpec):
        yield from _same_step(task, task.policy)
    if isinstance(task, ActorCriticSpec):
        yield from _actor_critic(job, task)
    if isinstance(task, PPOSpec):
        yield from _minibatches(task)
    if isinstance(task, TRPOSpec):
        yield from _trpo(job, task)
    if isinstance(task, ReinforceSpec):
        yield from _reinforce(task)


def _checkpoints(job: JobSpec, task: ActingBlock) -> Iterator[Problem]:
    """Environments begin anew at a checkpoint, and with them what is left of a rollout is gone."""
    updates, every = updates_per_rollout(task), job.checkpoint.every
    ends_early = isinstance(task, PPOSpec) and task.target_kl is not None
    if every % updates and job.strategy.is_synchronous and not ends_early:
        what = f"epochs x minibatches = {updates}" if isinstance(task, PPOSpec) else f"epochs {updates}"
        yield Problem(
            f"checkpoint.every {every} is not a multiple of {what}, so that each checkpoint would drop the rest of a "
            f"rollout; set it to {every + -every % updates}",
            (("checkpoint", "every"), ("checkpoint",)),
        )


NORMALISING = {"NormalizeObservation": "observations", "NormalizeReward": "rewards"}


def _wrappers(task: ActingBlock) -> Iterator[Problem]:
    """Wrappers act in evaluations too, and their statistics are in no checkpoint and no other worker."""
    for index, wrapper in enumerate(task.environment.wrappers):
        if wrapper.name in NORMALISING:
            instead = f"; set task.normalise: {{{NORMALISING[wrapper.name]}: true}}"
            yield Problem(
                f"wrapper {wrapper.name} keeps statistics that no checkpoint has, and scores would not be the "
                f"environment's; remove it{instead if isinstance(task, OnPolicyBlock) else ''}",
                (("task", "environment", "wrappers", index), ("task", "environment", "wrappers")),
                "value",
            )


def _same_step(task: RolloutBlock, policy: RecurrentPolicySpec) -> Iterator[Problem]:
    if task.environment.autoreset == "same_step":
        yield Problem(
            f"policy {policy.name} has a memory, and with autoreset same_step it cannot judge an episode's last "
            "observation; set task.environment.autoreset: next_step",
            (("task", "environment", "autoreset"),),
        )


def _policy(task: OnPolicyBlock) -> Iterator[Problem]:
    policy = task.policy
    lists = [getattr(policy, key, None) for key in ("channels", "kernels", "strides")]
    if all(lists) and len({len(entries) for entries in lists if entries}) > 1:
        sizes = ", ".join(f"{key} {len(entries or [])}" for key, entries in
                          zip(("channels", "kernels", "strides"), lists, strict=True))  # fmt: skip
        yield Problem(f"a CNN needs one kernel and stride per layer, their numbers differ: {sizes}",
                      (("task", "policy", "channels"), ("task", "policy")))  # fmt: skip


def _actor_critic(job: JobSpec, task: ActorCriticSpec) -> Iterator[Problem]:
    if task.normalise_advantages and job.micro_batch_size is not None:
        yield Problem(
            f"task.normalise_advantages is over a worker's rollout, which micro_batch_size {job.micro_batch_size} cuts "
            "into pieces; remove one of them",
            (("micro_batch_size",), ("task", "normalise_advantages")),
        )


def _minibatches(task: PPOSpec) -> Iterator[Problem]:
    # An environment never begins anew twice in a row, so at least every other row of a rollout is no dummy.
    fewest = task.envs_per_worker * ((task.n_steps or 0) // 2)
    if task.n_steps is not None and task.environment.autoreset != "same_step" and fewest < task.minibatches:
        yield Problem(
            f"where environments begin anew nothing is learned, so envs_per_worker {task.envs_per_worker} x n_steps "
            f"{task.n_steps} may leave as few as {fewest} rows for minibatches {task.minibatches}; raise task.n_steps "
            "or lower task.minibatches",
            (("task", "minibatches"), ("task", "n_steps"), ("task", "envs_per_worker")),
        )
    if isinstance(task.policy, RecurrentPolicySpec) and task.envs_per_worker % task.minibatches:
        yield Problem(
            f"a recurrent policy's minibatches are whole environments: envs_per_worker {task.envs_per_worker} is not a "
            f"multiple of minibatches {task.minibatches}; change one of them",
            (("task", "minibatches"), ("task", "envs_per_worker")),
        )


def _trpo(job: JobSpec, task: TRPOSpec) -> Iterator[Problem]:
    if not _takes_whole_steps(job):
        yield Problem(
            "task trpo finds its steps itself, any other rule would change them; "
            "set optimizer: {name: sgd, lr: 1.0} and nothing else in it",
            (("optimizer",), ("task", "name")),
        )
    if job.micro_batch_size is not None:
        yield Problem(
            f"task trpo searches along one step for its whole batch, micro_batch_size is {job.micro_batch_size}; "
            "remove it",
            (("micro_batch_size",),),
        )
    if getattr(job.strategy, "compression", None) is not None:
        yield Problem(
            "task trpo bounds each step as it is, and compressed ones would be others; remove strategy.compression",
            (("strategy", "compression"),),
        )
    if not isinstance(task.policy, OwnPolicySpec) and task.policy.trunk != "separate":
        yield Problem(
            "task trpo bounds the change of the policy alone, so the critic must not share its layers; "
            "set task.policy.trunk: separate",
            (("task", "policy", "trunk"), ("task", "policy")),
        )


def _takes_whole_steps(job: JobSpec) -> bool:
    """Whether an update subtracts the mean gradient as it is."""
    optimizer = job.optimizer
    plain = isinstance(optimizer, SGDSpec) and optimizer.lr == 1.0 and not optimizer.groups
    rest = (optimizer.weight_decay, optimizer.clip_norm, getattr(optimizer, "momentum", 0), optimizer.schedule.warmup)
    return plain and not any(rest) and optimizer.schedule.name == "constant"


def check_bandit(job: JobSpec, task: BanditSpec) -> Iterator[Problem]:
    """Every rule that a job of the bandit testbed breaks."""
    if not _takes_whole_steps(job):
        yield Problem(
            "task bandit learns sample averages, any other rule would change them; "
            "set optimizer: {name: sgd, lr: 1.0} and nothing else in it",
            (("optimizer",), ("task", "name")),
        )
    if getattr(job.strategy, "compression", None) is not None:
        yield Problem(
            "task bandit learns sample averages, and compressed gradients would round them; "
            "remove strategy.compression",
            (("strategy", "compression"),),
        )
    twice = [epsilon for index, epsilon in enumerate(task.epsilons) if epsilon in task.epsilons[:index]]
    if twice:
        yield Problem(f"task.epsilons has {twice[0]:g} twice, which is one metric; keep one", (("task", "epsilons"),))
    if job.precision != "fp32":
        yield Problem(f"precision {job.precision} would round the sample averages; set fp32", (("precision",),))
    if job.stop.epochs is not None:
        yield Problem("stop.epochs needs a dataset, and task bandit plays; set stop.steps", (("stop", "epochs"),))


def _reinforce(task: ReinforceSpec) -> Iterator[Problem]:
    if task.epochs > 1 and not task.importance_weighting:
        yield Problem(
            f"task.epochs {task.epochs} uses episodes of an older policy; set importance_weighting: true or epochs: 1",
            (("task", "epochs"),),
        )
    if task.baseline == "optimal" and isinstance(task.policy, RecurrentPolicySpec):
        yield Problem(
            f"task.baseline optimal needs the gradient of every single step, which policy {task.policy.name} does not "
            "have; take baseline: learned",
            (("task", "baseline"),),
        )
    # A setting that nothing reads would look as if it did something.
    for key, reader, is_read in (
        ("decay", "baseline: moving_average", task.baseline == "moving_average"),
        ("value_coefficient", "baseline: learned", task.baseline == "learned"),
        ("max_weight", "importance_weighting: true", task.importance_weighting),
    ):
        value = getattr(task, key)
        if not is_read and value != ReinforceSpec.model_fields[key].default:
            yield Problem(f"task.{key} {value:g} is for {reader}; remove it, or set that", (("task", key),))
