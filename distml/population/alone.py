"""A member with one worker: a `Trainer` in the caller's thread. Its random states are its own, whoever else is here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import TypeAdapter

from distml.errors import UsageError
from distml.events import Event
from distml.exchange.compression.build import compression_of
from distml.exchange.flat import CopyVector, copy_vector, to_numpy
from distml.exchange.layout import Array, Layout
from distml.loop import BEGINS_ANEW, Trainer, failure, random_states, set_random_states
from distml.population.live import live_values
from distml.population.transfer import changed_shape, moved
from distml.runtime.cut import Cut
from distml.spec.schema import JobSpec, OptimizerSpec
from distml.strategies.single import Single
from distml.tasks.build import build_task, describe
from distml.tasks.data import DatasetStream
from distml.tasks.sources import SourceTree

IDLE = "idle"  # a trainer's activity while it is not asked for anything
RULES: TypeAdapter[OptimizerSpec] = TypeAdapter(OptimizerSpec)


class Alone:
    """What `Member` drives where there is one worker.

    Args:
        start_weights: what `init` starts from.
        injections: failures to cause.
    """

    def __init__(
        self, job: JobSpec, sources: SourceTree, start_weights: Mapping[str, Array] | None, injections: tuple[str, ...]
    ) -> None:
        self.job, self.sources = job, sources
        self.start_weights, self.injections = start_weights, injections
        self.device = torch.device("cuda", 0) if job.resources.gpus_per_worker else torch.device("cpu")
        self.random: dict[str, Any] | None = None
        self.begins_anew = False  # the stream has to, before it is used again

    def build(self) -> None:
        """Build task, stream and model.

        Raises:
            UsageError: the task does not fit.
        """
        torch.set_num_threads(self.job.resources.cpus_per_worker)
        self.sources.install()
        with self._own_random():
            self.trainer = self._trainer(self.job)
        self.sources.mark_imported()

    def _trainer(self, job: JobSpec, datasets: Mapping[str, Any] | None = None) -> Trainer:
        try:
            trainer = Trainer(job, build_task(job), 0, 1, self.device, injections=self.injections)
            trainer.datasets.update(datasets or {})
            trainer.build(self.start_weights)
            trainer.connect(None, None)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"the task cannot be built: {describe(error)}") from error
        trainer.hands_over = False
        return trainer

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        """Inside, the process's random states are this member's."""
        before = random_states()
        if self.random is not None:
            set_random_states(self.random)
        try:
            yield
        finally:
            self.random = random_states()
            set_random_states(before)

    @property
    def strategy(self) -> Single:
        """The trainer's."""
        strategy = self.trainer.strategy
        assert isinstance(strategy, Single)
        return strategy

    @property
    def layout(self) -> Layout:
        """Of the trained weights."""
        return self.trainer.strategy.layout

    def frozen(self) -> dict[str, Array]:
        """Copies of the parameters that are not trained."""
        return {name: to_numpy(tensor).copy() for name, tensor in self.trainer.strategy.frozen().items()}

    @property
    def version(self) -> int:
        """Of the weights."""
        return self.trainer.strategy.progress.version

    # ------------------------------------------------------------------------------------------------------- training
    def run(self, until: int | None) -> Iterator[Event]:
        """The events up to a version; an exception is the last one, as `Failed`."""
        trainer = self.trainer
        with self._own_random():
            try:
                self.strategy.pause_at(until)
                if self.begins_anew and trainer.strategy.finished is None:
                    self.begins_anew = False
                    trainer.begin_stream_anew()
                yield from trainer.advance()
                if not trainer.strategy.is_finite():
                    trainer.activity = "evaluate"
                    raise FloatingPointError(f"the weights are not finite at step {self.version}")
                self.begins_anew = trainer.stream.state() is None
            except Exception as error:
                yield failure(trainer, error)
            finally:
                trainer.activity = IDLE

    def evaluate(self, split: str) -> dict[str, float]:
        """With the weights of now."""
        with self._own_random():
            self.trainer.activity = "evaluate"
            try:
                return self.trainer.evaluate(split)
            finally:
                self.trainer.activity = IDLE

    # ---------------------------------------------------------------------------------------------------------- state
    def standing(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """The clock, and the own halves by rank: the state without its vectors."""
        strategy = self.strategy
        clock = {**strategy.clock_state(), "updates": strategy.optimizer.updates}
        stream = {"stream": BEGINS_ANEW} if self.begins_anew else {}
        return clock, {0: {**self.trainer.own_state(), "random": self.random, **stream}}

    def state(self, copy: CopyVector = copy_vector) -> Cut:
        """A copy, whose vectors are where `copy` puts them."""
        shared = self.strategy.shared_state(copy)
        _, own = self.standing()
        rule = self.strategy.live_optimizer().model_dump(mode="json", by_alias=True)
        return Cut(self.version, {**shared, "clock": {**shared["clock"], "optimizer": rule}}, own)

    def load(self, cut: Cut) -> None:
        """Go on from a state, by the optimiser's block that it was made by, if it says so."""
        rule = cut.shared["clock"].get("optimizer")
        if rule is not None:
            self._take_rule(RULES.validate_python(rule))
        with self._own_random():
            self.trainer.load(cut.shared, cut.own.get(0))
        self.begins_anew = False  # it just has

    def _take_rule(self, rule: OptimizerSpec) -> None:
        """Become what a state's moments are of; where that does not go in place, only moments of both rules fit."""
        if rule != self.job.optimizer and self._is_in_place(self.job.model_copy(update={"optimizer": rule})):
            self.job = self.job.model_copy(update={"optimizer": rule})
            self.trainer.retune(self.job)

    def _is_in_place(self, job: JobSpec) -> bool:
        """Whether nothing but the optimiser's rule changes."""
        before, after = self.job, job
        same = before.model_copy(update={"optimizer": after.optimizer}) == after
        matches = [group.match for group in before.optimizer.groups] == [g.match for g in after.optimizer.groups]
        return same and matches and compression_of(after) is None

    def become(self, job: JobSpec) -> None:
        """Go on with another spec.

        Raises:
            UsageError: the model would change its shape.
        """
        if job == self.job:
            return
        if self._is_in_place(job):
            self.job = job
            self.trainer.retune(job)
            return
        cut, before = self.state(), self.trainer
        with self._own_random():
            same_data = job.task == self.job.task and job.seed == self.job.seed
            trainer = self._trainer(job, before.datasets if same_data else None)
        if shapes(trainer) != shapes(before):
            raise changed_shape(self.job, job)
        half = cut.own[0]
        if isinstance(trainer.stream, DatasetStream):
            half = moved(half, self.job, job)
        self.job, self.trainer = job, trainer
        with self._own_random():
            trainer.load(cut.shared, half)
        self.begins_anew = False

    def live(self, paths: Sequence[str]) -> dict[str, Any]:
        """Values as they are."""
        return live_values(self.trainer, paths)

    @property
    def activity(self) -> tuple[str, float]:
        """What it is doing, and for how many seconds it has not moved in it."""
        return self.trainer.activity, self.trainer.motionless_s()

    def close(self) -> None:
        """Give back what belongs to the whole process."""
        self.trainer.strategy.close()


def shapes(trainer: Trainer) -> tuple[Layout, dict[str, tuple[int, ...]]]:
    """What must be equal for a state to fit."""
    carried = {name: tuple(tensor.shape) for name, tensor in trainer.strategy.carried.tensors.items()}
    return trainer.strategy.layout, carried
