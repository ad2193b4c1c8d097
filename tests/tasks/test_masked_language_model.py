"""Masked tokens: which are chosen and what becomes of them, and that neither depends on the workers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from own.oracle import distance, job_of, spec_of, train

from distml.errors import UsageError
from distml.tasks.base import Part, Progress
from distml.tasks.build import build_task
from distml.tasks.data import DatasetStream, take
from distml.tasks.masked_language_model import Masking, uniforms
from distml.tasks.text import IGNORED

TASK = {"name": "masked_language_model", "data": {"path": "rhymes.txt", "validation": 0.2, "test": 0.1}, "block": 16,
        "tokenizer": "bytes", "model": {"name": "bert", "layers": 1, "heads": 2, "width": 16}}  # fmt: skip
MASK, END, VOCABULARY = 257, 256, 258


def task_of(**changes):
    return build_task(job_of(spec_of({**TASK, **changes})))


@pytest.fixture(scope="module")
def sample():
    """(rows, tokens, labels) of 200,000 tokens, every tenth of which is an end."""
    rows = np.random.default_rng(0).integers(0, 256, (2000, 100))
    rows[:, ::10] = END
    tokens, labels = Masking(0.15, MASK, END, VOCABULARY)(rows, np.arange(2000), seed=7)
    return rows, tokens, labels


def assert_share(number: int, of: int, share: float) -> None:
    """Within four standard deviations of a binomial's mean."""
    assert abs(number - of * share) < 4 * math.sqrt(of * share * (1 - share))


def test_as_many_are_chosen_masked_drawn_anew_and_left_as_in_the_paper(sample):
    rows, tokens, labels = sample
    chosen = labels != IGNORED
    masked, same = chosen & (tokens == MASK), chosen & (tokens == rows)
    redrawn = chosen & ~masked & ~same
    eligible, count = int((rows != END).sum()), int(chosen.sum())
    assert_share(count, eligible, 0.15)
    assert_share(int(masked.sum()), count, 0.8)
    assert_share(int(redrawn.sum()), count, 0.1 * 255 / 256)  # one in 256 is drawn as what it was
    assert_share(int(same.sum()), count, 0.1 + 0.1 / 256)


def test_what_is_not_chosen_stays_and_what_is_has_its_own_token_as_label(sample):
    rows, tokens, labels = sample
    chosen = labels != IGNORED
    assert (tokens[~chosen] == rows[~chosen]).all()
    assert (labels[chosen] == rows[chosen]).all()
    assert not chosen[rows == END].any()
    assert (tokens[rows != END] != END).all()  # nor is an end ever drawn
    redrawn = tokens[chosen & (tokens != MASK) & (tokens != rows)]
    assert set(range(256)) == set(np.unique(redrawn))


@pytest.mark.parametrize(("mask", "end"), [(0, 1), (1, 0), (3, 7), (8, 9)])
def test_drawn_tokens_are_all_but_mask_and_end(mask, end):
    masking = Masking(0.15, mask, end, 10)
    drawn = masking._ordinary(np.arange(0, 1, 1 / 80))
    assert np.unique(drawn, return_counts=True)[1].tolist() == [10] * 8
    assert set(drawn.tolist()) == set(range(10)) - {mask, end}


def test_nothing_behind_the_text_is_chosen():
    rows = np.full((50, 40), IGNORED)
    rows[:, :5] = 65
    tokens, labels = Masking(0.5, MASK, END, VOCABULARY)(rows, np.arange(50), 0)
    assert (labels[:, 5:] == IGNORED).all()
    assert (tokens[:, 5:] == END).all()
    assert (labels[:, :5] == 65).any()


def test_the_numbers_are_uniform_and_independent():
    first, second, third = uniforms(3, np.arange(400), 250, 3)
    other, _, _ = uniforms(4, np.arange(400), 250, 3)
    flat = [numbers.ravel() for numbers in (first, second, third, other, np.roll(first, 1, 0), np.roll(first, 1, 1))]
    for numbers in flat:
        counts = np.histogram(numbers, 20, (0.0, 1.0))[0]
        assert ((counts - 5000) ** 2 / 5000).sum() < 52  # chi-square, 19 degrees: one in 10,000 is above 51
    correlations = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlations).max() < 4.5 / math.sqrt(len(flat[0]))


def test_the_draw_of_a_place_does_not_depend_on_its_batch():
    rows = np.random.default_rng(0).integers(0, 256, (9, 30))
    masking = Masking(0.3, MASK, END, VOCABULARY)
    whole = masking(rows, np.arange(40, 49), seed=1)
    for start in range(9):
        one = masking(rows[start : start + 1], np.array([40 + start]), seed=1)
        assert all((found == expected[start : start + 1]).all() for found, expected in zip(one, whole, strict=True))
    elsewhere = masking(rows, np.arange(41, 50), seed=1)
    assert (elsewhere[1] != whole[1]).any()


def test_every_epoch_masks_anew_and_held_out_text_always_alike():
    task = task_of()
    dataset = task.data("train")
    count = len(dataset)
    stream = DatasetStream(dataset, 0, count, 0, 1)
    epochs = [stream.next(None, None) for _ in range(2)]
    rows = [dict(zip(map(tuple, torch.where(labels == IGNORED, tokens, labels).tolist()), labels.tolist(), strict=True))
            for tokens, labels in epochs]  # fmt: skip
    shared = [row for row in rows[0] if row in rows[1]]
    assert sum(rows[0][row] != rows[1][row] for row in shared) > 0.8 * len(shared) > 10
    held_out = [list(Part(index, 2, 0, "validation", 3, task_of().data("validation")).batches()) for index in (0, 1)]
    whole = take(task.data("validation"), torch.arange(len(task.data("validation"))))
    assert torch.equal(torch.cat([labels for part in held_out for _, labels in part]), whole[1])


def test_a_resumed_stream_masks_what_the_straight_one_does():
    dataset = task_of().data("train")
    straight, resumed = (DatasetStream(dataset, 3, 6, 1, 2) for _ in range(2))
    for _ in range(9):
        straight.next(None, None)
    resumed.load_state(straight.state())
    assert all(map(torch.equal, straight.next(None, None), resumed.next(None, None)))


def test_the_update_does_not_depend_on_the_workers_whose_counts_differ():
    spec = spec_of(
        TASK, batch_size=6, optimizer={"name": "sgd", "lr": 0.5}, stop={"steps": 6}, log={"every": 1, "to": []}
    )
    found = {workers: train({**spec, "strategy": "all_reduce", "resources": {"workers": workers}})
             for workers in (1, 2, 3)}  # fmt: skip
    counts = [report.means["loss"][1] for report in found[2].reports if report.version == 1]
    assert len(set(counts)) == 2  # else the rule would not be tested
    for workers in (2, 3):
        assert distance(found[workers].named, found[1].named) < 1e-5
    losses = [sum(r.means["loss"][i] for r in found[3].reports if r.version == 2) for i in (0, 1)]
    alone = next(r.means["loss"] for r in found[1].reports if r.version == 2)
    assert losses == pytest.approx(list(alone), rel=1e-5)
    mean_of_means = np.mean([r.means["loss"][0] / r.means["loss"][1] for r in found[3].reports if r.version == 2])
    assert abs(mean_of_means - alone[0] / alone[1]) > 1e-4  # the control: the wrong rule gives another number


def test_an_evaluation_counts_the_chosen_tokens():
    task = task_of()
    torch.manual_seed(0)
    model = task.build_model().eval()
    with torch.no_grad():
        parts = [task.evaluate(model, Part(index, 3, 0, "validation", 2, task.data("validation")), Progress())
                 for index in range(3)]  # fmt: skip
        tokens, labels = take(task.data("validation"), torch.arange(len(task.data("validation"))))
        logits = model(tokens)
    chosen = labels != IGNORED
    loss = sum((means["loss"] for means in parts[1:]), parts[0]["loss"])
    accuracy = sum((means["accuracy"] for means in parts[1:]), parts[0]["accuracy"])
    assert loss.count == accuracy.count == int(chosen.sum())
    expected = -logits.log_softmax(-1)[chosen].gather(1, labels[chosen][:, None]).sum()
    assert loss.total == pytest.approx(float(expected), rel=1e-5)
    assert accuracy.total == int((logits.argmax(-1) == labels)[chosen].sum())


@pytest.mark.parametrize(("steps", "least", "most"), [(300, 0.8, 1.0), (1, 0.0, 0.5)])
def test_it_learns_what_the_text_around_tells(tmp_path, steps, least, most):
    (tmp_path / "text.txt").write_text("\n\n".join("abcd"[n % 4 :] + "abcd" * 60 for n in range(40)))
    task = {**TASK, "data": str(tmp_path / "text.txt"), "tokenizer": "characters", "block": 8, "mask": 0.3,
            "model": {**TASK["model"], "width": 32}}  # fmt: skip
    trained = train(spec_of(task, steps=steps, batch_size=16, optimizer={"name": "adamw", "lr": 0.003}))
    assert least <= trained.evaluated[-1].metrics["eval/accuracy"] <= most


def test_tokens_without_one_for_masks_are_refused(tmp_path):
    from distml.tasks.tokenizers import ByteTokenizer
    from distml.tasks.tokens import write_folder

    texts = {name: ["a text that is long enough"] for name in ("train", "validation", "test")}
    write_folder(tmp_path / "tokens", ByteTokenizer(), texts)
    spec = {key: value for key, value in TASK.items() if key != "tokenizer"}
    with pytest.raises(UsageError, match=r"without a token for masked ones, .* `distml tokenize --mask`"):
        build_task(job_of(spec_of({**spec, "data": str(tmp_path / "tokens")}))).data("train")
