"""`distml tokenize`: text as tokens in a folder that a spec's `data` names, so that no run has to do it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distml.errors import UsageError
from distml.spec.corpus_files import find_files
from distml.spec.language import STDLIB, CorpusSpec, LanguageModelSpec, MaskedLanguageModelSpec
from distml.spec.messages import describe
from distml.tasks.corpus import SPLITS
from distml.tasks.text import tokenize
from distml.tasks.tokens import TokenFolder

BUILT_IN = ("bytes", "characters", "bpe")


def tokenize_command(
    path: str, tokenizer: str, vocabulary: int | None, mask: bool, out: Path, seed: int, settings: dict[str, Any]
) -> int:
    """Cut, deal out and tokenise a corpus into OUT, and print what came of it.

    Args:
        path: as `task.data.path`.
        tokenizer: `bytes`, `characters`, `bpe`, or a tokenizer.json's path.
        vocabulary: of bpe; None: the default.
        mask: reserve a token for masked ones, as masked_language_model needs it.
        seed: deals out the documents.
        settings: further keys of `task.data`.

    Raises:
        UsageError: an option, the text or the place is not right.
    """
    if out.exists():
        raise UsageError(f"{out} exists; nothing was written; choose another --out")
    if path != STDLIB and not Path(path).exists():
        raise UsageError(f"there is no {path}; name a text file, a folder of them, or {STDLIB}")
    task_class = MaskedLanguageModelSpec if mask else LanguageModelSpec
    name = "masked_language_model" if mask else "language_model"
    try:
        data = CorpusSpec.model_validate({"path": path, **settings})
        task = task_class.model_validate({"name": name, "data": data, "tokenizer": _tokenizer(tokenizer, vocabulary)})
    except ValidationError as error:
        found = error.errors()[0]
        raise UsageError(
            f"--{str(found['loc'][-1]).replace('_', '-')} {describe(found['input'])}: {found['msg']}"
        ) from None
    started = time.perf_counter()
    try:
        tokenize(task, seed, find_files(data), out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from error
    _show(TokenFolder(out), time.perf_counter() - started)
    return 0


def _tokenizer(name: str, vocabulary: int | None) -> dict[str, Any]:
    if vocabulary is not None and name != "bpe":
        raise UsageError(f"--vocabulary {vocabulary} is for --tokenizer bpe; leave it out")
    if name not in BUILT_IN:
        return {"name": "file", "path": name}
    return {"name": name} if vocabulary is None else {"name": name, "vocabulary": vocabulary}


def _show(folder: TokenFolder, seconds: float) -> None:
    meta = folder.meta
    for name in SPLITS:
        split = meta.splits[name]  # type: ignore[index]
        print(f"{name:10}  {split.documents:>9,} documents  {split.bytes:>13,} bytes  {split.tokens:>13,} tokens  "
              f"{split.bytes / split.tokens:.2f} bytes per token")  # fmt: skip
    print(f"{folder.path}: {meta.vocabulary:,} different tokens, {meta.dtype}, in {seconds:.1f} s; in a spec: "
          f"task: {{name: ..., data: {folder.path}}}")  # fmt: skip
