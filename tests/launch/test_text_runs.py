"""Runs of language models as a user starts them: the tokeniser travels along, the text stays the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from own.oracle import OWN, same, saved

import distml
from distml.cli import main
from distml.errors import UsageError
from distml.launch.evaluate import load_model
from distml.tasks.tokens import TokenFolder

MODEL = {"name": "gpt", "layers": 1, "heads": 2, "width": 8}


@pytest.fixture
def corpus(tmp_path) -> Path:
    return Path(shutil.copy(OWN / "rhymes.txt", tmp_path / "text.txt"))


def spec(corpus: Path, steps: int = 4, **task) -> dict:
    return {
        "distml": "v1", "name": "text", "strategy": "single", "batch_size": 4, "stop": {"steps": steps},
        "task": {"name": "language_model", "data": str(corpus), "block": 8, "tokenizer": "characters",
                 "model": MODEL, **task},
        "evaluate": {"every": 2}, "checkpoint": {"every": 2}, "log": {"every": 1, "to": []},
    }  # fmt: skip


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_counts_tokens_and_keeps_its_tokeniser(corpus, tmp_path):
    result = distml.run(spec(corpus), out=tmp_path / "run")
    assert {"eval/loss", "eval/bits_per_byte", "test/loss", "test/bits_per_byte"} <= set(result.metrics)
    assert [row["train/tokens"] for row in rows(tmp_path / "run") if "train/tokens" in row] == [32, 64, 96, 128]
    reports = [row for row in rows(tmp_path / "run") if "throughput/tokens_per_s" in row]
    assert all(row["throughput/tokens_per_s"] == row["throughput/examples_per_s"] * 8 for row in reports)
    assert json.loads((tmp_path / "run" / "tokenizer.json").read_text())["name"] == "characters"


def test_the_model_loads_when_the_text_is_gone(corpus, tmp_path, monkeypatch):
    trained = distml.run(spec(corpus), out=tmp_path / "run").model()
    corpus.unlink()
    monkeypatch.setenv("DISTML_CACHE", str(tmp_path / "empty"))
    again = load_model(tmp_path / "run")
    assert same({n: p.detach().numpy() for n, p in trained.named_parameters()},
                {n: p.detach().numpy() for n, p in again.model.named_parameters()})  # fmt: skip
    assert again.task.tokenizer.decode(again.task.tokenizer.encode("hill")) == "hill"
    with pytest.raises(UsageError, match=r"text\.txt"):
        again.task.data("train")


def test_a_broken_off_run_goes_on_with_the_same_batches(corpus, tmp_path):
    distml.run(spec(corpus, steps=2), out=tmp_path / "run")
    distml.run(spec(corpus, steps=4), out=tmp_path / "run")
    distml.run(spec(corpus, steps=4), out=tmp_path / "straight")
    both = [saved(tmp_path / name) for name in ("run", "straight")]
    assert all(same(both[0][kind], both[1][kind]) for kind in ("model", "optimizer"))


def test_a_run_does_not_go_on_with_another_text(corpus, tmp_path):
    distml.run(spec(corpus, steps=2), out=tmp_path / "run")
    corpus.write_text(corpus.read_text().replace("lamb", "goat"))
    with pytest.raises(UsageError, match=r"holds a run of another spec \(task\.data\.digest: "):
        distml.run(spec(corpus), out=tmp_path / "run")
    with pytest.raises(UsageError, match=r"are not those that task\.data\.digest names"):
        distml.run(tmp_path / "run" / "spec.yaml", out=tmp_path / "other")


def test_start_weights_of_another_tokeniser_are_refused(corpus, tmp_path):
    distml.run(spec(corpus, steps=2), out=tmp_path / "run")
    corpus.write_text(corpus.read_text().replace("l", "ł"))  # as many characters
    wanted = spec(corpus) | {"init": {"from": str(tmp_path / "run")}}
    with pytest.raises(UsageError) as caught:
        distml.run(wanted, out=tmp_path / "next")
    kept = tmp_path / "run" / "tokenizer.json"
    assert "has another tokeniser (50 tokens) than this job (50 tokens)" in str(caught.value)
    assert f"set task.tokenizer: {{name: file, path: {kept}}}" in str(caught.value)
    inside = {**wanted, "init": {"from": str(tmp_path / "run" / "checkpoints" / "step-00000002")}}
    with pytest.raises(UsageError, match="has another tokeniser"):
        distml.run(inside, out=tmp_path / "next")
    without = {**wanted, "init": {**wanted["init"], "only": ["layers.*"]}}
    assert distml.run(without, out=tmp_path / "layers").status == "done"
    wanted["task"]["tokenizer"] = {"name": "file", "path": str(kept)}
    assert distml.run(wanted, out=tmp_path / "next").status == "done"


# ------------------------------------------------------------------------------------------------------------ tokenize
def test_tokenize_writes_what_data_names(corpus, tmp_path, capsys, monkeypatch):
    out = tmp_path / "tokens"
    assert main(["tokenize", str(corpus), "--vocabulary", "300", "--validation", "0.2", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    meta = TokenFolder(out).meta
    assert f"{meta.splits['train'].tokens:,} tokens" in shown
    assert f"{out}: 300 different tokens, uint16" in shown
    assert meta.splits["validation"].documents == 5
    corpus.unlink()
    settings = spec(out)
    del settings["task"]["tokenizer"]
    monkeypatch.chdir(tmp_path)
    result = distml.run(settings, ["task.data=tokens"], out=tmp_path / "run")
    assert result.status == "done"
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


def test_tokenize_gives_the_same_tokens_as_a_run_would(corpus, tmp_path):
    assert main(["tokenize", str(corpus), "--tokenizer", "characters", "--out", str(tmp_path / "tokens")]) == 0
    settings = spec(corpus)
    found = distml.run(settings, out=tmp_path / "run")
    text = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    assert text == json.loads((tmp_path / "tokens" / "tokenizer.json").read_text())
    assert TokenFolder(tmp_path / "tokens").meta.digest in (tmp_path / "run" / "spec.yaml").read_text()
    assert found.status == "done"


@pytest.mark.parametrize(("options", "message"), [
    (["--vocabulary", "20"], "--vocabulary 20: Input should be greater than or equal to 258"),
    (["--validation", "1.5"], "--validation 1.5: Input should be less than or equal to 1"),
    (["--tokenizer", "bytes", "--vocabulary", "300"], "--vocabulary 300 is for --tokenizer bpe"),
    (["--tokenizer", "bites"], "tokeniser bites: cannot be read"),
])  # fmt: skip
def test_options_that_are_refused(corpus, tmp_path, capsys, options, message):
    assert main(["tokenize", str(corpus), "--out", str(tmp_path / "tokens"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "tokens").exists()


def test_tokenize_overwrites_nothing_and_needs_a_text(corpus, tmp_path, capsys):
    assert main(["tokenize", str(corpus), "--out", str(tmp_path)]) == 2
    assert "exists; nothing was written" in capsys.readouterr().err
    assert main(["tokenize", str(tmp_path / "nowhere"), "--out", str(tmp_path / "tokens")]) == 2
    assert "there is no" in capsys.readouterr().err
    corpus.write_bytes(b"\xff\n\n" * 30)
    assert main(["tokenize", str(corpus), "--out", str(tmp_path / "tokens")]) == 2
    assert "text.txt is not text in UTF-8" in capsys.readouterr().err
