"""A member: one training job that stays alive in this process, between decisions about it.

    build ──▶ advance(until) ──▶ (state, evaluate) ──▶ copy | apply ──▶ advance(until) ──▶ ... ──▶ close

A member with one worker is a `Trainer` alone, whose loop is left at `until` and entered again; one with several is a
`WorkerGroup` that ends at `until` and begins again from the cut it ended with. To its task a stop at `until` is a
checkpoint's boundary: a stream whose position cannot be saved begins anew there.

A state is a `Cut`, whose clock also says by which optimiser's block it was made (`optimizer`). A copy takes that block
along: first the donor's shared half is loaded, with the rule that its moments are of; *then* the new values are
applied. In the other order the donor's values would overwrite them, and the values read back show it.

No ray here: several workers come from the group that `make_group` makes. Who waits for whom: nobody; all is done in the
caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distml.exchange.layout import Array, Layout
from distml.runtime.cut import Cut
from distml.runtime.group import WorkerGroup
from distml.spec.schema import JobSpec
from distml.tasks.sources import SourceTree

MakeGroup = Callable[[JobSpec], WorkerGroup]


class MemberError(Exception):
    """A member cannot go on; it is only to be closed.

    Attributes:
        kind: "failed": an exception; "not_finite": loss or weights are NaN or inf; "died": a process of its own did.
        cause: one line.
        phase: what it was doing; `step`: its version then.
    """

    def __init__(self, kind: str, cause: str, phase: str, step: int | None) -> None:
        self.kind, self.cause, self.phase, self.step = kind, cause, phase, step
        super().__init__(f"{phase}: {cause}" if step is None else f"{phase}, step {step}: {cause}")


@dataclass(frozen=True)
class Built:
    """What a member has built.

    Attributes:
        layout: of its trained weights.
        frozen: its tensors that are not trained.
        parameters: trained elements.
    """

    layout: Layout
    frozen: Mapping[str, Array]
    parameters: int


@dataclass(frozen=True)
class Stand:
    """Where a member is after `advance`.

    Attributes:
        step: its version.
        metrics: the last value of each metric, with `eval/…` of an evaluation at this very step.
        rows: what belongs into its metrics.jsonl since the last answer.
        finished: why its own run is over (a budget, "goal", "patience"), or None.
        state: its whole state, where it was to be kept.
        seconds: of training, all in all.
    """

    step: int
    metrics: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    finished: str | None
    state: Cut | None
    seconds: float


class Member:
    """One live training job.

    Args:
        job: its own spec, of kind train.
        sources: the user's own files.
        directory: the member's own folder; logs of its workers go below it.
        injections: failures to cause, in the form of a training run (`kill:rank=0,step=40`).
        make_group: makes the group of a job with several workers; by default logical workers in this process.
    """

    def __init__(
        self, job: JobSpec, sources: SourceTree, directory: Path, injections: tuple[str, ...] = (),
        make_group: MakeGroup | None = None,
    ) -> None:  # fmt: skip
        self.job = job

    def build(self, start: Cut | None = None) -> Built:
        """Build task, stream and model, and load a whole state, if there is one to go on from.

        Raises:
            UsageError: the task, the resources or the state do not fit.
        """
        raise NotImplementedError

    def advance(self, until: int | None, keep: bool = False) -> Stand:
        """Train until version `until` (None: to the end of its own budget), and evaluate there.

        Args:
            keep: give a copy of the whole state, too.

        Raises:
            MemberError: it failed.
        """
        raise NotImplementedError

    def state(self) -> Cut:
        """A copy of the whole state: shared half, own halves; to be asked for between two calls of `advance`."""
        raise NotImplementedError

    def load(self, cut: Cut) -> None:
        """Go on from a whole state, with this member's own values: budget, stream and random states are the cut's."""
        raise NotImplementedError

    def copy(self, cut: Cut, job: JobSpec) -> dict[str, Any]:
        """Take another member's shared half, *then* `job`'s values; keep the own budget, stream and random states.

        What workers keep besides for their own weights (residuals, inner moments) is dropped with these weights.

        Returns:
            applied: path -> value, read back from the live optimiser and task, of every path in which `job` differs
            from the job before or the donor's optimiser.

        Raises:
            UsageError: the other one's model has another shape.
        """
        raise NotImplementedError

    def apply(self, job: JobSpec) -> None:
        """Go on with another spec: in place below `optimizer.`, else task and stream are built anew.

        Moments that appear are zeros. The state stays; a stream of examples goes on at the same example, also with
        another batch size.

        Raises:
            UsageError: the model's shape would change; with the path.
        """
        raise NotImplementedError

    def live(self, paths: Sequence[str]) -> dict[str, Any]:
        """Path -> value as what really computes has it: optimiser, module, task, stream; not as it was asked for."""
        raise NotImplementedError

    def evaluate(self, split: str) -> dict[str, float]:
        """The task's evaluation of a split with the weights of now, as `eval/NAME` or `test/NAME`."""
        raise NotImplementedError

    def model_arrays(self) -> dict[str, Array]:
        """Copies of all the model's tensors under their names."""
        raise NotImplementedError

    def close(self) -> None:
        """End processes and threads of its own; safe to call twice."""
        raise NotImplementedError
