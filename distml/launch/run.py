"""`distml run`: from a spec to a finished run directory, in the terminal or from Python.

No torch here, and ray only through the runtime: what is wrong with a spec is said before either is imported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distml.errors import ExitCode, RunError, UsageError
from distml.inject import Injection
from distml.launch import hf
from distml.launch.plan.command import memory_advice
from distml.launch.plan.over import over_line, unused_line
from distml.launch.plan.running import plan_of_run
from distml.launch.plan.text import key_lines
from distml.launch.submit.remote import IN_JOB, run_name, runs_root
from distml.population.context import OverContext, OverRun, forget, has_begun, has_trained
from distml.runs.checkpoints import CheckpointStore, resolve_source
from distml.runs.directory import Result as ResultRecord
from distml.runs.directory import RunDirectory
from distml.runs.display import Display, SilentDisplay, make_display
from distml.runs.storage import check_reachable
from distml.runs.stored import opened, place_of
from distml.runtime.driver import Driver
from distml.runtime.endings import StopSignals
from distml.runtime.group import WorkerGroup
from distml.spec.base import Block
from distml.spec.deepspeed import notes
from distml.spec.language_rules import RUN_TOKENIZER, TextTaskSpecs
from distml.spec.loader import LoadedSpec, load_spec
from distml.spec.nas import NasSpec
from distml.spec.over_jobs import OverJobs
from distml.spec.placement_rules import why_not_inline
from distml.spec.population import PopulationSpec
from distml.spec.rl_rules import follows_workers
from distml.spec.rllib import RLlibSpec
from distml.spec.schema import JobSpec
from distml.spec.storage import folder_of
from distml.spec.sweep import SweepSpec
from distml.tasks.text import open_text, pinned
from distml.tasks.tokens import TOKENIZER

if TYPE_CHECKING:
    from torch import nn

    from distml.adapters.rllib import RLlibRun
    from distml.tasks.sources import SourceTree

MAY_CHANGE = ("stop", "evaluate", "checkpoint", "log", "limits", "resources", "transport", "strategy", "inline",
              "storage")  # fmt: skip
OVER_MAY_CHANGE = ("stop", "checkpoint", "limits", "max_concurrent", "trials", "retries", "storage")
STOPPED_COPY_S = 40.0  # of the 60 s that a job has from SIGTERM to SIGKILL
BUDGETS = ("steps", "examples", "epochs", "frames", "tokens", "seconds")
EXIT_CODES = {"done": ExitCode.DONE, "goal_met": ExitCode.DONE, "goal_missed": ExitCode.GOAL_MISSED,
              "interrupted": ExitCode.INTERRUPTED, "failed": ExitCode.FAILED}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        status: `done`, `goal_met`, `goal_missed` or `interrupted`.
        step: version of the weights.
        metrics: the last value of each metric.
        directory: the run directory.
    """

    status: str
    step: int
    wall_s: float
    metrics: dict[str, Any]
    best: dict[str, Any] | None
    directory: Path

    @property
    def exit_code(self) -> int:
        """What `distml run` exits with for this status."""
        return int(EXIT_CODES[self.status])

    def model(self) -> nn.Module:
        """The trained model: the best checkpoint's weights, without `checkpoint.best` the last one's."""
        from distml.launch.evaluate import load_model

        return load_model(self.directory).model


def run(
    spec: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, object] | Sequence[str] = (),
    *,
    out: str | os.PathLike[str] | None = None,
    runtime: str | None = None,
    address: str | None = None,
    fresh: bool = False,
    inject: Sequence[str] = (),
    display: Display | None = None,
) -> Result:
    """Run a job to its end.

    Args:
        spec: a file, a shipped job's name, or the spec as a dict.
        overrides: dotted keys and values.
        out: the run directory; `runs/NAME` by default, in a Ray job `~/distml-runs/NAME`, with a folder as `storage`
            STORAGE/NAME. An unfinished run there, or in the storage, is resumed.
        runtime: `inline` or `ray`; by default inline for one worker.
        address: of a running Ray cluster.
        fresh: move what is in `out` to `out.1` first.
        inject: failures to cause, for example `kill:rank=1,step=50`.
        display: where progress goes; nowhere by default.

    Raises:
        UsageError: what the spec, files, arguments or resources explain.
        RunError: the run failed later.
    """
    started = time.perf_counter()
    loaded = with_pinned_text(load_spec(spec, overrides))
    job = loaded.job
    if isinstance(job, OverJobs):
        where = runtime or "ray"
        check_over_arguments(job, where, address, inject)
    elif isinstance(job, RLlibSpec):
        where = "ray"
        check_rllib_arguments(runtime, inject)
    else:
        alone = job.resources.workers == 1 and why_not_inline(job) is None
        where = runtime or ("inline" if alone else "ray")
        check_injections(inject, job, where)
    if job.storage is not None:
        check_reachable(job.storage)
    path = Path(out) if out is not None else (folder_of(job.storage) or runs_root()) / run_name(job.name)
    place = place_of(job.storage, run_name(job.name), path)
    display = display or SilentDisplay()
    stop_s = STOPPED_COPY_S if IN_JOB in os.environ else None
    signals = StopSignals()  # around the driver's: before and after it a storage is held, too
    with signals.handled(), opened(path, place, fresh, display.note, end_this_run, stop_s) as (directory, mirror):
        earlier = directory.result.read()
        resume = check_resume(directory, loaded, earlier, display)
        if resume is None and earlier is not None:
            display.note(
                f"already finished: {earlier.status} at step {earlier.step}; nothing was run (--fresh runs anew)"
            )
            return as_result(earlier, path)
        sources = prepare_directory(directory, loaded, bool(resume), display)
        if where == "ray":
            probe_nodes(job, directory, address)
            signals.take()
        if mirror is not None:  # not before: a run that is refused is not copied
            mirror.start()
        if isinstance(job, RLlibSpec):
            return drive_rllib(job, directory, sources, address, display, started, bool(resume))
        if isinstance(job, OverJobs):
            return drive_over(OverContext(loaded, directory, sources, where, address, display, started, tuple(inject)),
                              bool(resume))  # fmt: skip
        group = make_group(loaded, sources, where, address, directory.path, tuple(inject))
        driver = Driver(job, directory, group, display, started, functools.partial(memory_advice, loaded))
        return drive(driver, bool(resume), where)


def probe_nodes(job: JobSpec | OverJobs | RLlibSpec, directory: RunDirectory, address: str | None) -> None:
    """Refuse a storage, or a run directory that trials write into, that a node of the cluster does not see."""
    if job.storage is None and not isinstance(job, SweepSpec):
        return
    from distml.runtime.authentication import prepare_authentication

    prepare_authentication(address)
    from distml.runtime.probing import check_directory, check_nodes

    if job.storage is not None:
        check_nodes(job.storage, address, directory.logs, job.limits.start_s)
    if isinstance(job, SweepSpec):
        check_directory(directory.path, address, directory.logs, job.limits.start_s)


def end_this_run() -> None:
    """As a SIGTERM from outside would, where it does not simply kill: another driver has taken the storage."""
    if callable(signal.getsignal(signal.SIGTERM)):
        os.kill(os.getpid(), signal.SIGTERM)


def drive(driver: Driver, resume: bool, runtime: str) -> Result:
    """Build, train, and record the end, whatever it is."""

    def train() -> None:
        driver.build(lambda: start_weights(driver.job), resume)
        announce(driver, runtime)
        driver.train()

    return _to_the_end(driver, train)


def drive_rllib(
    job: RLlibSpec, directory: RunDirectory, sources: SourceTree, address: str | None, display: Display, started: float,
    resume: bool,
) -> Result:  # fmt: skip
    """The same for a job that RLlib trains."""
    from distml.runtime.authentication import prepare_authentication

    prepare_authentication(address)
    from distml.adapters.rllib import RLlibRun

    one = RLlibRun(job, directory, sources, address, display, started)

    def train() -> None:
        one.build(resume)
        directory.write_environment(environment("ray", "RLlib's own", [socket.gethostname()]))
        display.start(f"{job.algorithm} of RLlib on {job.environment.id}")
        if one.start_step:
            display.note(f"resuming from step {one.start_step}")
        one.train()

    return _to_the_end(one, train)


def drive_over(context: OverContext, resume: bool) -> Result:
    """The same for a job over jobs."""
    if context.where == "ray":
        from distml.runtime.authentication import prepare_authentication

        prepare_authentication(context.address)
    job = context.loaded.job
    one: OverRun
    if isinstance(job, PopulationSpec):
        from distml.population.run import PopulationRun

        one = PopulationRun(context)
    elif isinstance(job, SweepSpec):
        from distml.adapters.tune import SweepRun

        one = SweepRun(context)
    else:
        from distml.population.search import SearchRun

        one = SearchRun(context)

    def train() -> None:
        if not resume:
            forget(context.directory)
        one.build(resume)
        for line in (over_line(job), unused_line(job)):
            if line is not None:
                context.display.note(line)
        transport = "members in one process (inline)" if context.where == "inline" else "members on Ray"
        context.directory.write_environment(environment(context.where, transport, one.hosts))
        one.train()

    return _to_the_end(one, train)


def _to_the_end(driver: Driver | RLlibRun | OverRun, train: Callable[[], None]) -> Result:
    """Run `train` under the driver's signals, and record how it ended."""
    directory, display = driver.directory, driver.display
    try:
        with driver.signals.handled():
            train()
    except KeyboardInterrupt as error:
        driver.fail(error)
    except BaseException as error:
        driver.fail(error)
        display.close()
        raise
    finally:
        driver.close()
    record = directory.result.read()
    assert record is not None
    result = as_result(record, directory.path)
    display.finish(closing_lines(result))
    display.close()
    return result


def announce(driver: Driver, runtime: str) -> None:
    """Say and record what will run."""
    job, description = driver.job, driver.description
    facts = environment(runtime, description.transport, description.hosts)
    workers = f"{job.resources.workers} worker{'s' if job.resources.workers > 1 else ''}"
    if driver.elastic is not None and runtime == "ray":
        facts["workers"] = {**driver.elastic.model_dump(), "start": job.resources.workers}
        workers += f" ({driver.elastic.min} to {driver.elastic.max})"
    driver.directory.write_environment(facts)
    elements = sum(entry.numel for entry in description.layout.entries)
    driver.display.start(f"{elements:,} parameters, {job.strategy.label}, {workers}, {description.transport}")
    for line in key_lines(plan_of_run(job, description, driver.group.plan_facts())):
        driver.display.note(line)
    for line in notes(job):
        driver.display.note(line)
    if driver.start_version:
        driver.display.note(f"resuming from step {driver.start_version}")


def run_command(
    *, spec: str, overrides: list[str], out: Path | None, runtime: str | None, address: str | None, fresh: bool,
    inject: list[str], debug: bool,
) -> int:  # fmt: skip
    """The verb `run`; its exit code."""
    loaded = load_spec(spec, overrides)
    stop = loaded.job.base.stop if isinstance(loaded.job, (SweepSpec, NasSpec)) else loaded.job.stop
    budget = ", ".join(f"{value:g} {name}" for name, value in stop if name in BUDGETS and value)
    if isinstance(loaded.job, PopulationSpec) and not budget:
        each = ", ".join(f"{value:g} {name}" for name, value in loaded.job.base.stop if name in BUDGETS and value)
        budget = f"{each} of each member"
    display = make_display(sys.stdout.isatty(), loaded.job.name, budget)
    if debug:
        os.environ["DISTML_DEBUG"] = "1"
    result = run(
        spec, overrides, out=out, runtime=runtime, address=address, fresh=fresh, inject=inject, display=display
    )
    return result.exit_code


# -------------------------------------------------------------------------------------------------------------- before
def check_injections(inject: Sequence[str], job: JobSpec, runtime: str) -> None:
    """Refuse injections that name nobody, or that an inline run could not survive to report."""
    servers = getattr(job.strategy, "servers", 0)
    for text in inject:
        one = Injection.parse(text)
        if one.role == "member":
            raise UsageError(f"--inject {text}: a job of kind train has no members; use rank=")
        limit = job.resources.workers if one.role == "rank" else servers
        if one.index >= limit:
            raise UsageError(f"--inject {text}: there is no {one.role} {one.index}; this job has {limit}")
        if runtime == "inline" and (one.action == "stop" or one.role == "server"):
            raise UsageError(f"--inject {text}: needs processes to act on; add --runtime ray")


def check_over_arguments(job: OverJobs, runtime: str, address: str | None, inject: Sequence[str]) -> None:
    """Refuse runtimes that a job over jobs does not have, and injections that name nobody."""
    for text in inject:
        one = Injection.parse(text)
        if not isinstance(job, PopulationSpec | NasSpec) or one.role != "member":
            raise UsageError(f"--inject {text}: of jobs over jobs only members of a population and children of a nas "
                             "can be made to fail, as in kill:member=3,step=40")  # fmt: skip
        members = job.members if isinstance(job, PopulationSpec) else job.trials
        if one.index >= members:
            raise UsageError(f"--inject {text}: there is no member {one.index}; this {job.kind} has {members}")
        if runtime == "inline" and one.action in ("kill", "stop"):
            raise UsageError(f"--inject {text}: needs processes to act on; add --runtime ray")
    if runtime != "inline":
        return
    if isinstance(job, SweepSpec):
        raise UsageError("--runtime inline: a sweep runs on Ray Tune; leave it out")
    if address is not None:
        raise UsageError("--address names a Ray cluster; it needs --runtime ray")


def check_rllib_arguments(runtime: str | None, inject: Sequence[str]) -> None:
    """Refuse what RLlib cannot do."""
    if runtime == "inline":
        raise UsageError("--runtime inline: RLlib runs on Ray; leave it out (config.num_env_runners: 0 is one process)")
    if inject:
        raise UsageError(f"--inject {inject[0]}: jobs of kind rllib have no ranks to fail; leave it out")


def check_resume(
    directory: RunDirectory, loaded: LoadedSpec, earlier: ResultRecord | None, display: Display
) -> bool | None:
    """Whether there is something to go on from: True; False: begin; None: it is finished already.

    Raises:
        UsageError: the spec was changed where a run that has checkpoints may not change.
    """
    text = directory.read_spec_text()
    over = isinstance(loaded.job, OverJobs)
    steps = has_begun(directory) if over else bool(CheckpointStore(directory.checkpoints, 1).steps())
    if earlier is None or text is None or not (steps or (earlier.status in EXIT_CODES and earlier.step)):
        return False
    before: LoadedSpec[Any] = load_spec(directory.path / "spec.yaml")
    if before.job.kind != loaded.job.kind:
        raise UsageError(f"{directory.path} holds a run of kind {before.job.kind}; use --out DIR for a new run, "
                         "or --fresh to move the old one away")  # fmt: skip
    changed = changes(before.job, loaded.job)
    if over:
        allowed: tuple[str, ...] = OVER_MAY_CHANGE
    else:
        allowed = (*MAY_CHANGE, "batch_size") if follows_workers(loaded.job) else MAY_CHANGE
    below = ("base.limits.", "base.stop.") if isinstance(loaded.job, PopulationSpec) else ("base.limits.",)
    forbidden = [line for key, line in changed if key not in allowed and not (over and line.startswith(below))]
    if forbidden and over and not has_trained(directory):
        display.note(f"nothing was trained here before; it begins anew with {'; '.join(forbidden[:3])}")
        return False
    if forbidden:
        init = f", or init: {{from: {directory.path}}} to start from its weights" if loaded.job.kind == "train" else ""
        raise UsageError(
            f"{directory.path} holds a run of another spec ({'; '.join(forbidden[:3])}); use --out DIR for a new run, "
            f"--fresh to move the old one away{init}"
        )
    if earlier.status in ("done", "goal_met", "goal_missed") and not any(
        key in ("stop", "trials") or line.startswith("base.stop.") for key, line in changed
    ):
        return None
    if earlier.status == "running":
        display.note(f"the previous run here (process {earlier.pid} on {earlier.host}) ended without finishing")
    for _, line in changed:
        display.note(f"changed: {line}")
    return steps


def changes(before: Block, after: Block) -> list[tuple[str, str]]:
    """(top-level key, `dotted.key: old -> new`) of all that differs."""
    old, new = (json.loads(job.model_dump_json(by_alias=True)) for job in (before, after))
    return [(key, line) for key in new for line in _differences(key, old[key], new[key])]


def _differences(path: str, old: Any, new: Any) -> list[str]:
    both = isinstance(old, dict) and isinstance(new, dict)
    if both and (old.keys() == new.keys() or not {"name", "type"} & {*old, *new}):  # else: another block altogether
        keys = {**old, **new}
        return [line for key in keys for line in _differences(f"{path}.{key}", old.get(key), new.get(key))]
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def prepare_directory(directory: RunDirectory, loaded: LoadedSpec, resume: bool, display: Display) -> SourceTree:
    """Write the resolved spec, with a user's own task beside it, so that the directory runs as it is."""
    from distml.tasks.sources import SourceTree

    job: JobSpec | RLlibSpec = loaded.job.base if isinstance(loaded.job, OverJobs) else loaded.job
    acting = job if isinstance(job, RLlibSpec) else job.task
    sources = SourceTree.collect(acting, loaded.directory)
    for name, text in sources.files.items():
        target = directory.path / name
        if resume and target.exists() and target.read_text(encoding="utf-8") != text:
            display.note(f"changed: {name}; the run goes on with the new text")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    if isinstance(job, JobSpec) and isinstance(job.task, TextTaskSpecs):
        shutil.copyfile(open_text(job.task, job.seed).path / TOKENIZER, directory.path / RUN_TOKENIZER)
    directory.write_spec(loaded.dump())
    directory.logs.mkdir(exist_ok=True)
    if resume:
        directory.result.update(status="running", error=None)
    else:
        directory.result.update(**{**asdict(ResultRecord()), "status": "running"})
    return sources


def make_group(
    loaded: LoadedSpec, sources: SourceTree, runtime: str, address: str | None, directory: Path, inject: tuple[str, ...]
) -> WorkerGroup:
    """The runtime's group of workers."""
    if runtime == "inline":
        if address is not None:
            raise UsageError("--address names a Ray cluster; it needs --runtime ray")
        problem = why_not_inline(loaded.job)
        if problem is not None:
            raise UsageError(problem)
        from distml.runtime.inline import InlineRuntime

        return InlineRuntime(loaded.job, sources, inject, directory)
    from distml.runtime.authentication import prepare_authentication

    prepare_authentication(address)
    if loaded.job.resources.elastic is not None:
        from distml.runtime.elastic import ElasticRuntime

        return ElasticRuntime(loaded.job, sources, address, directory, inject)
    from distml.runtime.ray import RayRuntime

    return RayRuntime(loaded.job, sources, address, directory, inject)


def with_pinned_text(loaded: LoadedSpec[Any]) -> LoadedSpec[Any]:
    """With the digest of the text that a job, or the base of one, is about."""
    if isinstance(loaded.job, OverJobs):
        assert loaded.base is not None
        base = replace(loaded.base, job=pinned(loaded.base.job))
        return replace(loaded, job=loaded.job.model_copy(update={"base": base.job}), base=base)
    return replace(loaded, job=pinned(loaded.job)) if isinstance(loaded.job, JobSpec) else loaded


def start_weights(job: JobSpec) -> dict[str, Any] | None:
    """The tensors that `init.from` names: a run's, a file's or a folder's that `transformers` saved."""
    if job.init is None or job.init.source is None:
        return None
    folder = Path(job.init.source).expanduser()
    if hf.is_hf(folder):
        return hf.start_weights(folder, job)
    return resolve_source(job.init.source)


def environment(runtime: str, transport: str, hosts: Sequence[str]) -> dict[str, Any]:
    """What the run ran on: versions, commit, hosts, and how gradients travel."""
    versions = {"python": platform.python_version()}
    for name in ("distml", "torch", "ray", "numpy", "gymnasium", "deepspeed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"versions": versions, "commit": commit(), "runtime": runtime, "transport": transport,
            "hosts": list(hosts), "driver": socket.gethostname(), "platform": platform.platform()}  # fmt: skip


def commit() -> str | None:
    """The commit of the current directory, where it is a git checkout."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


# --------------------------------------------------------------------------------------------------------------- after
def as_result(record: ResultRecord, path: Path) -> Result:
    """The record as what `run` returns."""
    if record.status == "failed":
        error = record.error or {}
        raise RunError(str(error.get("message", "failed")), role=str(error.get("rank", "driver")),
                       phase=str(error.get("phase", "")), step=error.get("step"))  # fmt: skip
    return Result(record.status, record.step, record.wall_s, record.metrics, record.best, path)


def closing_lines(result: Result) -> list[str]:
    """What the terminal shows last."""
    scores = "  ".join(f"{name} {value:.4g}" for name, value in sorted(result.metrics.items())
                       if name.startswith(("eval/", "test/")) and value is not None)  # fmt: skip
    word = {"goal_met": "goal met", "goal_missed": "goal missed", "done": "done", "interrupted": "interrupted"}
    return [f"{word[result.status]} at step {result.step} after {result.wall_s:.1f} s of training  {scores}".rstrip(),
            f"run directory: {result.directory}  (distml show {result.directory})"]  # fmt: skip
