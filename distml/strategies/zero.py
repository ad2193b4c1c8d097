"""`strategy: zero`: DeepSpeed's ZeRO. Each rank keeps 1/W of the optimiser (1), the gradients (2), the weights (3).

What goes through the engine is one module, the task's loss (`exchange/deepspeed.py`). Around it everything is as under
`all_reduce`: the schedule, the sum over the sum of counts, clipping by the norm of the mean gradient, and a tail of
four numbers that is summed once per step, while backward computes. The state stays with the ranks: `pieces` and
`load_pieces` speak of it in elements of named parameters, so that any number of ranks, any stage and any other strategy
goes on from it.

The model is built twice where that spares memory. `prepare` needs its index and, for the check that all ranks begin
alike, its values. Under stage 3 it is only an index (the meta device) for tasks that draw each parameter within the
submodule that owns it; `connect` then builds the model under DeepSpeed's own context, which cuts every parameter as
soon as its submodule is there. No rank ever holds the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from distml.errors import UsageError
from distml.exchange import deepspeed
from distml.exchange.channel import Channel, Group
from distml.exchange.deepspeed import ShardedEngine
from distml.exchange.flat import COUNT, Carried, fingerprint_of, from_numpy, frozen_of, index_of
from distml.exchange.layout import Array
from distml.exchange.process_group import ProcessGroup
from distml.spec.schema import AdamSpec, AdamWSpec, OptimizerSpec, SGDSpec
from distml.spec.zero import ZeroSpec
from distml.strategies.base import MODEL, Piece, ReadPiece, Strategy, TaskModule
from distml.strategies.moments import moment_names
from distml.strategies.optimizer import group_values
from distml.strategies.zero_config import engine_config, ring_passes
from distml.tasks.base import Loss, Mean, Task

TORCH_NAMES = {"momentum": "momentum_buffer"}  # a moment's name here -> in torch's optimisers, where they differ


class Zero(Strategy):
    """One rank of W; what it holds is `engine`'s."""

    # ------------------------------------------------------------------------------------------------------- building
    def prepare(self, task: Task, start_weights: Mapping[str, Array] | None, dataset_size: int | None) -> nn.Module:
        if self.stage == 3 and type(task).after_update is not Task.after_update:
            raise UsageError(f"task {type(task).__name__} changes weights after an update, and under zero/3 no worker "
                             "has them all; use stage 1 or 2")  # fmt: skip
        return super().prepare(task, start_weights, dataset_size)

    @property
    def stage(self) -> int:
        """1, 2 or 3."""
        return cast(ZeroSpec, self.job.strategy).stage

    def _build_model(self, start_weights: Mapping[str, Array] | None) -> nn.Module:
        self.in_pieces = self.stage == 3 and self.task.builds_in_pieces and start_weights is None
        if self.in_pieces:
            with torch.device("meta"):
                model = super()._build_model(None)
            if all(parameter.requires_grad for parameter in model.parameters()):
                return model
            self.in_pieces = False  # frozen values are the driver's to keep
        return super()._build_model(start_weights)

    def _take_parameters(self, phase_patterns: list[str], group_patterns: list[str]) -> None:
        self.layout, self.parameters = index_of(self.model, phase_patterns, group_patterns)
        if self.parameters[0].dtype != torch.float32:
            raise UsageError(f"strategy zero updates float32 weights, those of {type(self.task).__name__} are "
                             f"{self.parameters[0].dtype}; use model.float(), or strategy all_reduce")  # fmt: skip

    def _build(self) -> None:
        self._group: Group | None = None
        self._engine: ShardedEngine | None = None
        self.updates = self.skipped = self._micro_batches = 0
        self._is_last = False
        self._frozen = {name: tensor.cpu() for name, tensor in frozen_of(self.model, self.layout).items()}
        values = [] if self.in_pieces else [parameter.data for parameter in self.parameters]
        self._fingerprint = fingerprint_of(self.layout, values, self._frozen)

    def frozen(self) -> dict[str, Tensor]:
        return self._frozen

    def fingerprint(self) -> str:
        return self._fingerprint

    def connect(self, group: Group | None, channel: Channel | None) -> None:
        if self._group is not None:
            raise RuntimeError("DeepSpeed's state is the process's own: a rank that goes back is a new process")
        wire = group if isinstance(group, ProcessGroup) else None
        self._group = wire = deepspeed.join(wire, self.device, self.job.limits.lost_after_s)
        config = self._config()
        if self.in_pieces:
            with deepspeed.peers(wire, "building the model"):
                self._build_in_pieces(config)
        groups = [[p for p, entry in zip(self.parameters, self.layout.entries, strict=True) if entry.group == number]
                  for number in range(len(self.job.optimizer.groups) + 1)]  # fmt: skip
        self.group_numbers = [number for number, parameters in enumerate(groups) if parameters]
        optimizer = build_optimizer(self.job.optimizer, [parameters for parameters in groups if parameters])
        nominal = self.job.batch_size * (getattr(self.job.task, "tokens_per_example", None) or 1)
        loss, names = self.module.forward, (entry.name for entry in self.layout.entries)
        named = dict(zip(names, self.parameters, strict=True))
        self._engine = ShardedEngine(loss, self.model, named, optimizer, config, wire, nominal)
        self.carried = Carried(self.model)  # moved by DeepSpeed to its device

    def _config(self) -> dict[str, Any]:
        largest = max(entry.numel for entry in self.layout.entries)
        return engine_config(self.job, self.layout.numel, largest)

    def _build_in_pieces(self, config: dict[str, Any]) -> None:
        """Build the model anew, each parameter cut as soon as it is drawn."""
        with deepspeed.cut_when_built(self.device, config):
            self.model = super()._build_model(None)
        self.module = TaskModule(self.task, self.model, self.job.precision, self.device)
        named = dict(self.model.named_parameters())
        self.parameters = [named[entry.name] for entry in self.layout.entries]

    @property
    def group(self) -> Group:
        assert self._group is not None
        return self._group

    @property
    def engine(self) -> ShardedEngine:
        """What computes, updates and holds this rank's part."""
        assert self._engine is not None
        return self._engine

    # ------------------------------------------------------------------------------------------------------- one step
    def _forward(self, last: bool, *arguments: Any) -> Loss:
        self._micro_batches += 1
        self._is_last = last
        loss: Loss = self.engine(last, *arguments)
        return loss

    def backward(self, loss: Loss) -> None:
        total = loss.total if loss.total.requires_grad else self._touching_all(loss.total)
        self._count += loss.count
        if self._is_last:
            self._send_tail()
        self.engine.backward(total)

    def _send_tail(self) -> None:
        """Let the step's four numbers, which forward has completed, be summed while backward computes.

        One collective fewer that all ranks wait for. They all start it at the same place between DeepSpeed's.
        """
        before = self.group.bytes_sent
        self._summed_tail = self.engine.start_sum(torch.tensor(self._tail(), dtype=torch.float64, device=self.device))
        self.meter.bytes_sent += self.group.bytes_sent - before

    def _touching_all(self, total: Tensor) -> Tensor:
        """A loss without a gradient, with a gradient of zeros: every rank's backward is a collective."""
        if self.stage == 3:
            raise ValueError("the loss does not depend on the weights, and under zero/3 backward is a collective; "
                             "keep it attached (multiply by 0), or use stage 1 or 2")  # fmt: skip
        return torch.stack([0.0 * parameter.sum() for parameter in self.parameters]).sum() + total

    def _exchange(self, phase: int, count: float, last: bool) -> None:
        version, summed = self.progress.version, self._summed_tail()
        self.meter.bytes_sent += self._bytes_sent()
        for settings, number in zip(self.engine.groups, self.group_numbers, strict=True):
            settings.update(group_values(self.job.optimizer, number, version, self.agenda.budget_steps))
        self._update(summed[COUNT], version)
        self._end_step(summed)

    def _update(self, count: float, version: int) -> None:
        """Update by the gradients, a sum over `count`; fp16's may overflow under a loss scale that was too high."""
        if self.engine.step(count):
            self.updates += 1
            if self._needs_norm(version, last=True):
                self.meter.grad_norm = self.engine.grad_norm()
        elif self.job.precision != "fp16":
            raise FloatingPointError(f"the gradients are not finite at step {version}")
        else:
            self.skipped += 1
        if self.job.precision == "fp16":  # the same on all ranks: no sums, but the newest values
            self.meter.means["loss_scale"] = Mean(self.engine.scaler.loss_scale, 1.0)
            self.meter.means["skipped_steps"] = Mean(float(self.skipped), 1.0)

    def _bytes_sent(self) -> int:
        """What this rank has sent in the step, as little as the stage allows; DeepSpeed counts nothing."""
        size, passes = self.group.size, ring_passes(self.stage, self._micro_batches)
        self._micro_batches = 0
        element_bytes = 4 if self.job.precision == "fp32" else 2
        return round(passes * (size - 1) / size * element_bytes * self.layout.numel)

    @property
    def computes_together(self) -> bool:
        return self.stage == 3

    def reading(self) -> contextlib.AbstractContextManager[None]:
        return self.engine.gathering()

    # ----------------------------------------------------------------------------------------------------------- state
    def is_finite(self) -> bool:
        return all(bool(part.weights.isfinite().all()) for part in self.engine.parts())

    def pieces(self) -> Iterator[Piece]:
        names = moment_names(self.job.optimizer)
        for part in self.engine.parts():
            name = self.layout.entries[part.index].name
            yield MODEL, name, part.start, part.weights.cpu()
            for moment in names:
                vector = part.state.get(TORCH_NAMES.get(moment, moment))
                yield moment, name, part.start, torch.zeros(part.weights.shape) if vector is None else vector.cpu()

    def load_pieces(self, read: ReadPiece, clock: Mapping[str, Any]) -> None:
        self.updates, self.skipped = int(clock["updates"]), int(clock.get("skipped", 0))
        self.engine.scaler.load_state(clock.get("loss_scaler", {}))
        names = {TORCH_NAMES.get(name, name): name for name in moment_names(self.job.optimizer)}
        self.engine.create_state(lambda flat: first_state(self.job.optimizer, flat, self.updates))
        for part in self.engine.parts():
            parameter, stop = self.layout.entries[part.index].name, part.start + part.weights.numel()
            found = read(MODEL, parameter, part.start, stop)
            if found is None:
                raise UsageError(f"the checkpoint has no weights of {parameter}; start anew with --fresh, or use init")
            part.weights.copy_(from_numpy(found))
            for torch_name, vector in part.state.items():
                moment = read(names[torch_name], parameter, part.start, stop)
                vector.zero_() if moment is None else vector.copy_(from_numpy(moment))
            self.engine.keep(part)
        self.engine.refresh()
        self.load_clock(clock)

    def clock_state(self) -> dict[str, Any]:
        state = {**super().clock_state(), "updates": self.updates, "skipped": self.skipped}
        scale = self._engine.scaler.state() if self._engine is not None else {}  # none is chosen before `connect`
        return {**state, "loss_scaler": scale}

    def close(self) -> None:
        """Leave DeepSpeed's process-wide state as it was, for another run in this process."""
        if self._engine is not None:
            self._engine.close()
        if isinstance(self._group, ProcessGroup):
            deepspeed.leave(self._group)


def build_optimizer(spec: OptimizerSpec, groups: list[list[nn.Parameter]]) -> torch.optim.Optimizer:
    """The spec's optimiser as torch's own, which DeepSpeed lets update each rank's part."""
    given = [{"params": parameters} for parameters in groups]
    if isinstance(spec, SGDSpec):
        return torch.optim.SGD(given, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, fused=True)
    if isinstance(spec, (AdamSpec, AdamWSpec)):
        kind = torch.optim.Adam if isinstance(spec, AdamSpec) else torch.optim.AdamW
        return kind(given, lr=spec.lr, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps, weight_decay=0.0, fused=True)
    return torch.optim.RMSprop(given, lr=spec.lr, alpha=spec.alpha, eps=spec.eps, momentum=spec.momentum)


def first_state(spec: OptimizerSpec, flat: Tensor, updates: int) -> dict[str, Tensor]:
    """Torch's state of an optimiser for these weights after so many updates, all moments zero."""
    state = {TORCH_NAMES.get(name, name): torch.zeros_like(flat) for name in moment_names(spec)}
    if isinstance(spec, SGDSpec):
        return state
    fused = isinstance(spec, (AdamSpec, AdamWSpec))
    return {**state, "step": torch.tensor(float(updates), device=flat.device if fused else "cpu")}
