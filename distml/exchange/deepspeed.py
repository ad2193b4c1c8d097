"""DeepSpeed's engine (Rajbhandari et al. 2020, ZeRO) around one module whose forward is the task's loss.

Dataflow of a step, in each of its micro-batches:

    forward     the loss; under stage 3 the model's weights are gathered, submodule by submodule, and dropped again
    backward    gradients of loss x W / K; DeepSpeed adds them up over ranks, divides by W and keeps each rank's part
    step        gradients / (count / K), their norm, clipping, the optimiser on each rank's part, weights to everyone

K is a nominal count, the same on all ranks; `count` is what the step's gradients of all ranks are really a sum over,
which is only known when all micro-batches are done. So `SumScaler` stands in the place of DeepSpeed's loss scaler:
what the loss is multiplied by and what the gradients are divided by differ, and the update is the sum of all gradients
divided by the sum of all counts.

Everything of DeepSpeed that is not its documented interface is used in this file only.

Shapes: W ranks; a rank's part of a parameter is a range of its flattened elements, 1-D.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from distml.exchange.process_group import LOOPBACK, ProcessGroup, open_rendezvous

LOST = re.compile(r"gloo/|NCCL|Connection (closed|reset)|Broken pipe|Socket Timeout", re.IGNORECASE)


def library(device: torch.device) -> Any:
    """The package, told where it runs; without the compiler that it would look for, and without its lines."""
    os.environ["DS_ACCELERATOR"] = "cpu" if device.type == "cpu" else device.type
    import deepspeed

    _import_muon_uncompiled()
    # Which kernels could be compiled: it would try that with the compiler at every start, whose errors may reach the
    # terminal. It only asks for one of inference, which it would then compile.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)  # older names of what it calls
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)  # its own, of a first layer
    return deepspeed


def _import_muon_uncompiled() -> None:
    """Import its Muon without having torch compile three functions of it.

    DeepSpeed imports it to ask whether an optimiser is one. To decorate these functions imports torch's Inductor, which
    takes 1 s of each rank's start, and nothing here calls them.
    """
    from deepspeed.runtime import compiler

    before = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        with contextlib.suppress(ImportError):  # as DeepSpeed does
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = before


def join(group: ProcessGroup | None, device: torch.device, timeout_s: float) -> ProcessGroup:
    """The group that DeepSpeed is to use: this one, which is torch's default group already; or one of a single rank."""
    if group is None:
        listener = open_rendezvous(LOOPBACK)
        group = ProcessGroup(0, 1, LOOPBACK, listener.getsockname()[1], listener, device, timeout_s)
    os.environ |= {"RANK": str(group.rank), "WORLD_SIZE": str(group.size), "LOCAL_RANK": "0"}
    return group


def leave(group: ProcessGroup) -> None:
    """Close the group, and let DeepSpeed forget it: another may be opened in this process."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    group.close()
    functional.linear = torch._C._nn.linear  # stage 3's stays in its place
    groups._release_process_group_references(group=None)
    comm.cdb = None


def cut_when_built(device: torch.device, config: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Inside, a module's parameters are cut over the ranks as soon as it is constructed (stage 3)."""
    init: contextlib.AbstractContextManager[Any] = library(device).zero.Init(config_dict_or_path=config)
    return init


def is_lost(error: BaseException) -> bool:
    """Whether an error is that of a connection, not of whoever computes."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(LOST.search(str(error))))


@contextlib.contextmanager
def peers(group: ProcessGroup, operation: str) -> Iterator[None]:
    """Inside, an error of a connection becomes `PeerLost`, and closes this rank's so that others hear of it."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise group.lost(operation, error) from error


class SumScaler:
    """In the place of DeepSpeed's loss scaler, which goes on choosing fp16's dynamic scale.

    Args:
        inner: DeepSpeed's own.
        world_size: W.
        nominal: K.
    """

    def __init__(self, inner: Any, world_size: int, nominal: float) -> None:
        self.inner, self.world_size, self.nominal = inner, world_size, nominal
        self.dynamic = inner.dynamic
        self.cur_scale = 1.0  # what a step divides by

    def scale_loss(self, loss: Tensor) -> Tensor:
        """What backward begins with. Always a new tensor: DeepSpeed tells it from the loss by that."""
        scale: float = self.inner.cur_scale * self.world_size / self.nominal
        return loss * scale

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by lest small gradients vanish; 1 except under fp16."""
        return float(self.inner.cur_scale)

    def expect(self, count: float) -> None:
        """The gradients of this step are a sum over so many; over nothing, they are zero."""
        self.cur_scale = self.inner.cur_scale * (count / self.nominal if count else 1.0)

    def update_scale(self, overflow: bool) -> None:
        """After a step's gradients have been looked at. What this step divides by stays as it is."""
        self.inner.update_scale(overflow)

    def state(self) -> dict[str, Any]:
        """JSON values; nothing where no scale is chosen."""
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {name: getattr(self.inner, name) for name in names} if self.dynamic else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        for name, value in state.items() if self.dynamic else ():
            setattr(self.inner, name, value)


class UsedParameters:
    """Watches that all ranks' losses depend on the same parameters, in every backward.

    DeepSpeed puts gradients into buckets as they come, and adds up whatever ranks have at the same place of a bucket.
    So with other parameters on another rank the sums would be of different ones' gradients, if they came to an end.

    Args:
        names: of the parameters.
        group: of all ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], names: Sequence[str], group: ProcessGroup) -> None:
        self.parameters, self.names, self.group = parameters, names, group
        self.used: bytes | None = None

    def __call__(self, _: Tensor) -> None:
        """The hook of a loss, which runs as its backward begins.

        Raises:
            ValueError: a parameter is used here and not there, or now and not before.
        """
        node, runs = torch.autograd.graph._get_grad_fn_or_grad_acc, torch._C._will_engine_execute_node
        used = bytes(runs(node(parameter)) for parameter in self.parameters)
        if self.used is None:
            for rank, other in enumerate(self.group.all_gather(used)):
                self._compare(used, other, f"rank {self.group.rank}", f"rank {rank}")
            self.used = used
        self._compare(used, self.used, "this step", "the first")

    def _compare(self, one: bytes, other: bytes, here: str, there: str) -> None:
        if one != other:
            place = next(index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
            has, lacks = (here, there) if one[place] else (there, here)
            raise ValueError(
                f"the loss of {has} depends on {self.names[place]}, that of {lacks} does not; under zero it must "
                "depend on the same parameters on all ranks and in all steps; use all_reduce"
            )


class SameUses:
    """Watches that a model whose weights are cut is used on all ranks alike outside the loss: each use gathers weights.

    A use is a forward of the model or of one of its modules, called by whoever is no module of it.

    Args:
        model: the whole of it.
        group: of all ranks.
    """

    def __init__(self, model: nn.Module, group: ProcessGroup) -> None:
        self.group, self.depth, self.made = group, 0, 0
        self.names = {module: f"model.{name}" if name else "model" for name, module in model.named_modules()}
        self.watched = list(eager_modules(model))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a use begins when all ranks make it, and the end is reached when all are there.

        Raises:
            ValueError: one rank uses something else than another, or more of it; on all ranks.
        """
        handles = [module.register_forward_pre_hook(self._begin, prepend=True) for module in self.watched]
        handles += [module.register_forward_hook(self._end, always_call=True) for module in self.watched]
        try:
            yield
            self._agree("")
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, _: Any) -> None:
        if self.depth == 0:
            self._agree(self.names[module])
            self.made += 1
        self.depth += 1

    def _end(self, *_: Any) -> None:
        self.depth -= 1

    def _agree(self, use: str) -> None:
        uses = [other.decode() for other in self.group.all_gather(use.encode())]
        for rank, other in enumerate(uses):
            if other == uses[0]:
                continue
            number, (more, less) = self.made + 1, (0, rank) if uses[0] else (rank, 0)
            different = f"forward {number} in evaluate is of {uses[0]} on rank 0, of {other} on rank {rank}"
            unequal = f"rank {more} makes {number} forwards or more in evaluate, rank {less} {self.made}"
            raise ValueError(f"{unequal if not uses[less] else different}; under zero/3 each is a collective: make the "
                             "same on all ranks, as of part.batches(), or use stage 1 or 2")  # fmt: skip


def eager_modules(module: nn.Module) -> Iterator[nn.Module]:
    """It and all in it but for what is compiled, where a hook would be compiled too."""
    if module._compiled_call_impl is None:
        yield module
        for child in module.children():
            yield from eager_modules(child)


class _Total(nn.Module):
    """The wrapped module. What backward begins with comes first and by itself: DeepSpeed looks into no dataclass."""

    def __init__(self, loss: Callable[..., Any], model: nn.Module) -> None:
        super().__init__()
        self.loss, self.model = loss, model

    def forward(self, *arguments: Any) -> tuple[Tensor, Any]:
        loss = self.loss(*arguments)
        return loss.total, loss


@dataclass(frozen=True)
class Part:
    """This rank's part of one trained parameter.

    Attributes:
        index: of the parameter.
        start: its first element in the flattened parameter.
        weights: float32.
        state: the optimiser's vectors for these elements, by torch's names; empty before the first step.
        away: whether all this is a copy of what lies on a drive; else they are views.
    """

    index: int
    start: int
    weights: Tensor
    state: dict[str, Tensor]
    away: bool = False


class ShardedEngine:
    """A loss whose model is under DeepSpeed; called like it.

    Args:
        loss: gives a dataclass with the loss of arguments, `total`. A function, not a module.
        model: what it computes with.
        parameters: the trained ones by name, in the order by which parts are numbered.
        optimizer: over them, in groups.
        config: DeepSpeed's.
        group: of all ranks, torch's default group.
        nominal: about what a step's gradients are a sum over.
    """

    def __init__(
        self, loss: Callable[..., Any], model: nn.Module, parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer, config: dict[str, Any], group: ProcessGroup, nominal: float,
    ) -> None:  # fmt: skip
        self.group = group
        self.parameters: list[Any] = list(parameters.values())  # with attributes of DeepSpeed
        self.index = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        self.watch = UsedParameters(self.parameters, list(parameters), group)
        whole, deepspeed = _Total(loss, model), library(self.parameters[0].device)
        with peers(self.group, "initialisation"):
            self.engine, self.optimizer, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=config)
        self.scaler = SumScaler(self.optimizer.loss_scaler, group.size, nominal)
        self.optimizer.loss_scaler = self.scaler
        self.cuts_weights = bool(self.engine.zero_optimization_partition_weights())
        self.model = model

    # ------------------------------------------------------------------------------------------------------- one step
    def __call__(self, last: bool, *arguments: Any) -> Any:
        """The loss of a micro-batch; `last` of its step."""
        self.engine.set_gradient_accumulation_boundary(last)
        with peers(self.group, "forward"):
            total, loss = self.engine(*arguments)
        return dataclasses.replace(loss, total=total)

    def backward(self, total: Tensor) -> None:
        """Add the gradients of this sum to those of the step."""
        total.register_hook(self.watch)
        with peers(self.group, "backward"), torch.enable_grad():
            self.engine.backward(total, scale_wrt_gas=False)

    def start_sum(self, vector: Tensor) -> Callable[[], list[float]]:
        """Begin to sum a small vector over all ranks, beside what is computed meanwhile; what waits for the sums."""
        with peers(self.group, "all_reduce"):
            future = self.group.start_all_reduce(vector)

        def wait() -> list[float]:
            with peers(self.group, "all_reduce"):
                future.wait()
            sums: list[float] = vector.tolist()
            return sums

        return wait

    def step(self, count: float) -> bool:
        """Update by the step's gradients, a sum over `count`; False: they overflowed, and nothing was updated."""
        self.scaler.expect(count)
        with peers(self.group, "step"):
            self.engine.step()
        return not self.optimizer.overflow

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups, whose settings the next step takes."""
        groups: list[dict[str, Any]] = self.optimizer.optimizer.param_groups
        return groups

    def grad_norm(self) -> float:
        """Of the last step's mean gradient, before clipping."""
        return float(self.engine.get_global_grad_norm())

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Inside, weights are gathered when they are read, as in the loss: also by whom they do not belong to.

        So they are there for tied layers, and for whoever looks at a weight itself. Every rank must read the same.

        Raises:
            ValueError: ranks use the model differently (`SameUses`).
        """
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, ensure_zero_ordered_dict

        if not self.cuts_weights:
            yield
            return
        modules: list[Any] = list(self.model.modules())
        for module in modules:
            ensure_zero_ordered_dict(module)
            module._parameters._in_forward = True
        FWD_MODULE_STACK.append(self.model)  # in whose name they are gathered
        try:
            with peers(self.group, "gathering outside the loss"), SameUses(self.model, self.group).watching():
                yield
        finally:
            FWD_MODULE_STACK.pop()
            for module in modules:
                module._parameters._in_forward = False
        self.optimizer._partition_all_parameters()  # after an error there is nothing that goes on

    # ----------------------------------------------------------------------------------------------------------- state
    def parts(self) -> Iterator[Part]:
        """This rank's part of each parameter that it has one of; what is written into it is to be kept by `keep`."""
        yield from self._parts_of_weights() if self.cuts_weights else self._parts_of_groups()

    def _parts_of_groups(self) -> Iterator[Part]:
        """Stages 1 and 2 lay a group's parameters end to end, and cut that into W."""
        zero = self.optimizer
        for group, flat in enumerate(zero.single_partition_of_fp32_groups):
            size = int(zero.partition_size[group])
            first = self.group.rank * size
            state = vectors(zero.optimizer.state.get(flat, {}), flat)
            offsets = zero.round_robin_bit16_offsets[group]
            for parameter, offset in zip(zero.round_robin_bit16_groups[group], offsets, strict=True):
                start, stop = max(first, offset), min(first + size, offset + parameter.numel())
                if start < stop:
                    own = slice(start - first, stop - first)
                    yield self._part(parameter, start - offset, flat, state, own)

    def _parts_of_weights(self) -> Iterator[Part]:
        """Stage 3 cuts each parameter into W, the last of them padded."""
        zero = self.optimizer
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            state, offset = vectors(zero.optimizer.state.get(flat, {}), flat), 0
            away = bool(zero._swappable_optimizer_subgroup(number))
            for parameter in zero.fp16_groups[number]:
                size = int(parameter.partition_numel())
                start = self.group.rank * size
                length = min(size, parameter.ds_numel - start)
                if length > 0 and away:
                    yield self._fetched(parameter, start, length, list(state))
                elif length > 0:
                    yield self._part(parameter, start, flat, state, slice(offset, offset + length))
                offset += size

    def _fetched(self, parameter: Any, start: int, length: int, names: list[str]) -> Part:
        """A part that DeepSpeed keeps on a drive. Never run here: NVMe needs a library that DeepSpeed compiles."""
        named = {name: self.optimizer.get_local_fp32_param(parameter, name)[:length] for name in names}
        weights = self.optimizer.get_local_fp32_param(parameter)[:length]
        return Part(self.index[id(parameter)], start, weights, named, away=True)

    def keep(self, part: Part) -> None:
        """Let what was written into a part be the state."""
        if not part.away:
            return
        parameter = self.parameters[part.index]
        for name, values in ((None, part.weights), *part.state.items()):
            whole = values.new_zeros(int(parameter.partition_numel()))
            whole[: len(values)] = values
            self.optimizer.set_local_hp_param(whole, parameter, name)

    def _part(
        self, parameter: nn.Parameter, start: int, flat: Tensor, state: dict[str, Tensor], own: slice
    ) -> Part:  # fmt: skip
        named = {name: vector[own] for name, vector in state.items()}
        return Part(self.index[id(parameter)], start, flat.detach()[own], named)

    def create_state(self, create: Callable[[Tensor], dict[str, Tensor]]) -> None:
        """Give the optimiser a state before its first step: for each vector of weights, what `create` returns."""
        zero = self.optimizer
        flats = zero.fp32_partitioned_groups_flat if self.cuts_weights else zero.single_partition_of_fp32_groups
        for flat in flats:
            zero.optimizer.state[flat] = create(flat)

    @torch.no_grad()
    def refresh(self) -> None:
        """The weights that are computed with follow those in `parts`. A collective."""
        zero = self.optimizer
        with peers(self.group, "gathering the weights"):
            if not self.cuts_weights:
                zero.update_lp_params()
                return
            zero._partition_all_parameters()
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def live_bytes(self) -> dict[str, int]:
        """Bytes that are held now: of the weights, the gradients, the optimiser (with its float32 weights)."""
        zero = self.optimizer
        if self.cuts_weights:
            weights = [tensor for p in self.parameters for tensor in (p.data, p.ds_tensor)]
            gradients = [*(p.grad for p in self.parameters), zero.grad_partitions_flat_buffer]
            flats = zero.fp32_partitioned_groups_flat
        else:
            weights = [p.data for p in self.parameters]
            kept = [tensor for tensors in zero.averaged_gradients.values() for tensor in tensors or ()]
            gradients = [*kept, *(tensor for p in self.parameters for tensor in (p.grad, p.grad_accum))]
            flats = zero.single_partition_of_fp32_groups
        moments = [value for flat in flats for value in vectors(zero.optimizer.state.get(flat, {}), flat).values()]
        seen: set[int] = set()
        return {"weights": unseen_bytes(weights, seen), "gradients": unseen_bytes(gradients, seen),
                "optimizer": unseen_bytes([*flats, *moments], seen)}  # fmt: skip

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module, unless the group is gone already, and with it all of DeepSpeed."""
        if dist.is_initialized():
            self.engine.destroy()


def unseen_bytes(tensors: Sequence[Tensor | None], seen: set[int]) -> int:
    """Bytes of their storages that are not in `seen`, where they are noted."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in tensors if tensor is not None}  # fmt: skip
    found = sum(size for place, size in storages.items() if place not in seen)
    seen |= set(storages)
    return found


def vectors(state: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    """Those of an optimiser's values for a tensor that have an element for each of its own."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.shape == like.shape}
