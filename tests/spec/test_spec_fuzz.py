"""Whatever becomes of a spec's text, it is valid or is refused in one line with a place; never another exception."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from own.jobs import JOBS

from distml.errors import UsageError
from distml.spec.loader import load_spec

LINE = re.compile(r"^[^\n]*:\d+:\d+: [^\n]+$")
TEXTS = [path.read_text() for path in sorted(JOBS.glob("*.yaml"))]
OVER_JOBS = [text for text in TEXTS if re.search(r"^kind: (population|sweep|nas)$", text, re.MULTILINE)]
WORDS = [
    "name",
    "mode",
    "*a",
    "&a ",
    "!x ",
    "<<",
    "%",
    "? ",
    "- ",
    "{",
    "]",
    "'",
    '"',
    "\t",
    "\x00",
    "\ud800",
    ".nan",
    "\\",
]
FUZZ = settings(
    max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)  # fmt: skip

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(WORDS), st.just("a:B")
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copy(JOBS / "own_task.py", folder)
    return folder


def check(folder, raw: bytes) -> None:
    path = folder / "job.yaml"
    path.write_bytes(raw)
    message = None
    try:
        loaded = load_spec(path)
    except UsageError as error:
        message = str(error)
    else:
        path.write_text(loaded.dump())
        assert load_spec(path).job == loaded.job
    event("valid" if message is None else "refused")
    assert message is None or LINE.match(message), message


@FUZZ
@given(data=st.data())
def test_text_that_was_damaged(folder, data):
    text = data.draw(st.sampled_from(TEXTS))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 6))
        text = text[:place] + data.draw(st.sampled_from(WORDS) | st.text(max_size=3)) + text[place + cut :]
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=1)):
        raw[place] = byte
    check(folder, bytes(raw))


@FUZZ
@given(data=st.data())
def test_trees_that_were_rebuilt(folder, data):
    rebuild(folder, data, data.draw(st.sampled_from(TEXTS)))


@settings(FUZZ, max_examples=150)
@given(data=st.data())
def test_jobs_over_jobs_that_were_rebuilt(folder, data):
    rebuild(folder, data, data.draw(st.sampled_from(OVER_JOBS)))


def rebuild(folder, data: st.DataObject, text: str) -> None:
    tree: Any = yaml.safe_load(text)
    for _ in range(data.draw(st.integers(1, 3))):
        holder = _some_block(tree, data)
        key = data.draw(st.sampled_from(sorted(holder)) if holder else st.text(max_size=5))
        action = data.draw(st.sampled_from(["replace", "remove", "rename", "add", "move"]))
        if action == "replace":
            holder[key] = data.draw(values)
        elif action == "add":
            holder[data.draw(st.text(max_size=5) | st.sampled_from(["init", "inline", "args", "groups"]))] = data.draw(
                values
            )
        elif key in holder:
            value = holder.pop(key)
            if action == "rename":
                holder[key[1:] + key[:1]] = value
            elif action == "move":
                _some_block(tree, data)[key] = value
    as_json = data.draw(st.booleans())
    text = json.dumps(tree) if as_json else yaml.safe_dump(tree, allow_unicode=True, default_flow_style=None)
    check(folder, text.encode("utf-8", "surrogatepass"))


def _some_block(tree: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """A mapping somewhere in the tree."""
    blocks, waiting = [], [tree]
    while waiting:
        block = waiting.pop()
        blocks.append(block)
        waiting += [value for value in block.values() if isinstance(value, dict)]
    return data.draw(st.sampled_from(blocks))
