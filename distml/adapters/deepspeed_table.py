"""Writes `distml/spec/deepspeed_table.py`: DeepSpeed's settings, read off the installed DeepSpeed.

DeepSpeed forgets unknown keys at the top of its configuration in silence, and knows no line numbers. The table holds
every key that it looks for there, and those within the blocks that `strategy.deepspeed` passes through. So a spec is
checked at every depth without importing DeepSpeed. A test compares the table with what `table()` says.

    python -m distml.adapters.deepspeed_table        rewrites the file, for another version of DeepSpeed
"""

from __future__ import annotations

import enum
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedConfig
from deepspeed.runtime import constants
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor import aio_config as aio
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config,
}  # fmt: skip
DTYPES = "in=fp32|fp16|bf16"  # as DeepSpeed's functions have them, not its models
LISTED = {
    constants.COMMUNICATION_DATA_TYPE: DTYPES,
    f"{constants.DATA_TYPES}.{constants.GRAD_ACCUM_DTYPE}": DTYPES,
    f"{constants.DATA_TYPES}.{constants.PARAM_DTYPE}": DTYPES,
    f"{constants.DATA_TYPES}.{constants.BUFFER_DTYPE}": DTYPES,
    f"{constants.DATA_TYPES}.{constants.KEEP_IN_FP32_MODULES}": "list str",
    constants.TRAIN_BATCH_SIZE: "int gt=0",
    constants.TRAIN_MICRO_BATCH_SIZE_PER_GPU: "int gt=0",
    constants.GRADIENT_ACCUMULATION_STEPS: "int gt=0",
}
AIO = (aio.AIO_BLOCK_SIZE, aio.AIO_QUEUE_DEPTH, aio.AIO_INTRA_OP_PARALLELISM, aio.AIO_SINGLE_SUBMIT,
       aio.AIO_OVERLAP_EVENTS, aio.AIO_USE_GDS)  # fmt: skip


class _Asked(dict[str, Any]):
    """A configuration that notes which keys DeepSpeed looks for."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value; the key is noted."""
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        """Itself: whoever asks whether a key is among them is noted."""
        return self


def table() -> dict[str, dict[str, str]]:
    """The table's constant by name: dotted keys and what each may be."""
    config = _Asked({"train_batch_size": 1})
    DeepSpeedConfig(config)
    found = dict.fromkeys(config.asked, "any") | LISTED
    found |= dict.fromkeys((aio.AIO, constants.DATA_TYPES, *MODELS), "dict")
    found |= {f"{aio.AIO}.{key}": _kind_of(aio.AIO_DEFAULT_DICT[key]) for key in AIO}
    for name, model in MODELS.items():
        found |= dict(_fields(name, model))
    return {"SETTINGS": dict(sorted(found.items()))}


def _fields(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        key = f"{prefix}.{field.alias or name}"
        inner = next(iter(_models(field.annotation)), None)
        if inner is not None:
            yield key, "dict"
            yield from _fields(key, inner)
            continue
        bounds = [f"{bound}={getattr(one, bound)}" for one in field.metadata for bound in ("ge", "gt", "le", "lt")
                  if hasattr(one, bound)]  # fmt: skip
        yield key, " ".join([*sorted(_kinds(field.annotation)), *bounds])


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models(inner)


def _kinds(annotation: Any) -> set[str]:
    """The kinds of YAML values that a field takes; null, which is always one, is not named."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return {kind for inner in typing.get_args(annotation) for kind in _kinds(inner)}
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        values = [member.value for member in annotation]
        return {"int"} if isinstance(values[0], int) else {"in=" + "|".join(values)}
    if annotation in (bool, str, list, dict):
        return {annotation.__name__}
    if annotation in (int, float):
        return {"int"} if annotation is int else {"float", "int"}
    if origin in (list, dict):
        return {origin.__name__}
    return {"str"} if annotation is Path else set() if annotation is type(None) else {"any"}


def _kind_of(default: Any) -> str:
    return "int gt=0" if type(default) is int else type(default).__name__


HEADER = """\"\"\"DeepSpeed's settings: written by `python -m distml.adapters.deepspeed_table`, not by hand.

Dotted keys of its configuration, and what each may be (see `tables.py`). Blocks that are not passed through are `any`.
\"\"\"
"""


def source() -> str:
    """The table's file, before it is formatted."""
    constants = [f"{name}: dict[str, str] = {json.dumps(value, indent=4)}" for name, value in table().items()]
    return "\n".join([HEADER, *constants, ""])


if __name__ == "__main__":
    (Path(__file__).parents[1] / "spec" / "deepspeed_table.py").write_text(source(), encoding="utf-8")
