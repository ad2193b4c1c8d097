"""Next-token prediction: what is predicted from what, the sums, resume, and one update for any number of workers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from own.oracle import distance, job_of, oracle, spec_of, train
from torch import nn

from distml.errors import UsageError
from distml.tasks.base import Part, Progress
from distml.tasks.build import build_task
from distml.tasks.data import DatasetStream, take
from distml.tasks.language_model import cross_entropy, num_targets
from distml.tasks.text import IGNORED

TASK = {"name": "language_model", "data": {"path": "rhymes.txt", "validation": 0.2, "test": 0.1}, "block": 16,
        "model": {"name": "gpt", "layers": 1, "heads": 2, "width": 16}}  # fmt: skip


def task_of(**changes):
    return build_task(job_of(spec_of({**TASK, **changes})))


def part_of(task, index=0, count=1, size=4, split="validation"):
    return Part(index, count, 0, split, size, task.data(split))


def test_targets_are_the_inputs_one_further_on():
    task = task_of()
    tokens = task.text.tokens("train")
    dataset = task.data("train")
    inputs, targets = take(dataset, torch.tensor([3, 0]))
    assert inputs.tolist() == [tokens[48:64].tolist(), tokens[:16].tolist()]
    assert targets.tolist() == [tokens[49:65].tolist(), tokens[1:17].tolist()]
    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
    everything = take(dataset, torch.arange(len(dataset)))[1]
    assert everything[everything != IGNORED].tolist() == tokens[1:].tolist()


def test_nothing_is_predicted_behind_the_end_of_the_text():
    task = task_of()
    dataset = task.data("validation")
    inputs, targets = take(dataset, torch.tensor([len(dataset) - 1]))
    behind = targets == IGNORED
    assert 0 < num_targets(targets) == 16 - int(behind.sum())
    assert inputs[behind].eq(task.text.meta.end).sum() >= behind.sum() - 1
    assert inputs.min() >= 0


def test_the_loss_is_a_sum_in_float32():
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, 4, IGNORED], [0, 2, 3]])
    probabilities = logits.double().softmax(-1)
    naive = -sum(math.log(probabilities[b, t, targets[b, t]]) for b in range(2) for t in range(3) if targets[b, t] >= 0)
    assert float(cross_entropy(logits, targets)) == pytest.approx(naive, rel=1e-6)
    assert cross_entropy(logits.bfloat16(), targets).dtype == torch.float32
    assert num_targets(targets) == 5


def test_the_first_loss_is_that_of_a_guess():
    task = task_of()
    torch.manual_seed(0)
    model = task.build_model()
    loss = task.loss(model, take(task.data("train"), torch.arange(8)), Progress())
    assert loss.count == 8 * 16
    assert float(loss.total) / loss.count == pytest.approx(math.log(257), abs=0.05)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_an_evaluation_is_over_the_whole_split_in_any_number_of_parts(count):
    task = task_of()
    torch.manual_seed(0)
    model = task.build_model().eval()
    with torch.no_grad():
        parts = [task.evaluate(model, part_of(task, index, count), Progress()) for index in range(count)]
        tokens = torch.from_numpy(task.text.tokens("validation").astype(np.int64))
        naive = 0.0  # row by row
        for start in range(0, len(tokens) - 1, 16):
            logits = model(tokens[start : start + 16][: len(tokens) - 1 - start][None])
            targets = tokens[start + 1 : start + 17][None]
            naive += float(nn.functional.cross_entropy(logits[0], targets[0], reduction="sum"))
    loss = sum((means["loss"] for means in parts[1:]), parts[0]["loss"])
    assert loss.count == len(tokens) - 1
    assert loss.total == pytest.approx(naive, rel=1e-5)
    bits = sum((means["bits_per_byte"] for means in parts[1:]), parts[0]["bits_per_byte"])
    split = task.text.meta.splits["validation"]
    assert bits.value == pytest.approx(
        naive / math.log(2) / (split.bytes * (split.tokens - 1) / split.tokens), rel=1e-5
    )


def test_every_part_has_as_many_batches_and_together_they_are_the_split():
    task = task_of()
    dataset = task.data("validation")
    whole = take(dataset, torch.arange(len(dataset)))[1]
    for count in (1, 2, 3, len(dataset), len(dataset) + 2):
        parts = [list(part_of(task, index, count, size=3).batches()) for index in range(count)]
        assert len({len(batches) for batches in parts}) == 1
        assert torch.equal(torch.cat([targets for batches in parts for _, targets in batches]), whole)
        assert all(len(inputs) <= 3 for batches in parts for inputs, _ in batches)
    assert len(list(part_of(task, size=0).batches())) == 1


def test_a_stream_goes_on_at_its_place():
    task = task_of()
    dataset = task.data("train")
    straight, resumed = (DatasetStream(dataset, 3, 6, 1, 2) for _ in range(2))
    for _ in range(50):  # into the second epoch
        straight.next(None, None)
    resumed.load_state(straight.state())
    assert all(map(torch.equal, straight.next(None, None), resumed.next(None, None)))


def test_the_update_is_that_of_one_process_with_the_whole_batch():
    spec = spec_of(TASK, batch_size=6, optimizer={"name": "adamw", "lr": 0.003, "clip_norm": 1.0})
    expected = oracle(spec, 8)
    for strategy, workers in (("single", 1), ("all_reduce", 2), ("all_reduce", 3), ("parameter_server", 2)):
        found = train({**spec, "strategy": strategy, "resources": {"workers": workers}, "stop": {"steps": 8}})
        assert distance(found.named, expected) < 2e-5, (strategy, workers)
    shifted = train({**spec, "seed": 1, "stop": {"steps": 8}})  # the control
    assert distance(shifted.named, expected) > 1e-2


def test_it_learns_a_text_by_heart():
    trained = train(spec_of({**TASK, "tokenizer": "characters"}, steps=150, batch_size=16,
                            optimizer={"name": "adamw", "lr": 0.01}))  # fmt: skip
    losses = [report.means["loss"][0] / report.means["loss"][1] for report in trained.reports]
    assert losses[0] > 3.0
    assert losses[-1] < 1.7


def test_tokens_are_a_budget():
    trained = train(spec_of(TASK, batch_size=6, stop={"tokens": 6 * 16 * 4 + 1}))
    assert [event.reason for event in trained.finished] == ["tokens"]
    assert trained.finished[0].version == 5
    half = train(spec_of(TASK, batch_size=6, stop={"tokens": 10**6, "steps": 2}))
    assert half.finished[0].reason == "steps"


@pytest.mark.parametrize(("tokenizer", "vocabulary", "rows"), [
    ("bytes", None, 257), ("bytes", 300, 300), ({"name": "bpe", "vocabulary": 280}, None, 280),
    ("characters", None, 43 + 2),
])  # fmt: skip
def test_the_embedding_has_a_row_for_each_token(tokenizer, vocabulary, rows):
    task = task_of(tokenizer=tokenizer, model={**TASK["model"], "vocabulary": vocabulary})
    assert task.build_model().tokens.weight.shape[0] == rows
    assert task.text.meta.vocabulary <= rows


def test_what_is_known_takes_no_text(monkeypatch):
    monkeypatch.setattr("distml.tasks.language_model.open_text", None)  # would fail
    with torch.device("meta"):
        model = task_of(tokenizer="bpe", model={**TASK["model"], "max_positions": 99}).build_model()
    assert (model.vocabulary, model.max_positions) == (4096, 99)


def test_fewer_rows_than_characters_are_refused_when_they_are_counted():
    with pytest.raises(UsageError, match=r"task\.model\.vocabulary 44 is smaller than the tokeniser's 45 tokens"):
        task_of(tokenizer="characters", model={**TASK["model"], "vocabulary": 44}).build_model()
