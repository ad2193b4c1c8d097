"""`resources.workers: {min, max}`: what may be written, what it is then, and what is refused with its place."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from distml.errors import UsageError
from distml.spec.json_schema import json_schema
from distml.spec.loader import load_spec
from distml.spec.schema import JobSpec
from distml.spec.yaml import parse

SPEC = """\
distml: v1
name: e
task: {name: classification, data: digits}
stop: {steps: 5}
resources:
  workers: {min: 2, max: 8}
"""
ACTING = SPEC.replace("{name: classification, data: digits}", "{name: ppo, environment: CartPole-v1}")


def write(folder: Path, text: str) -> Path:
    path = folder / "e.yaml"
    path.write_text(text)
    return path


def test_a_range_is_its_largest_size_until_there_is_a_group(tmp_path):
    loaded = load_spec(write(tmp_path, SPEC))
    resources = loaded.job.resources
    assert (resources.workers, resources.elastic.min, resources.elastic.max) == (8, 2, 8)
    assert "workers: {min: 2, max: 8}" in loaded.dump()
    assert load_spec(write(tmp_path, loaded.dump())).job == loaded.job
    jsonschema.validate(parse(SPEC.encode(), "e.yaml").data, json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(parse(SPEC.replace("min: 2, ", "").encode(), "e.yaml").data, json_schema())


def test_the_job_of_a_size_travels_as_one_that_was_always_fixed(tmp_path):
    sized = load_spec(write(tmp_path, SPEC)).job.with_workers(3)
    text = sized.model_dump_json(by_alias=True)
    assert '"workers":3' in text
    assert JobSpec.model_validate_json(text, by_alias=True, by_name=False) == sized
    fixed = load_spec(write(tmp_path, SPEC.replace("{min: 2, max: 8}", "3"))).job
    assert (sized, sized.resources.elastic, sized.rows_at_once) == (fixed, None, 22)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SPEC.replace("min: 2", "min: 9"), "e.yaml:6:3: resources.workers: min 9 is larger than max 8; swap them"),
        (SPEC.replace("min: 2", "min: 0"), "e.yaml:6:18: resources.workers.min must be at least 1, got 0"),
        (SPEC.replace("min: 2", "min: x"), "e.yaml:6:18: resources.workers.min must be an integer, got the string 'x'"),
        (SPEC.replace("min: 2, ", ""), "e.yaml:6:12: the key 'min' is missing in resources.workers; add it"),
        (SPEC.replace("max: 8", "max: 8, most: 9"), "unknown key 'most' in resources.workers; "),
        (SPEC.replace("{min: 2, max: 8}", "x"), "e.yaml:6:12: resources.workers must be an integer, got the string"),
        (SPEC.replace("max: 8", "max: 65"), "batch_size 64 is shared out over 65 workers"),
        (SPEC + "  placement: strict_pack\n", "e.yaml:7:3: workers that come and go take what room there is"),
        (ACTING, "e.yaml:6:3: task ppo has a batch that follows from the number of workers"),
        (SPEC + "strategy: zero\nmicro_batch_size: 7\n", "over 3 workers in pieces of 7 is 4 micro-batches"),
        (SPEC.replace("name: e", "name: e\nstrategy: single"), "strategy single has one worker"),
        ("distml: v1\nkind: population\nname: p\nbase:\n  task: classification\n  stop: {steps: 9}\n  resources:\n"
         "    workers: {min: 1, max: 2}\nmembers: 2\nevery: 3\nspace: {optimizer.lr: {uniform: [0.1, 0.2]}}\n"
         "objective: eval/loss\n", "e.yaml:8:5: base.resources.workers is a range, and a population's members"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_place(tmp_path, text, message):
    with pytest.raises(UsageError) as caught:
        load_spec(write(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_rules_pass_for_one_number(tmp_path):
    """The control: what is refused above is refused for the range alone."""
    for text in (ACTING, SPEC + "  placement: strict_pack\n", SPEC + "strategy: zero\nmicro_batch_size: 7\n"):
        assert load_spec(write(tmp_path, text.replace("{min: 2, max: 8}", "8"))).job.resources.workers == 8


def test_a_range_can_be_set_from_the_command_line(tmp_path):
    path = write(tmp_path, SPEC)
    assert load_spec(path, ["resources.workers.min=3"]).job.resources.elastic.min == 3
    assert load_spec(path, ["resources.workers=4"]).job.resources.elastic is None
    assert load_spec(path, ["resources.workers={min: 1, max: 4}"]).job.resources.workers == 4
