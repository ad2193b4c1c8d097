"""`distml generate`: the text, the same with and without a cache, and what is said instead of it."""

from __future__ import annotations

import shutil

import pytest

from distml.cli import main
from distml.launch.evaluate import load_model
from distml.tasks.generation import Sampler, generate
from distml.tasks.tokenizers import ByteTokenizer


def said(arguments, capsys) -> tuple[str, str]:
    """What a command that succeeds writes to stdout and stderr."""
    assert main(["generate", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    return out, err


def refused(arguments, capsys) -> str:
    assert main(["generate", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


@pytest.mark.parametrize("options", [["--temperature", 0], ["--temperature", 1.5, "--top-k", 5, "--seed", 3]])
def test_it_writes_behind_the_prompt_what_the_model_expects_cached_or_not(language_run, options, capsys):
    arguments = [language_run, "--prompt", "line 7", "--tokens", 20, *options]
    text, note = said(arguments, capsys)
    assert text.startswith("line 7")
    assert text.endswith("\n")
    assert "tokens/s" in note
    assert said([*arguments, "--uncached"], capsys)[0] == text
    assert said(arguments, capsys)[0] == text

    trained = load_model(language_run)
    temperature, top_k, seed = (0.0, None, 0) if len(options) == 2 else (1.5, 5, 3)
    tokenizer = trained.task.tokenizer
    drawn = generate(trained.model, tokenizer.encode("line 7"), Sampler(temperature, top_k, tokenizer.vocabulary, seed))
    tokens: list[int] = []
    while len(tokens) < 20 and tokenizer.end not in tokens:
        tokens.append(next(drawn))
    assert text == "line 7" + tokenizer.decode(tokens) + "\n"


def test_it_has_learned_something(language_run, capsys):
    text, _ = said([language_run, "--prompt", "line 7 says: one", "--tokens", 8, "--temperature", 0], capsys)
    assert text.startswith("line 7 says: one thing")


def test_other_seeds_write_other_texts(language_run, capsys):
    arguments = [language_run, "--prompt", "line", "--tokens", 20, "--temperature", 2]
    assert len({said([*arguments, "--seed", seed], capsys)[0] for seed in (1, 2, 3)}) == 3


def test_a_text_longer_than_the_positions_goes_on_and_says_so(language_run, capsys):
    arguments = [language_run, "--prompt", "one thing after another." * 3, "--tokens", 30, "--temperature", 2]
    text, note = said(arguments, capsys)
    assert "the model sees 24 tokens at most" in note
    assert said([*arguments, "--uncached"], capsys)[0] == text
    assert "at most" not in said([language_run, "--prompt", "one thing", "--tokens", 16], capsys)[1]
    assert "at most" in said([language_run, "--prompt", "one thing", "--tokens", 17], capsys)[1]


def test_it_ends_with_the_document(language_run, monkeypatch, capsys):
    end = load_model(language_run).task.tokenizer.end
    monkeypatch.setattr("distml.launch.generate.generate", lambda *_: iter([0, 0, end, 0, 0]))
    _, note = said([language_run, "--prompt", "line"], capsys)
    assert note.splitlines()[-1].startswith("3 tokens, then the document ended")


def test_it_needs_neither_the_text_nor_the_tokens_of_the_run(language_run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "elsewhere"
    shutil.copytree(language_run, copy)
    text = language_run.parent / "text.txt"
    kept = text.read_text()
    monkeypatch.setenv("DISTML_CACHE", str(tmp_path / "empty"))
    text.unlink()
    try:
        assert said([copy, "--prompt", "line", "--tokens", 3], capsys)[0].startswith("line")
    finally:
        text.write_text(kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "LINE"], "'E' 'I' 'L' 'N'"),
        (["--prompt", "\udcff"], "--prompt is not UTF-8 text"),
        (["--prompt", "a", "--tokens", 0], "--tokens 0"),
        (["--prompt", "a", "--temperature", -1], "--temperature -1"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature nan"),
        (["--prompt", "a", "--top-k", 0], "--top-k 0"),
        (["--prompt", "a", "--seed", -1], "--seed -1"),
        ([], "Missing option '--prompt'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(language_run, options, message, capsys):
    assert message in refused([language_run, *options], capsys)


def test_bytes_take_any_prompt(language_run, monkeypatch, capsys):
    """The control to the characters that are not known."""
    from distml.launch.generate import encode

    assert encode(ByteTokenizer(), "LINE é") == list("LINE é".encode())


def test_other_runs_are_refused(tiny, tmp_path, capsys):
    assert "is a run of task classification; text comes from" in refused([tiny, "--prompt", "a"], capsys)
    assert "there is no such folder" in refused([tmp_path / "nothing", "--prompt", "a"], capsys)
    (tmp_path / "result.json").write_text("{}")
    assert "has no spec.yaml" in refused([tmp_path, "--prompt", "a"], capsys)
