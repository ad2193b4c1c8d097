"""`distml generate`: what a trained language model writes behind a prompt."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

from distml.errors import UsageError
from distml.launch.evaluate import load_model
from distml.runs.directory import RunDirectory
from distml.spec.language import LanguageModelSpec
from distml.spec.loader import load_spec
from distml.spec.schema import JobSpec
from distml.tasks.generation import Sampler, TextStream, generate
from distml.tasks.gpt import GPT
from distml.tasks.language_model import LanguageModel
from distml.tasks.tokenizers import CharacterTokenizer, Tokenizer


def generate_command(
    run: Path, prompt: str, tokens: int, temperature: float, top_k: int | None, seed: int, cached: bool
) -> int:
    """Print the prompt and what the run's best checkpoint writes behind it, as it comes.

    The text ends after `tokens` of them, or with the document. The same arguments give the same text.

    Args:
        temperature: 0: the likeliest token each time.
        top_k: draw among the k likeliest only.
        cached: keep keys and values of the tokens so far; else they are computed again for every token.

    Raises:
        UsageError: an argument is out of range, the run is no language model's, or see `load_model`, `encode`.
    """
    check_arguments(tokens, temperature, top_k, seed)
    check_task(run)
    trained = load_model(run)
    assert isinstance(trained.task, LanguageModel)
    assert isinstance(trained.model, GPT)
    tokenizer = trained.task.tokenizer
    known = encode(tokenizer, prompt)
    positions = trained.model.max_positions
    if len(known) + tokens - 1 > positions:
        _note(f"the model sees {positions} tokens at most; whenever these are full, the older half is dropped")
    sampler = Sampler(temperature, top_k, tokenizer.vocabulary, seed)
    stream = TextStream(tokenizer, known)
    _show(prompt)
    started, count = time.perf_counter(), 0
    for token in generate(trained.model, known, sampler, cached):
        count += 1
        if token == tokenizer.end:
            break
        _show(stream.add(token))
        if count == tokens:
            break
    _show(stream.end() + "\n")
    ended = ", then the document ended" if token == tokenizer.end else ""
    _note(f"{count} tokens{ended}; {count / (time.perf_counter() - started):.0f} tokens/s")
    return 0


def check_arguments(tokens: int, temperature: float, top_k: int | None, seed: int) -> None:
    """Refuse what is out of range."""
    if tokens < 1:
        raise UsageError(f"--tokens {tokens}: give a whole number from 1 on")
    if not (math.isfinite(temperature) and temperature >= 0.0):
        raise UsageError(f"--temperature {temperature:g}: give a number from 0 (the likeliest token) on")
    if top_k is not None and top_k < 1:
        raise UsageError(f"--top-k {top_k}: give a whole number from 1 on, or leave it out")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed}: give a whole number from 0 to 2^63 - 1")


def check_task(run: Path) -> None:
    """Refuse a run that learned something else; before anything of it is loaded."""
    directory = RunDirectory.view(run)
    if directory.read_spec_text() is None:
        raise UsageError(f"{directory.path} has no spec.yaml, so its task is not known")
    job = load_spec(directory.spec).job
    if not isinstance(job, JobSpec) or not isinstance(job.task, LanguageModelSpec):
        what = f"task {job.task.name}" if isinstance(job, JobSpec) else f"kind {job.kind}"
        raise UsageError(f"{directory.path} is a run of {what}; text comes from runs of task language_model")


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's tokens.

    Raises:
        UsageError: there are none, or the tokeniser does not know its characters.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("--prompt is not UTF-8 text") from None
    if isinstance(tokenizer, CharacterTokenizer) and (unknown := set(prompt) - set(tokenizer.characters)):
        shown = " ".join(repr(character) for character in sorted(unknown)[:8])
        raise UsageError(f"--prompt has characters that the run's text has not: {shown}; write it without them")
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise UsageError("--prompt is empty; give the text to go on from")
    return tokens


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _note(line: str) -> None:
    print(line, file=sys.stderr)
