"""What a language model's block must be completed with, and the rules that it must keep. No text is read, only listed.

Paths become absolute, so that the run directory's spec finds the same files. A folder that `distml tokenize` wrote
brings its own tokeniser and its own splits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distml.errors import UsageError
from distml.spec.corpus_files import iterate_files
from distml.spec.language import (
    STDLIB,
    TOKENS_FORMAT,
    BPESpec,
    BytesSpec,
    CorpusSpec,
    GPTSpec,
    LanguageModelSpec,
    MaskedLanguageModelSpec,
    TextBlock,
    TokenizerFileSpec,
)
from distml.spec.messages import Problem
from distml.spec.schema import JobSpec, TaskSpec
from distml.spec.yaml import KeyPath

TextTaskSpecs = LanguageModelSpec | MaskedLanguageModelSpec
DATA: KeyPath = ("task", "data")
TOKENIZER: KeyPath = ("task", "tokenizer")
MODEL: KeyPath = ("task", "model")
RUN_TOKENIZER = "tokenizer.json"  # of a run directory


# ---------------------------------------------------------------------------------------------------------- completing
def complete_text(job: JobSpec, directory: Path, written: Mapping[str, Any]) -> tuple[JobSpec, list[Problem]]:
    """The job with absolute paths and, for a folder of tokens, with its tokeniser; what is missing or contradicts.

    Args:
        directory: where the spec lies. Beside a run's own spec lies its tokeniser: the text may be gone then.
        written: the task's keys as they are written.
    """
    task = job.task
    if not isinstance(task, TextTaskSpecs):
        return job, []
    data, tokenizer = task.data, task.tokenizer
    problems: list[Problem] = []
    if data.path != STDLIB:
        data = data.model_copy(update={"path": absolute(data.path, directory)})
    if isinstance(tokenizer, TokenizerFileSpec):
        tokenizer = tokenizer.model_copy(update={"path": absolute(tokenizer.path, directory)})
    if is_token_folder(Path(data.path)):
        problems += _check_token_folder(data)
        own = TokenizerFileSpec(name="file", path=str(Path(data.path) / RUN_TOKENIZER))
        if "tokenizer" in written and tokenizer != own:
            problems.append(Problem(
                f"task.data {data.path} is tokenised already, by the tokenizer.json in it; leave task.tokenizer out",
                (TOKENIZER, DATA)))  # fmt: skip
        tokenizer = own
    job = job.model_copy(update={"task": task.model_copy(update={"data": data, "tokenizer": tokenizer})})
    if not (directory / RUN_TOKENIZER).is_file():
        problems += _check_files(data, tokenizer)
    return job, problems


def absolute(path: str, directory: Path) -> str:
    """A path beside the spec; one that is not there but in the current directory, as `--set` may name it: that."""
    beside, here = (directory / path).absolute(), Path(path).absolute()
    return str(here if here.exists() and not beside.exists() else beside)


def is_token_folder(path: Path) -> bool:
    """Whether `distml tokenize` wrote it."""
    try:
        meta = json.loads((path / "meta.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(meta, dict) and meta.get("format") == TOKENS_FORMAT


def _check_token_folder(data: CorpusSpec) -> Iterator[Problem]:
    for key in ("pattern", "validation", "test", "max_bytes"):
        value, default = getattr(data, key), CorpusSpec.model_fields[key].default
        if value != default:
            yield Problem(
                f"task.data.{key} {value} has no effect on tokens that are cut already; leave it out, or give it to "
                "`distml tokenize`",
                ((*DATA, key),),
            )


def _check_files(data: CorpusSpec, tokenizer: object) -> Iterator[Problem]:
    missing = None if is_token_folder(Path(data.path)) else _missing_text(data)
    if missing is not None:
        yield Problem(f"task.data.path: {missing}", ((*DATA, "path"), DATA))
    if isinstance(tokenizer, TokenizerFileSpec) and file_vocabulary(Path(tokenizer.path)) is None:
        found = "is no tokeniser's file" if Path(tokenizer.path).is_file() else "does not exist"
        yield Problem(
            f"task.tokenizer.path: {tokenizer.path} {found}; name a tokenizer.json, of the `tokenizers` library or of "
            "`distml tokenize`",
            ((*TOKENIZER, "path"), TOKENIZER),
        )


def _missing_text(data: CorpusSpec) -> str | None:
    """Why a corpus has no text; None: it has a file, which may yet turn out to be no text."""
    if data.path != STDLIB and not Path(data.path).exists():
        return f"there is no {data.path}; name a text file, a folder of them, or {STDLIB}"
    try:
        next(iterate_files(data))
    except UsageError as error:
        return str(error)
    return None


# ---------------------------------------------------------------------------------------------------------- vocabulary
def known_vocabulary(task: TextTaskSpecs) -> int | None:
    """How many tokens the tokeniser has, as far as no text must be read for it; None: that takes the text."""
    tokenizer = task.tokenizer
    if isinstance(tokenizer, BytesSpec):
        return 257 + isinstance(task, MaskedLanguageModelSpec)
    if isinstance(tokenizer, BPESpec):
        return tokenizer.vocabulary
    return file_vocabulary(Path(tokenizer.path)) if isinstance(tokenizer, TokenizerFileSpec) else None


def file_vocabulary(path: Path) -> int | None:
    """How many tokens the tokeniser in a file has; None: the file is missing or none."""
    try:
        parsed = json.loads(path.read_bytes())
        if parsed.get("format") == "distml-tokenizer":
            mask = bool(parsed["mask"])
            if parsed["name"] == "bytes":
                return 257 + mask
            return len(set(parsed["characters"])) + 2 + mask if parsed["characters"] else None
        tokens = parsed["model"]["vocab"]
        numbers = list(tokens.values()) if isinstance(tokens, dict) else list(range(len(tokens)))
        return int(max([*numbers, *(token["id"] for token in parsed.get("added_tokens", []))])) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


# --------------------------------------------------------------------------------------------------------------- rules
def check_text(task: TextTaskSpecs) -> Iterator[Problem]:
    """Every rule that a language model's block breaks."""
    yield from _splits(task.data)
    yield from _shape(task)
    model, known = task.model, known_vocabulary(task)
    if model.max_positions is not None and task.block > model.max_positions:
        yield Problem(
            f"task.block {task.block} is longer than task.model.max_positions {model.max_positions}; "
            "lower it, raise max_positions, or leave max_positions out",
            (("task", "block"), (*MODEL, "max_positions")),
        )
    if model.vocabulary is not None and known is not None and known > model.vocabulary:
        yield Problem(
            f"task.model.vocabulary {model.vocabulary} is smaller than the tokeniser's {known} tokens; "
            f"set at least {known}, or leave it out",
            ((*MODEL, "vocabulary"), TOKENIZER),
        )


def _splits(data: CorpusSpec) -> Iterator[Problem]:
    for key in ("validation", "test"):
        if getattr(data, key) == 0.0:
            yield Problem(f"task.data.{key} is 0, but every run is measured on that split; set for example 0.05",
                          ((*DATA, key),))  # fmt: skip
    if data.validation + data.test >= 1.0:
        yield Problem(
            f"task.data.validation {data.validation:g} and test {data.test:g} leave no documents to train on; "
            "their sum must be less than 1",
            ((*DATA, "validation"), (*DATA, "test"), DATA),
        )


def _shape(task: TextBlock) -> Iterator[Problem]:
    model = getattr(task, "model")  # noqa: B009 (each task's block declares its own)
    if model.width % model.heads:
        yield Problem(
            f"task.model.heads {model.heads} does not divide task.model.width {model.width}; "
            f"set heads to {_divisors(model.width, model.heads)}, or width to a multiple of {model.heads}",
            ((*MODEL, "heads"), (*MODEL, "width"), MODEL),
        )
    if not isinstance(model, GPTSpec):
        return
    if model.kv_heads is not None and model.heads % model.kv_heads:
        yield Problem(
            f"task.model.kv_heads {model.kv_heads} does not divide task.model.heads {model.heads}; "
            f"set kv_heads to {_divisors(model.heads, model.kv_heads)}",
            ((*MODEL, "kv_heads"), (*MODEL, "heads")),
        )
    if model.positions == "rotary" and model.width % model.heads == 0 and (model.width // model.heads) % 2:
        yield Problem(
            f"positions rotary turns pairs, and task.model.width {model.width} / heads {model.heads} = "
            f"{model.width // model.heads} is odd; change one of them, or set positions: learned",
            ((*MODEL, "positions"), (*MODEL, "heads")),
        )


def _divisors(number: int, near: int) -> str:
    """The divisors of a number on both sides of one that does not divide it."""
    below = max(n for n in range(1, near) if number % n == 0)
    above = next((n for n in range(near + 1, number + 1) if number % n == 0), None)
    return f"{below}" if above is None else f"{below} or {above}"


def task_tokens(task: TaskSpec) -> int | None:  # type: ignore[valid-type]
    """Tokens of each example of a task; None: it has none."""
    return task.tokens_per_example if isinstance(task, TextBlock) else None
