"""`distml evaluate`, `distml export` and `Result.model()`: a run's weights in a model of its task, in one process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distml import __version__
from distml.errors import UsageError
from distml.exchange.flat import from_numpy
from distml.exchange.layout import Array
from distml.loop import random_states, set_random_states
from distml.runs.checkpoints import Checkpoint, CheckpointDamaged, CheckpointStore, folder_name
from distml.runs.directory import Result as ResultRecord
from distml.runs.directory import RunDirectory
from distml.runs.files import finite, strict_json
from distml.runs.over import best_run
from distml.runs.units import number
from distml.runtime.authentication import prepare_authentication
from distml.spec.loader import load_spec, load_train
from distml.spec.rl import ActingBlock
from distml.spec.rllib import RLlibSpec
from distml.spec.schema import JobSpec
from distml.strategies.agenda import Agenda, Spent
from distml.strategies.base import seed_everything
from distml.tasks.base import Mean, Part, Progress, Task
from distml.tasks.build import build_task, describe
from distml.tasks.data import mix
from distml.tasks.sources import SourceTree

PREFIXES = {"train": "train", "validation": "eval", "test": "test"}  # splits, and how their metrics are named
FORMATS = ("safetensors", "hf")
WEIGHTS, METADATA = "model.safetensors", "metadata.json"
Report = Callable[[str], None]


@dataclass(frozen=True)
class TrainedModel:
    """What a run came to.

    Attributes:
        model: with the checkpoint's weights, on the CPU, in eval mode.
        progress: the task's clock at that checkpoint.
    """

    path: Path
    job: JobSpec
    task: Task
    model: nn.Module
    progress: Progress

    @property
    def step(self) -> int:
        """Version of the weights."""
        return self.progress.version


def load_model(run: Path | str, report: Report | None = None) -> TrainedModel:
    """The run's task and its model with the best checkpoint's weights; without `checkpoint.best` the last one's.

    Args:
        run: a run directory; for a job over jobs stands its best member or trial.
        report: called with one line for each damaged checkpoint that was passed over; by default it goes to stderr.

    Raises:
        UsageError: there is no run, no good checkpoint, or the task does not fit the checkpoint any more.
    """
    directory = RunDirectory.view(the_best(Path(run)))
    if directory.read_spec_text() is None:
        raise UsageError(f"{directory.path} has no spec.yaml, so its task is not known")
    loaded = load_train(directory.spec)
    checkpoint = best_checkpoint(directory, report or _to_stderr)
    sources = SourceTree.collect(loaded.job.task, loaded.directory)
    sources.install()
    task = build_task(loaded.job, directory.path)
    sources.mark_imported()
    model = build_model(loaded.job, task)
    copy_weights(model, checkpoint.model(), f"checkpoint {folder_name(checkpoint.step)}")
    spent = Spent.of(checkpoint.state["clock"])
    progress = Progress(spent.version, spent.examples, spent.frames, Agenda(loaded.job).fraction(spent))
    return TrainedModel(directory.path, loaded.job, task, model, progress)


def the_best(run: Path) -> Path:
    """The run directory itself; of a job over jobs that of its best member or trial.

    Raises:
        UsageError: that one kept no weights, or there is none.
    """
    found = best_run(run)
    if found != RunDirectory.view(run).path and not CheckpointStore(found / "checkpoints", keep=1).steps():
        raise UsageError(f"{run} kept no weights of its best, {found.name}; train it again: distml run {run}/best.yaml")
    return found


def best_checkpoint(directory: RunDirectory, report: Report) -> Checkpoint:
    """The first that verifies of: the best one, the one that result.json names, the others from the newest on.

    Raises:
        UsageError: there is none, or all are damaged.
    """
    store = CheckpointStore(directory.checkpoints, keep=1)
    steps = store.steps()
    if not steps:
        raise UsageError(f"{directory.path} has no checkpoint yet; `distml run` with --out {directory.path} goes on")
    damaged: list[CheckpointDamaged] = []
    for step in dict.fromkeys([*_named_steps(directory.result.read(), store), *reversed(steps)]):
        if step not in steps:
            continue
        try:
            checkpoint = store.load(step)
        except CheckpointDamaged as error:
            damaged.append(error)
            continue
        for bad in damaged:
            report(f"checkpoint {bad.folder.name} is damaged ({bad.reason}); using {folder_name(step)} instead")
        return checkpoint
    reasons = "; ".join(f"{bad.folder.name}: {bad.reason}" for bad in damaged)
    raise UsageError(f"{directory.path} has no good checkpoint: all are damaged ({reasons})")


def _named_steps(result: ResultRecord | None, store: CheckpointStore) -> Iterator[int]:
    """The best step, then the one that result.json names. While a run goes on only the store knows its best."""
    if result is not None and result.best is not None:
        yield int(result.best["step"])
    elif (best := store.best()) is not None:
        yield best[0]
    if result is not None and result.checkpoint is not None:
        yield from (step for step in store.steps() if Path(result.checkpoint).name == folder_name(step))


def build_model(job: JobSpec, task: Task) -> nn.Module:
    """The task's model as it was before training, in eval mode; the caller's random states stay as they were.

    Raises:
        UsageError: `build_model` fails.
    """
    states = random_states()
    try:
        seed_everything(job.seed)
        model = task.build_model()
    except Exception as error:
        raise UsageError(f"the task's model cannot be built: {describe(error)}") from error
    finally:
        set_random_states(states)
    return model.eval()


def copy_weights(model: nn.Module, arrays: dict[str, Array], source: str) -> None:
    """Overwrite all of the model's tensors.

    Raises:
        UsageError: `source` lacks one of them, or has one in another shape.
    """
    state = tensors_of(model)
    there = {tensor.data_ptr() for name, tensor in state.items() if name in arrays}
    for name, tensor in state.items():
        if name not in arrays:
            if tensor.data_ptr() not in there:  # tied weights are stored once, under their first name
                raise UsageError(f"{source} is of another model: it has no {name}")
        elif arrays[name].shape != tuple(tensor.shape):
            shapes = f"has shape {arrays[name].shape} there, {tuple(tensor.shape)} here"
            raise UsageError(f"{source} is of another model: {name} {shapes}")
    # strict=False: of tied weights one name is enough
    model.load_state_dict({name: from_numpy(arrays[name]) for name in state if name in arrays}, strict=False)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict's tensors: parameters and persistent buffers, under their own names."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


# ------------------------------------------------------------------------------------------------------------- evaluate
def evaluate_command(run: Path, split: str) -> int:
    """Print the scores of a run's best checkpoint, a line `NAME VALUE` for each.

    Args:
        split: `train`, `validation` or `test`, the whole of it; validation's metrics are called `eval/…`.

    Raises:
        UsageError: see `load_model` and `evaluate_split`.
    """
    if split not in PREFIXES:
        raise UsageError(f"unknown split {split!r}; known: {', '.join(PREFIXES)}")
    directory = RunDirectory.view(the_best(run))
    if directory.read_spec_text() is not None and isinstance(load_spec(directory.spec).job, RLlibSpec):
        scores = _rllib_scores(directory, split)
    else:
        trained = load_model(directory.path)
        if split == "train" and isinstance(trained.job.task, ActingBlock):
            raise UsageError(f"task {trained.job.task.name} acts and has no train split; known: validation, test")
        with _threads(trained.job.resources.cpus_per_worker):
            scores = evaluate_split(trained, split)
        if not scores:
            raise UsageError(f"task {trained.job.task.name} reports nothing about the {split} split")
    for name, value in scores.items():
        print(f"{name} {value!r}")
    return 0


def _rllib_scores(directory: RunDirectory, split: str) -> dict[str, float]:
    """Greedy episodes of a run that RLlib trained."""
    prepare_authentication(None)
    from distml.adapters.rllib import score

    loaded = load_spec(directory.spec)
    sources = SourceTree.collect(loaded.job, loaded.directory)
    scores = score(loaded.job, directory, sources, best_checkpoint(directory, _to_stderr).step, split)
    return {f"{PREFIXES[split]}/{name}": value for name, value in sorted(scores.items())}


def evaluate_split(trained: TrainedModel, split: str, model: nn.Module | None = None) -> dict[str, float]:
    """The task's evaluation of a whole split, in one part, under the metrics' names.

    Args:
        model: evaluated in place of the run's own.

    Raises:
        UsageError: the task fails; one line with the place.
    """
    job, task = trained.job, trained.task
    states = random_states()
    try:
        seed_everything(mix(job.seed, 0, 2) % 2**32)
        dataset = task.data(split) if type(task).data is not Task.data else None
        part = Part(0, 1, mix(job.seed, 0, 2), split, job.rows_at_once, dataset=dataset)
        with torch.no_grad():
            means = task.evaluate(trained.model if model is None else model, part, trained.progress)
    except Exception as error:
        raise UsageError(f"the task's evaluation of the {split} split failed: {describe(error)}") from error
    finally:
        set_random_states(states)
    for name, mean in means.items():
        if not isinstance(mean, Mean):
            found = type(mean).__name__
            raise UsageError(f"evaluate must return distml.Mean(total, count) values; {name!r} is {found}")
    return {f"{PREFIXES[split]}/{name}": float(mean.value) for name, mean in sorted(means.items()) if mean.count}


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many torch threads as the run's workers had: sums then come out the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------------------- export
def export_command(run: Path, format: str, out: Path) -> int:
    """Write a run's weights into the new folder OUT, with OUT/metadata.json saying whose they are.

    What is written is read back first and held against the run's own model; only then does OUT appear.

    Args:
        format: `safetensors`: the model's whole state dict; `hf`: a folder that `transformers` loads.

    Raises:
        UsageError: unknown format, `out` is not empty or cannot be written, the model has no such form, or see
            `load_model`.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty directory; nothing was written; choose another --out")
    trained = load_model(run)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        with _threads(trained.job.resources.cpus_per_worker):
            partial.mkdir(parents=True)
            export = export_hf if format == "hf" else export_safetensors
            scores, lines = export(trained, partial, out)
            (partial / METADATA).write_text(strict_json(finite(metadata(trained, scores)), "metadata"))
            partial.rename(out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(*lines, sep="\n")
    return 0


def export_safetensors(trained: TrainedModel, partial: Path, out: Path) -> tuple[dict[str, float], list[str]]:
    """Write and check one file; the validation scores, and what to say when it lies in `out`."""
    count = write_weights(trained.model, partial / WEIGHTS)
    scores = verify_export(trained, partial / WEIGHTS)
    shown = "  ".join(f"{name} {number(value)}" for name, value in scores.items())
    return scores, [
        f"{out / WEIGHTS}: {count} tensors of step {trained.step}; read back: bit for bit the run's, and as good",
        f"validation, run and export alike: {shown}" if shown else "the task reports no scores to compare",
    ]


def export_hf(trained: TrainedModel, partial: Path, out: Path) -> tuple[dict[str, float], list[str]]:
    """The same for a folder that `transformers` loads; its logits are compared instead of scores."""
    from distml.launch.hf_export import compare_logits, transformer_of, write_folder
    from distml.tasks.language_model import TextTask

    tokenizer = trained.task.tokenizer if isinstance(trained.task, TextTask) else None
    model = transformer_of(trained.model)
    count = write_folder(model, tokenizer, partial)
    difference = compare_logits(model, partial)
    checked = (
        "not checked against transformers, which is not installed: pip install 'distml[hf]'"
        if difference is None
        else f"loaded with transformers: the run's logits, within {difference:.1g}"
    )
    return {}, [f"{out}: {count} tensors of step {trained.step}", checked]


def write_weights(model: nn.Module, path: Path) -> int:
    """Write a model's state dict as .safetensors; the number of tensors."""
    from safetensors.torch import save_file

    # Copies: the format has no shared memory, so tied weights are written under each of their names.
    tensors = {name: tensor.detach().clone(memory_format=torch.contiguous_format)
               for name, tensor in tensors_of(model).items()}  # fmt: skip
    save_file(tensors, path)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # the library gives its owner alone the right to read
    return len(tensors)


def verify_export(trained: TrainedModel, path: Path) -> dict[str, float]:
    """Read an export back into a new model; the scores of the validation split, which both models share.

    Raises:
        RuntimeError: a tensor or a score differs from the run's.
    """
    from safetensors.torch import load_file

    exported, own = load_file(path), tensors_of(trained.model)
    different = sorted(name for name in exported.keys() | own.keys() if not _equal(exported.get(name), own.get(name)))
    if different:
        raise RuntimeError(f"the export differs from the checkpoint in {', '.join(different[:4])}")
    again = build_model(trained.job, trained.task)
    again.load_state_dict(exported)
    scores = evaluate_split(trained, "validation")
    other = evaluate_split(trained, "validation", again)
    if json.dumps(scores) != json.dumps(other):  # as text: NaN is equal to itself
        raise RuntimeError(f"the export scores {other}, the run's model {scores}")
    return scores


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same bit by bit."""
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def metadata(trained: TrainedModel, scores: dict[str, float]) -> dict[str, Any]:
    """What metadata.json says: whose weights these are, and how good."""
    task = json.loads(trained.job.model_dump_json(by_alias=True))["task"]
    return {
        "name": trained.job.name, "run": str(trained.path.resolve()), "step": trained.step,
        "examples": trained.progress.examples, "metrics": scores, "task": task, "distml": __version__,
    }  # fmt: skip


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
