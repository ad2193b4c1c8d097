"""Language models in a spec: each rule is broken once; what is completed; what is known without reading the text."""

# ruff: noqa: E501 (tables: one case per line)
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from own.oracle import OWN

from distml.spec.language_rules import is_token_folder, known_vocabulary
from distml.spec.loader import load_spec
from distml.tasks.tokenizers import ByteTokenizer
from distml.tasks.tokens import write_folder

HEAD = "distml: v1\nname: x\nstop: {steps: 1}\n"  # three lines
LM, MLM = "task: {name: language_model, ", "task: {name: masked_language_model, "

BROKEN = {
    "heads": (
        LM + "model: {name: gpt, heads: 5, width: 128}}", "4:49",
        "task.model.heads 5 does not divide task.model.width 128; set heads to 4 or 8, or width to a multiple of 5",
    ),
    "heads of an encoder": (MLM + "model: {name: bert, heads: 3}}", "4:57", "heads 3 does not divide task.model.width 128"),
    "kv_heads": (
        LM + "model: {name: gpt, heads: 8, kv_heads: 3}}", "4:59", "kv_heads 3 does not divide task.model.heads 8; set kv_heads to 2 or 4",
    ),
    "more kv_heads than heads": (LM + "model: {name: gpt, kv_heads: 8}}", "4:49", "set kv_heads to 4"),
    "odd heads turn": (
        LM + "model: {name: gpt, positions: rotary, heads: 4, width: 20}}", "4:49",
        "task.model.width 20 / heads 4 = 5 is odd; change one of them, or set positions: learned",
    ),
    "positions": (
        LM + "block: 64, model: {name: gpt, max_positions: 32}}", "4:30",
        "task.block 64 is longer than task.model.max_positions 32",
    ),
    "default block": (LM + "model: {name: gpt, max_positions: 32}}", "4:49", "task.block 128 is longer"),
    "vocabulary of bytes": (
        LM + "model: {name: gpt, vocabulary: 256}}", "4:49", "task.model.vocabulary 256 is smaller than the tokeniser's 257 tokens",
    ),
    "vocabulary with a mask": (
        MLM + "tokenizer: bytes, model: {name: bert, vocabulary: 257}}", "4:75", "smaller than the tokeniser's 258 tokens",
    ),
    "vocabulary of bpe": (
        LM + "tokenizer: {name: bpe, vocabulary: 999}, model: {name: gpt, vocabulary: 998}}", "4:90", "the tokeniser's 999 tokens",
    ),
    "nothing to train on": (
        LM + "data: {path: stdlib, validation: 0.6, test: 0.4}}", "4:51", "validation 0.6 and test 0.4 leave no documents",
    ),
    "no validation": (LM + "data: {path: stdlib, validation: 0.0}}", "4:51", "every run is measured on that split"),
    "no such text": (LM + "data: {path: nowhere}}", "4:37", "there is no "),
    "no such text, in short": (LM + "data: nowhere}", "4:30", "name a text file, a folder of them, or stdlib"),
    "an empty text": (LM + "data: {path: empty/file.txt}}", "4:37", "empty/file.txt is empty; set task.data.path to a text file"),
    "a folder without text": (LM + "data: empty}", "4:30", "has no file that matches '*' and is not empty"),
    "no file of this name": (
        LM + "data: {path: ., pattern: '*.rst'}}", "4:37", "has no file that matches '*.rst' and is not empty",
    ),
    "no such tokeniser": (LM + "tokenizer: {name: file, path: nowhere.json}}", "4:54", "nowhere.json does not exist"),
    "no tokeniser": (LM + "tokenizer: {name: file, path: job.yaml}}", "4:54", "job.yaml is no tokeniser's file"),
    "small bpe": (LM + "tokenizer: {name: bpe, vocabulary: 257}}", "4:65", "must be at least 258"),
    "a digest that is none": (LM + "data: {path: stdlib, digest: abc}}", "4:59", "must match"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_names_values_fix_and_place(case, fails):  # `fails` changes into a folder of its own
    text, place, phrase = BROKEN[case]
    Path("empty").mkdir()
    Path("empty/file.txt").touch()
    message = fails(f"{HEAD}{text}\n")
    assert message.startswith(f"job.yaml:{place}: "), message
    assert phrase in message


def test_tokens_are_a_budget_of_language_models_alone(fails):
    message = fails("distml: v1\nname: x\ntask: classification\nstop: {tokens: 5}\n")
    assert message == (
        "job.yaml:4:8: stop.tokens counts a language model's tokens, and task classification has none; "
        "set one of steps, examples, epochs, seconds"
    )
    own = load_spec({"distml": "v1", "name": "x", "task": "language_model", "stop": {"tokens": 5},
                     "optimizer": {"name": "sgd", "schedule": "cosine"}}).job  # fmt: skip
    assert own.task.tokens_per_example == 128


def load(directory: Path, task: dict) -> object:
    return load_spec({"distml": "v1", "name": "x", "stop": {"steps": 1}, "task": task}, directory=directory)


def test_paths_are_relative_to_the_spec(tmp_path):
    (tmp_path / "t.json").write_text(ByteTokenizer().to_json())
    loaded = load(OWN, {"name": "language_model", "data": "rhymes.txt",
                        "tokenizer": {"name": "file", "path": str(tmp_path / "t.json")}})  # fmt: skip
    assert loaded.job.task.data.path == str(OWN / "rhymes.txt")
    (tmp_path / "spec.yaml").write_text(loaded.dump())
    assert load_spec(tmp_path / "spec.yaml").job == loaded.job


def test_a_runs_own_spec_loads_when_its_text_is_gone(tmp_path, fails):
    spec = HEAD + LM + "data: /gone, tokenizer: {name: file, path: /gone.json}}\n"
    assert "/gone" in fails(spec)
    (tmp_path / "tokenizer.json").write_text(ByteTokenizer().to_json())
    assert load_spec(tmp_path / "job.yaml").job.task.data.path == "/gone"


@pytest.fixture
def tokens(tmp_path) -> Path:
    write_folder(tmp_path / "tokens", ByteTokenizer(), {name: ["a" * 200] for name in ("train", "validation", "test")})
    return tmp_path / "tokens"


def test_a_folder_of_tokens_brings_its_tokeniser(tokens):
    loaded = load(tokens.parent, {"name": "language_model", "data": "tokens"})
    assert loaded.job.task.tokenizer.path == str(tokens / "tokenizer.json")
    assert known_vocabulary(loaded.job.task) == 257
    (tokens.parent / "spec.yaml").write_text(loaded.dump())
    assert load_spec(tokens.parent / "spec.yaml").job == loaded.job


@pytest.mark.parametrize(("keys", "place", "phrase"), [
    ("data: tokens, tokenizer: characters", "4:44", "is tokenised already, by the tokenizer.json in it; leave task.tokenizer out"),
    ("data: {path: tokens, validation: 0.1}", "4:51", "task.data.validation 0.1 has no effect on tokens that are cut already"),
    ("data: {path: tokens, pattern: '*.py'}", "4:51", "task.data.pattern *.py has no effect"),
])  # fmt: skip
def test_what_has_no_effect_on_tokens_is_refused(tokens, fails, keys, place, phrase):
    message = fails(f"{HEAD}{LM}{keys}}}\n")
    assert message.startswith(f"job.yaml:{place}: "), message
    assert phrase in message


def test_files_of_brackets_are_none_of_ours(tokens, fails):
    deep = "[" * 100_000
    (tokens.parent / "t.json").write_text(deep)
    message = fails(f"{HEAD}{LM}tokenizer: {{name: file, path: t.json}}}}\n")
    assert message.startswith("job.yaml:4:54: ")
    assert "t.json is no tokeniser's file" in message
    (tokens / "meta.json").write_text(deep)
    assert not is_token_folder(tokens)
    assert load(tokens.parent, {"name": "language_model", "data": "tokens"}).job.task.tokenizer.name == "bytes"


@pytest.mark.parametrize(("task", "tokenizer", "known"), [
    ("language_model", "bytes", 257), ("masked_language_model", "bytes", 258), ("language_model", "characters", None),
    ("masked_language_model", {"name": "bpe", "vocabulary": 30000}, 30000),
])  # fmt: skip
def test_what_is_known_of_the_vocabulary(task, tokenizer, known):
    assert known_vocabulary(load(OWN, {"name": task, "data": "rhymes.txt", "tokenizer": tokenizer}).job.task) == known


def test_checking_lists_but_reads_no_text_and_imports_no_torch(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "binary").write_bytes(b"\xff\0")
    spec = {"distml": "v1", "name": "x", "stop": {"tokens": 1}, "task": {"name": "language_model", "data": "text"}}
    code = (
        "import json, sys; from pathlib import Path; from distml.spec.loader import load_spec\n"
        f"load_spec(json.loads({json.dumps(json.dumps(spec))}), directory=Path({str(tmp_path)!r}))\n"
        "print(sorted({'torch', 'ray', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
