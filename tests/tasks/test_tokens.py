"""Folders of tokens: what is written is read, one builder at a time, and no half-written folder is ever seen."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from own.oracle import OWN, job_of, spec_of

from distml.errors import UsageError
from distml.spec.corpus_files import find_files
from distml.tasks.corpus import SPLITS
from distml.tasks.text import IGNORED, TokenRows, cached, key_of, open_text, pinned
from distml.tasks.tokenizers import ByteTokenizer, learn_bpe
from distml.tasks.tokens import META, TOKENIZER, TokenFolder, build_once, write_folder

TEXTS = {"train": ["abc", "de", "fghij"], "validation": ["xy"], "test": ["z", ""]}


@pytest.fixture
def folder(tmp_path) -> Path:
    write_folder(tmp_path / "tokens", ByteTokenizer(), TEXTS)
    return tmp_path / "tokens"


def task_of(**changes):
    return job_of(spec_of({"name": "language_model", "data": {"path": "rhymes.txt"}, "block": 8, **changes})).task


# ------------------------------------------------------------------------------------------------------- written, read
def test_documents_follow_each_other_with_an_end_behind_each(folder):
    opened = TokenFolder(folder)
    end = 256
    assert opened.tokens("train").tolist() == [*b"abc", end, *b"de", end, *b"fghij", end]
    assert opened.tokens("test").tolist() == [*b"z", end, end]
    assert {name: opened.meta.splits[name].documents for name in SPLITS} == {"train": 3, "validation": 1, "test": 2}
    assert (opened.meta.splits["train"].tokens, opened.meta.splits["train"].bytes) == (13, 10)
    assert opened.tokens("train").dtype == np.uint16
    assert not opened.tokens("train").flags.writeable
    assert opened.tokenizer.to_json() == ByteTokenizer().to_json()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tokens"]


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    class Large(ByteTokenizer):
        vocabulary = 2**16 + 1

        def __init__(self):
            self.end, self.mask = 2**16, None

    write_folder(tmp_path / "tokens", Large(), TEXTS)
    assert TokenFolder(tmp_path / "tokens").tokens("validation").tolist() == [*b"xy", 2**16]


def test_the_digest_tells_texts_and_tokenisers_apart(tmp_path, folder):
    digests = {TokenFolder(folder).meta.digest}
    other = {**TEXTS, "test": ["y"]}
    for name, tokenizer, texts in (("a", ByteTokenizer(), other), ("b", ByteTokenizer(True), TEXTS),
                                   ("c", learn_bpe(["abc"], 300, False), TEXTS)):  # fmt: skip
        write_folder(tmp_path / name, tokenizer, texts)
        digests.add(TokenFolder(tmp_path / name).meta.digest)
    assert len(digests) == 4
    write_folder(tmp_path / "again", ByteTokenizer(), TEXTS)
    assert TokenFolder(tmp_path / "again").meta.digest in digests


@pytest.mark.parametrize(("damage", "message"), [
    (lambda path: (path / "train.bin").write_bytes(b"abc"), "has 3 bytes, its meta.json says 26"),
    (lambda path: (path / "test.bin").unlink(), "cannot be read: No such file"),
    (lambda path: (path / META).write_text("{}"), "Field required"),
    (lambda path: (path / META).write_text("{"), "Invalid JSON"),
    (lambda path: (path / META).write_text("[" * 100_000), "recursion limit exceeded"),
    (lambda path: change(path, version=2), "version: Input should be 1"),
    (lambda path: change(path, dtype="object"), "dtype: Input should be 'uint16' or 'uint32'"),
    (lambda path: change(path, splits={}), "knows no split train"),
])  # fmt: skip
def test_a_damaged_folder_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(UsageError) as caught:
        TokenFolder(folder)
    assert message in str(caught.value)
    assert "`distml tokenize`" in str(caught.value)


def change(folder: Path, **changes) -> None:
    (folder / META).write_text(json.dumps({**json.loads((folder / META).read_text()), **changes}))


@pytest.mark.parametrize("name", [f"{name}.bin" for name in SPLITS])
@pytest.mark.parametrize("bytes_each_time", [2**20, 0])
def test_other_tokens_of_the_same_number_are_refused(folder, monkeypatch, name, bytes_each_time):
    monkeypatch.setattr("distml.tasks.tokens.VERIFIED_BYTES", bytes_each_time)
    TokenFolder(folder)
    file = folder / name
    before = file.stat()
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    file.write_bytes(bytes(before.st_size))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UsageError, match=rf"{name} is not the file that meta\.json names: .*; write the folder anew"):
        TokenFolder(folder)


def test_many_bytes_are_verified_once(folder, monkeypatch):
    monkeypatch.setattr("distml.tasks.tokens.VERIFIED_BYTES", 0)
    checked = []
    check = TokenFolder._check_digest
    monkeypatch.setattr(TokenFolder, "_check_digest", lambda *given: (checked.append(given[1]), check(*given)))
    TokenFolder(folder)
    first, checked[:] = list(checked), []
    TokenFolder(folder)
    assert (sorted(first), checked) == (["test.bin", TOKENIZER, "train.bin", "validation.bin"], [TOKENIZER])
    os.utime(folder / "test.bin")
    TokenFolder(folder)
    assert "train.bin" in checked


def test_what_was_verified_for_another_digest_does_not_count(folder, monkeypatch):
    monkeypatch.setattr("distml.tasks.tokens.VERIFIED_BYTES", 0)
    meta = TokenFolder(folder).meta.model_dump()
    meta["splits"]["test"]["sha256"] = "0" * 64
    change(folder, splits=meta["splits"])
    with pytest.raises(UsageError, match=r"test\.bin is not the file"):
        TokenFolder(folder)


def test_another_tokeniser_beside_the_tokens_is_refused(folder):
    (folder / TOKENIZER).write_text(ByteTokenizer(mask=True).to_json())
    with pytest.raises(UsageError, match=r"tokenizer\.json is not the file that meta\.json names"):
        TokenFolder(folder)


# ----------------------------------------------------------------------------------------------------------- the cache
def test_the_second_time_nothing_is_tokenised(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTML_CACHE", str(tmp_path))
    first = open_text(task_of(), 0)
    assert first.path.parent == tmp_path / "tokens"
    monkeypatch.setattr("distml.tasks.text.tokenize", None)  # would fail
    assert open_text(task_of(), 0).path == first.path


def test_the_key_follows_from_all_that_the_tokens_follow_from(tmp_path):
    task = task_of()
    files = find_files(task.data)
    copy = tmp_path / "rhymes.txt"
    copy.write_bytes((OWN / "rhymes.txt").read_bytes())
    elsewhere = task_of(data=str(copy))
    masked = job_of(spec_of({"name": "masked_language_model", "data": "rhymes.txt", "tokenizer": "bytes"})).task
    keys = [
        key_of(task, 0, files), key_of(task, 1, files), key_of(task_of(tokenizer="characters"), 0, files),
        key_of(task_of(data={"path": "rhymes.txt", "validation": 0.1}), 0, files), key_of(masked, 0, files),
        key_of(task_of(data={"path": "rhymes.txt", "max_bytes": 900}), 0, files),
        key_of(task_of(tokenizer={"name": "bpe", "vocabulary": 300}), 0, files),
        key_of(task_of(tokenizer={"name": "bpe", "vocabulary": 301}), 0, files),
        key_of(elsewhere, 0, find_files(elsewhere.data)),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key_of(task_of(block=16), 0, files) == keys[0]


@pytest.fixture
def alike(tmp_path, monkeypatch):
    """Tasks over two corpora whose files agree in name, size and time."""
    monkeypatch.setenv("DISTML_CACHE", str(tmp_path / "cache"))
    tasks = []
    for name, line in (("a", "alpha bravo charlie\n\n"), ("b", "zulus yanky xrayyyy\n\n")):
        file = tmp_path / name / "in.txt"
        file.parent.mkdir()
        file.write_text(line * 60)
        os.utime(file, ns=(10**18, 10**18))
        tasks.append(task_of(data=str(file)))
    return tasks


@pytest.mark.parametrize("hashed", [2**20, 0])
def test_files_that_only_look_alike_are_told_apart_by_their_place(alike, monkeypatch, hashed):
    monkeypatch.setattr("distml.tasks.corpus.HASHED_BYTES", hashed)
    first, second = (open_text(task, 0) for task in alike)
    assert first.path != second.path
    assert first.tokenizer.decode(first.tokens("train")[:5].tolist()) == "alpha"
    assert second.tokenizer.decode(second.tokens("train")[:5].tolist()) == "zulus"


def test_a_place_that_a_link_leads_elsewhere_is_another(alike, tmp_path, monkeypatch):
    monkeypatch.setattr("distml.tasks.corpus.HASHED_BYTES", 0)
    link, found = tmp_path / "now", []
    for name in "ab":
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        found.append(open_text(task_of(data=str(link / "in.txt")), 0).meta.digest)
    assert found[0] != found[1]


def test_a_small_text_is_known_by_what_it_holds(alike, monkeypatch):
    task, file = alike[0], Path(alike[0].data.path)
    before = open_text(task, 0)
    os.utime(file)
    assert open_text(task, 0).path == before.path
    file.write_text("zulus yanky xrayyyy\n\n" * 60)
    os.utime(file, ns=(10**18, 10**18))
    assert open_text(task, 0).meta.digest != before.meta.digest
    monkeypatch.setattr("distml.tasks.corpus.HASHED_BYTES", 0)  # a large one: by size and time
    large = open_text(task, 0)
    file.write_text("alpha bravo charlie\n\n" * 60)
    assert open_text(task, 0).path != large.path


def test_of_many_that_want_a_folder_one_builds_it(tmp_path):
    built = []

    def build():
        built.append(threading.get_ident())
        time.sleep(0.1)
        write_folder(tmp_path / "tokens", ByteTokenizer(), TEXTS)

    threads = [threading.Thread(target=build_once, args=(tmp_path / "tokens", build, 10.0)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert TokenFolder(tmp_path / "tokens").meta.vocabulary == 257


def test_a_new_entry_removes_those_that_nobody_has_used_for_a_month(alike, tmp_path):
    def age(path: Path, days: float) -> None:
        os.utime(path, (time.time() - days * 86_400,) * 2)

    cache = tmp_path / "cache" / "tokens"
    used, unused, recent = (open_text(alike[0], seed).path for seed in range(3))
    mapped = TokenFolder(unused).tokens("train")
    before = mapped.tolist()
    write_folder(cache / "mine", ByteTokenizer(), TEXTS)
    other = cache / ("0" * 32)
    other.mkdir()
    for path, days in ((used, 31), (unused, 31), (recent, 29), (cache / "mine", 31), (other, 31)):
        age(path, days)
    assert open_text(alike[0], 0).path == used  # what is used is young again; nothing was built, and nothing removed
    assert unused.is_dir()
    built = open_text(alike[1], 0).path
    folders = {path for path in cache.iterdir() if path.is_dir()}
    assert folders == {used, recent, built, cache / "mine", other}
    assert mapped.tolist() == before
    assert open_text(alike[0], 1).path == unused  # written anew


KILLED = """
import os, signal, sys
from pathlib import Path
from distml.tasks.tokenizers import ByteTokenizer
from distml.tasks.tokens import build_once, write_folder
class Dying(ByteTokenizer):
    def to_json(self):  # everything but the last file is written
        os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
build_once(folder, lambda: write_folder(folder, Dying(), {"train": ["a"], "validation": ["a"], "test": ["a"]}), 5.0)
"""


def test_a_killed_builder_leaves_nothing_that_counts(tmp_path):
    folder = tmp_path / "tokens"
    died = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert not folder.exists()
    assert [path.name for path in tmp_path.glob("*.partial-*/train.bin")] == ["train.bin"]
    build_once(folder, lambda: write_folder(folder, ByteTokenizer(), TEXTS), 5.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens", "tokens.lock"]
    assert TokenFolder(folder).meta.splits["train"].documents == 3


def test_whoever_waits_too_long_is_told_for_what(tmp_path):
    handle = os.open(tmp_path / "tokens.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match=r"tokenising the same text for 0\.1 s \(it holds .*tokens\.lock\)"):
            build_once(tmp_path / "tokens", lambda: None, 0.1)
    finally:
        os.close(handle)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTML_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"cannot be written: .*; set DISTML_CACHE"):
        cached(task_of(), 0)


# ---------------------------------------------------------------------------------------------------------------- text
def test_a_job_is_pinned_to_its_text():
    job = job_of(spec_of({"name": "language_model", "data": "rhymes.txt", "block": 8}))
    digest = pinned(job).task.data.digest
    assert digest == open_text(job.task, 0).meta.digest
    assert pinned(pinned(job)) == pinned(job)
    other = job.model_copy(update={"seed": 1})
    assert pinned(other).task.data.digest != digest
    with pytest.raises(UsageError, match=r"rhymes\.txt are not those that task\.data\.digest names"):
        open_text(pinned(job).task, 1)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_shorter_than_a_block_is_refused(split):
    block = {"train": 10_000, "validation": 150}[split]
    with pytest.raises(UsageError, match=rf"the {split} split of corpus .* tokens, a block has {block}"):
        open_text(task_of(block=block), 0)


# ---------------------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("count", [5, 8, 9, 12, 13])
@pytest.mark.parametrize("ahead", [0, 1])
def test_rows_hold_every_token_once(count, ahead):
    tokens = np.arange(count, dtype=np.uint16)
    rows = TokenRows(tokens, 4, ahead, 99)
    found = rows.take(np.arange(len(rows)))
    assert found.shape[1] == 4 + ahead
    behind = found[:, ahead:].ravel()  # what is predicted, or what is shown
    assert behind[behind != IGNORED].tolist() == list(range(ahead, count))
    assert len(rows) == len(range(0, count - ahead, 4))
    for index in range(len(rows)):
        naive = [*range(index * 4, count), *[IGNORED] * 9][: 4 + ahead]
        assert rows.take(np.array([index])).tolist() == [naive]


def test_rows_in_any_order_and_none():
    rows = TokenRows(np.arange(13, dtype=np.uint16), 4, 1, 99)
    assert rows.take(np.array([2, 0])).tolist() == [[8, 9, 10, 11, 12], [0, 1, 2, 3, 4]]
    assert rows.take(np.array([], dtype=np.int64)).shape == (0, 5)


def test_a_token_that_does_not_exist_is_named():
    rows = TokenRows(np.array([1, 2, 300, 4, 5], dtype=np.uint16), 2, 1, 257)
    with pytest.raises(ValueError, match="it has token 300 of 257"):
        rows.take(np.arange(2))
    assert torch.from_numpy(TokenRows(np.arange(5), 2, 1, 5).take(np.arange(2))).dtype == torch.int64
