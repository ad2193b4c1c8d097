"""What a plan knows of a job's model: shapes and activations, by tracing it. The only file here that needs torch."""

from __future__ import annotations

from torch import nn

from distml.launch.plan.states import Size
from distml.spec.loader import LoadedSpec
from distml.spec.schema import JobSpec
from distml.strategies.base import freeze
from distml.tasks.build import build_task
from distml.tasks.footprint import Activations
from distml.tasks.sources import SourceTree
from distml.tasks.traced import NotTracedError, model_without_memory, rows_of, trace_activations


class Facts:
    """Of one job and those that differ from it in strategy, resources, sizes of batches or checkpointing.

    Raises:
        UsageError: the task does not fit.
        NotTracedError: its model cannot be built without values.
    """

    def __init__(self, loaded: LoadedSpec[JobSpec]) -> None:
        job = loaded.job
        SourceTree.collect(job.task, loaded.directory).install()
        model = model_without_memory(build_task(job))
        freeze(model, job.init.freeze if job.init else [])
        self.size = size_of(model)
        self._activations: dict[str, Activations | str] = {}

    def activations(self, job: JobSpec) -> Activations | str:
        """Of one micro-batch; or why they are not known."""
        rows = rows_of(job)
        low = f"{job.strategy.name == 'zero'} {job.precision} {job.resources.gpus_per_worker}"
        key = f"{rows} {low} {job.task.model_dump_json()}"
        if key not in self._activations:
            try:
                self._activations[key] = trace_activations(job, build_task(job), rows)
            except NotTracedError as error:
                self._activations[key] = str(error)
        return self._activations[key]


def size_of(model: nn.Module) -> Size:
    """Shapes and bytes of a model."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    rest = [*(p for name, p in model.named_parameters() if name not in trained), *model.buffers()]
    element = max((p.element_size() for p in trained.values()), default=4)
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    return Size(shapes, sum(t.numel() * t.element_size() for t in rest), element)
