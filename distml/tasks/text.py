"""A language model's text, from the spec to rows of tokens. No torch in the opening: the driver does it, too.

    task's block, seed ── open_text ──▶ TokenFolder ── TokenRows ──▶ int64 [B, T]

What a spec describes is tokenised once per machine and kept: $DISTML_CACHE (or ~/.cache/distml)/tokens/KEY, where the
key follows from the files, from the settings and from the seed that deals out the documents. See `fingerprint` for what
tells files apart. Whoever adds an entry removes those that nobody has used for `KEPT_DAYS`.

Shapes: B examples, T tokens of an example.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distml.errors import UsageError
from distml.spec.corpus_files import File, find_files
from distml.spec.language import BPESpec, MaskedLanguageModelSpec
from distml.spec.language_rules import RUN_TOKENIZER, TextTaskSpecs, is_token_folder
from distml.spec.schema import InitSpec, JobSpec
from distml.tasks.corpus import SPLITS, deal, documents_of, fingerprint, read
from distml.tasks.library_tokenizers import same_tokens
from distml.tasks.tokenizers import Tokens, make_tokenizer, read_tokenizer
from distml.tasks.tokens import TokenFolder, build_once, write_folder

IGNORED = -100  # behind the end of a split; also the target of what is not to be predicted
EMBEDDING = "tokens.weight"  # of GPT and BERT: a row for each token
WAIT_S = 900.0
KEPT_DAYS = 30
ENTRY = re.compile(r"[0-9a-f]{32}")
FORMAT = 1  # of what the keys stand for: raised when the same settings come to give other tokens


def open_text(task: TextTaskSpecs, seed: int) -> TokenFolder:
    """The folder of the task's tokens, written now if it is not there.

    Raises:
        UsageError: the text is missing, too short or not text; or not the one that `data.digest` names.
    """
    source = Path(task.data.path)
    folder = TokenFolder(source if is_token_folder(source) else cached(task, seed))
    wanted, found = task.data.digest, folder.meta.digest
    if wanted is not None and wanted != found:
        raise UsageError(
            f"the tokens of corpus {task.data.path} are not those that task.data.digest names: text or tokeniser have "
            f"changed, or differ between hosts ({found[:12]} for {wanted[:12]}); take the old ones, or remove digest"
        )
    if isinstance(task, MaskedLanguageModelSpec) and folder.meta.mask is None:
        raise UsageError(f"{folder.path} was tokenised without a token for masked ones, which task {task.name} needs; "
                         "write it anew with `distml tokenize --mask`")  # fmt: skip
    for name in SPLITS:
        tokens = folder.meta.splits[name].tokens  # type: ignore[index]
        if tokens <= task.block:
            raise UsageError(
                f"the {name} split of corpus {task.data.path} has {tokens} tokens, a block has {task.block}; "
                f"lower task.block, add text, or {'lower' if name == 'train' else 'raise'} the held-out shares"
            )
    return folder


def pinned(job: JobSpec) -> JobSpec:
    """The job with its text's digest in it, and the text tokenised; a job of another task as it is.

    Raises:
        UsageError: see `open_text`; or `init` names a run whose tokens are others.
    """
    task = job.task
    if not isinstance(task, TextTaskSpecs):
        return job
    text = open_text(task, job.seed)
    if job.init is not None and job.init.source is not None:
        check_source(job.init, job.init.source, text)
    data = task.data.model_copy(update={"digest": text.meta.digest})
    return job.model_copy(update={"task": task.model_copy(update={"data": data})})


def check_source(init: InitSpec, source: str, text: TokenFolder) -> None:
    """Refuse an embedding whose rows stand for other tokens, which training would not show.

    Args:
        source: `init.from`. In a run directory, to which a checkpoint leads too, lies the tokeniser of its model.

    Raises:
        UsageError: it is another than the text's.
    """
    place = Path(source).absolute()
    kept = next((folder / RUN_TOKENIZER for folder in (place, *place.parents[:2]) if
                 (folder / RUN_TOKENIZER).is_file()), None)  # fmt: skip
    if kept is None or not any(fnmatch.fnmatchcase(EMBEDDING, pattern) for pattern in init.only):
        return
    tokenizer = read_tokenizer(kept)
    if not same_tokens(tokenizer, text.tokenizer):
        raise UsageError(
            f"init.from {source} has another tokeniser ({tokenizer.vocabulary} tokens) than this job "
            f"({text.meta.vocabulary} tokens), so that its embedding stands for other tokens; "
            f"set task.tokenizer: {{name: file, path: {kept}}}, or leave {EMBEDDING} out of init.only"
        )


def cached(task: TextTaskSpecs, seed: int) -> Path:
    """The folder in the cache, written now if it is not there; it counts as used now."""
    files = find_files(task.data)
    folder = cache_root() / key_of(task, seed, files)

    def build() -> None:
        tokenize(task, seed, files, folder)
        remove_unused(folder.parent)

    build_once(folder, build, WAIT_S)
    with contextlib.suppress(OSError):  # somebody else's
        os.utime(folder)
    return folder


def remove_unused(cache: Path) -> None:
    """Remove the entries that nobody has used for `KEPT_DAYS`; what is no entry stays, and what cannot be removed.

    Whoever has an entry's tokens open keeps them; to others it is one that is not there yet.
    """
    oldest = time.time() - KEPT_DAYS * 86_400
    for folder in cache.iterdir():
        with contextlib.suppress(OSError):
            if ENTRY.fullmatch(folder.name) and is_token_folder(folder) and folder.stat().st_mtime < oldest:
                # Renamed first: nobody finds half an entry. What a kill leaves goes when this entry is built again.
                shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.partial-{os.getpid()}")))


def cache_root() -> Path:
    """Where tokens are kept."""
    return Path(os.environ.get("DISTML_CACHE") or Path.home() / ".cache" / "distml") / "tokens"


def key_of(task: TextTaskSpecs, seed: int, files: list[File]) -> str:
    """The name of the folder that holds these files' tokens."""
    tokenizer = task.tokenizer
    settings = {
        "format": FORMAT, "seed": seed, "mask": isinstance(task, MaskedLanguageModelSpec),
        "data": task.data.model_dump(exclude={"path", "digest"}), "tokenizer": tokenizer.model_dump(),
        "corpus": fingerprint(task.data, files),
    }  # fmt: skip
    if isinstance(tokenizer, BPESpec):
        settings["library"] = version("tokenizers")
    elif tokenizer.name == "file":
        settings["tokenizer"] = hashlib.sha256(Path(tokenizer.path).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def tokenize(task: TextTaskSpecs, seed: int, files: list[File], folder: Path) -> None:
    """Cut, deal out and tokenise the files into a folder that is not there yet."""
    splits = deal(documents_of(files, task.data.max_bytes), task.data, seed)
    tokenizer = make_tokenizer(task.tokenizer, read(splits["train"]), isinstance(task, MaskedLanguageModelSpec))
    write_folder(folder, tokenizer, {name: read(documents) for name, documents in splits.items()})


class TokenRows:
    """A split as rows of T consecutive tokens: documents one after the other, every token in exactly one row.

    Args:
        tokens: of the split.
        block: T.
        ahead: further tokens in a row, which are the next row's first; what follows the last token is `IGNORED`.
        vocabulary: no token may be as large.
    """

    def __init__(self, tokens: Tokens, block: int, ahead: int, vocabulary: int) -> None:
        self.tokens, self.block, self.vocabulary = tokens, block, vocabulary
        self.columns = np.arange(block + ahead)
        self.count = -(-(len(tokens) - ahead) // block)

    def __len__(self) -> int:
        return self.count

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows `indices` (int64 [B]) as int64 [B, T + ahead].

        Raises:
            ValueError: a token is none: the file is damaged.
        """
        places = indices[:, None] * self.block + self.columns
        last = len(self.tokens) - 1
        if len(indices) and int(indices.max()) == self.count - 1:
            rows: NDArray[np.int64] = self.tokens[np.minimum(places, last)].astype(np.int64)
            rows[places > last] = IGNORED
        else:
            rows = self.tokens[places].astype(np.int64)
        if rows.size and int(rows.max()) >= self.vocabulary:
            raise ValueError(f"a token file is damaged: it has token {rows.max()} of {self.vocabulary}")
        return rows
