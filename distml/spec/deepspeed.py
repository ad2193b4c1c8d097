"""What `strategy.deepspeed` may hold: DeepSpeed's own settings, checked at every depth against `deepspeed_table.py`.

Three kinds are refused: what the spec says elsewhere, what would change which update is made, and what no run here has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distml.spec.deepspeed_table import SETTINGS
from distml.spec.messages import Problem, near, shorten
from distml.spec.schema import JobSpec
from distml.spec.tables import check_value
from distml.spec.yaml import KeyPath
from distml.spec.zero import ZeroSpec

HERE: KeyPath = ("strategy", "deepspeed")
_ZERO = "zero_optimization"
_SUM = "the update is always the sum of all gradients divided by the sum of their counts"
_COMPILED = "it needs a kernel that DeepSpeed compiles at the start"
_CHECKPOINT = "checkpoints are distml's own, readable under every strategy; see the key 'checkpoint'"
_REPORTS = "metrics are written to metrics.jsonl and to what log.to names"
_PRINTS = "DeepSpeed's own reports are not kept; see timing/..., memory/... and `distml plan`"
_DATA = "the order of the data is the task's and the seed's"
_OTHER = "it is another way to train, which strategy zero does not run"
_OLD = "it is an older name"


def _reasons(prefix: str, rows: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return {f"{prefix}{key}": reason for reason, keys in rows for key in keys.split()}


REFUSED: dict[str, str] = {
    **_reasons("", (
        ("set the key 'optimizer'", "optimizer"),
        ("set optimizer.schedule", "scheduler"),
        ("set optimizer.clip_norm", "gradient_clipping"),
        ("set the key 'precision'", "amp torch_autocast"),
        (f"{_OLD}; set the key 'precision'", "bfloat16"),
        (_SUM, "prescale_gradients gradient_predivide_factor gradient_allreduce_op managed_gradient_accumulation"),
        ("gradients are dense here", "sparse_gradients"),
        ("for language models set task.model.activation_checkpointing", "activation_checkpointing"),
        ("for language models set task.model.compile", "compile"),
        (_CHECKPOINT, "checkpoint datastates_ckpt nebula"),
        (_REPORTS, "tensorboard wandb comet csv_monitor"),
        (_PRINTS, "steps_per_print wall_clock_breakdown memory_breakdown dump_state flops_profiler comms_logger "
         "log_level timers"),
        (_DATA, "curriculum_learning data_efficiency dataloader_drop_last"),
        ("`distml plan` says what fits", "autotuning"),
        ("a run goes on with any number of workers; change resources.workers", "elasticity"),
        (_OTHER, "pipeline tensor_parallel expert_parallel seq_parallel_communication_data_type hybrid_engine "
         "use_data_before_expert_parallelism sparse_attention compression_training quantize_training "
         "weight_quantization progressive_layer_drop eigenvalue"),
        ("distml sets it itself", "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer disable_python_gc "
         "disable_allgather graph_harvesting"),
        ("it is only printed", "vocabulary_size"),
    )),
    **_reasons("bf16.", (
        ("set the key 'precision'", "enabled"),
        (_COMPILED, "bf16_master_weights_and_grads bf16_optimizer_states"),
        ("only pipelines read it", "immediate_grad_update"),
    )),
    **_reasons("fp16.", (
        ("set the key 'precision'", "enabled"),
        ("under fp16 the loss is computed in autocast anyway", "auto_cast"),
        (_COMPILED, "fp16_master_weights_and_grads"),
    )),
    **_reasons("data_types.", (
        ("set the key 'precision'", "param_dtype"),
        ("buffers keep their own type", "buffer_dtype keep_in_fp32_modules"),
    )),
    **_reasons(f"{_ZERO}.", (
        ("set strategy.stage", "stage"),
        (f"{_OLD}; set strategy.offload", "cpu_offload cpu_offload_param cpu_offload_use_pin_memory"),
        (_CHECKPOINT, "load_from_fp32_weights elastic_checkpoint pipeline_loading_checkpoint "
         "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save"),
        (_OLD, "legacy_stage1"),
        ("clipping and train/grad_norm need it", "compute_grad_norm"),
        ("its updates are of older gradients, which no equality would hold for", "zenflow"),
        ("it is Muon's", "save_muon_momentum_buffer_in_memory"),
        (_COMPILED, "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients"),
        ("copies of weights within a host are not run here", "zero_hpz_partition_size"),
        (_COMPILED, "offload_optimizer.super_offload offload_optimizer.cpuadam_cores_perc"),
        ("all of the optimiser is offloaded, or none", "offload_optimizer.ratio"),
        ("it also takes as one those modules whose inputs have no gradient, and their backward fails; name modules in "
         "leaf_module", "stage3_module_granularity_threshold"),
    )),
}  # fmt: skip


def check_deepspeed(job: JobSpec, strategy: ZeroSpec) -> Iterator[Problem]:
    """Every rule that the block breaks."""
    wrong = list(_block((), strategy.deepspeed))
    yield from wrong
    zero = strategy.deepspeed.get(_ZERO)
    if isinstance(zero, Mapping):
        yield from _offload(strategy, zero)
        yield from _buckets(strategy, zero)
    yield from _gradients(job, strategy)
    if not wrong:
        yield from _without_effect(job, strategy)


def in_integers(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A block with integers for the whole numbers that are written as 5e8, as DeepSpeed's documentation writes them."""
    return {key: in_integers(value, f"{prefix}{key}.") if isinstance(value, Mapping) else
            _in_integer(value, SETTINGS.get(f"{prefix}{key}", "").split()) for key, value in block.items()}  # fmt: skip


def _in_integer(value: Any, entry: list[str]) -> Any:
    is_whole = type(value) is float and value.is_integer()
    return int(value) if is_whole and "int" in entry and "float" not in entry else value


def notes(job: JobSpec) -> list[str]:
    """Notes on what is passed through and was never run here."""
    if not isinstance(job.strategy, ZeroSpec):
        return []
    zero = job.strategy.deepspeed.get(_ZERO, {})
    return [f"{key} to NVMe is passed to DeepSpeed as it is, and unverified here"
            for key in ("offload_optimizer", "offload_param")
            if isinstance(zero.get(key), Mapping) and zero[key].get("device") == "nvme"]  # fmt: skip


def _block(inside: KeyPath, block: Mapping[str, Any]) -> Iterator[Problem]:
    """The keys of a block of the table, and of the blocks in it."""
    for key, value in block.items():
        path: KeyPath = (*inside, key)
        name, full = ".".join(map(str, path)), (*HERE, *path)
        if name in REFUSED:
            yield Problem(f"strategy.deepspeed.{name} cannot be set: {REFUSED[name]}", (full,))
        elif name not in SETTINGS:
            yield _unknown(full, inside)
        elif SETTINGS[name] == "dict" and isinstance(value, Mapping):
            yield from _block(path, value)
        else:
            yield from check_value(full, value, SETTINGS[name].split())


def _unknown(path: KeyPath, inside: KeyPath) -> Problem:
    prefix = "".join(f"{part}." for part in inside)
    known = [key.removeprefix(prefix) for key in SETTINGS if key.startswith(prefix)]
    known = [key for key in known if "." not in key and f"{prefix}{key}" not in REFUSED]
    close = near(str(path[-1]), known)
    where = "DeepSpeed has no such key; " if not close else ""
    hint = f"did you mean {close!r}?" if close else f"{where}known here: {', '.join(known)}"
    return Problem(f"unknown key {shorten(path[-1])} in {'.'.join(map(str, path[:-1]))}; {hint}", (path,))


def _offload(strategy: ZeroSpec, zero: Mapping[str, Any]) -> Iterator[Problem]:
    for key, what in (("offload_optimizer", "optimizer"), ("offload_param", "parameters")):
        block, path = zero.get(key), (*HERE, _ZERO, key)
        if not isinstance(block, Mapping):
            continue
        device = block.get("device")
        if device in ("cpu", "none"):
            yield Problem(f"strategy.deepspeed.{_ZERO}.{key}.device cannot be set to {device}: set strategy.offload: "
                          f"[{what}] or leave it out", ((*path, "device"),), "value")  # fmt: skip
        elif device is None and what not in strategy.offload:
            yield Problem(f"strategy.deepspeed.{_ZERO}.{key} is for what is offloaded; set strategy.offload: [{what}], "
                          "or device: nvme", (path,))  # fmt: skip
        elif device == "nvme" and block.get("nvme_path") is None:
            yield Problem(f"strategy.deepspeed.{_ZERO}.{key}.device nvme needs nvme_path, a folder on it; add it",
                          ((*path, "device"),))  # fmt: skip
        if key == "offload_param" and strategy.stage < 3 and device == "nvme":
            yield Problem(parameters_need_stage_3(strategy), (path,))


def _buckets(strategy: ZeroSpec, zero: Mapping[str, Any]) -> Iterator[Problem]:
    gather = zero.get("allgather_bucket_size")
    if type(gather) is int and gather % 2:
        yield Problem(f"strategy.deepspeed.{_ZERO}.allgather_bucket_size {gather} is odd, DeepSpeed asks for an even "
                      f"number; set {gather + 1}", ((*HERE, _ZERO, "allgather_bucket_size"),), "value")  # fmt: skip
    for key in (key for key in zero if key == "sub_group_size" or str(key).startswith("stage3_")):
        name = f"{_ZERO}.{key}"
        if strategy.stage < 3 and name in SETTINGS and name not in REFUSED:
            yield Problem(f"strategy.deepspeed.{name} is for stage 3, the stage is {strategy.stage}; "
                          "remove it or set strategy.stage: 3", ((*HERE, _ZERO, key),))  # fmt: skip


def _gradients(job: JobSpec, strategy: ZeroSpec) -> Iterator[Problem]:
    """What they add up in."""
    types, path = strategy.deepspeed.get("data_types"), (*HERE, "data_types", "grad_accum_dtype")
    adds_up_in = types.get("grad_accum_dtype") if isinstance(types, Mapping) else None
    if adds_up_in == "fp32" and job.precision == "bf16" and strategy.stage == 1:
        yield Problem(
            "under zero/1 in bf16 gradients that add up in fp32 are another optimiser of DeepSpeed's, which is not run "
            "here; set strategy.stage: 2, or remove grad_accum_dtype",
            (path,),
        )
    elif adds_up_in in ("fp16", "bf16") and adds_up_in != job.precision:
        yield Problem(f"gradients in {adds_up_in} are for precision {adds_up_in}, the precision is {job.precision}; "
                      f"remove grad_accum_dtype or set precision: {adds_up_in}", (path,), "value")  # fmt: skip


def _without_effect(job: JobSpec, strategy: ZeroSpec) -> Iterator[Problem]:
    """Blocks that DeepSpeed would not look at."""
    given = strategy.deepspeed
    for key in ("fp16", "bf16"):
        if given.get(key) is not None and job.precision != key:
            yield Problem(f"strategy.deepspeed.{key} is for precision {key}, the precision is {job.precision}; remove "
                          f"it or set precision: {key}", ((*HERE, key),))  # fmt: skip
    zero = given.get(_ZERO)
    blocks = [zero.get(key) for key in ("offload_optimizer", "offload_param")] if isinstance(zero, Mapping) else []
    to_drive = any(isinstance(block, Mapping) and block.get("device") == "nvme" for block in blocks)
    if given.get("aio") is not None and not to_drive:
        yield Problem(f"strategy.deepspeed.aio is for what is offloaded to a drive; remove it or set device: nvme in "
                      f"{_ZERO}.offload_optimizer", ((*HERE, "aio"),))  # fmt: skip


def parameters_need_stage_3(strategy: ZeroSpec) -> str:
    """Why weights cannot be offloaded where every rank computes with all of them."""
    return (f"offloading parameters needs stage 3, where weights are gathered as they are used, the stage is "
            f"{strategy.stage}; set strategy.stage: 3, or offload the optimizer only")  # fmt: skip
