"""A user's own task is found, and its needs are read, without running a line of it."""

from __future__ import annotations

import pytest

from distml.errors import UsageError
from distml.spec.loader import load_spec
from distml.spec.own_task import find_own_task
from distml.spec.yaml import Position

START = Position("job.yaml", 3, 7)
HEAD = "distml: v1\nname: x\n"


def find(directory, name="mine:A"):
    return find_own_task(name, directory, START)


def refused(directory, name="mine:A"):
    with pytest.raises(UsageError) as caught:
        find(directory, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_of_it_is_run(tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit('run')\nclass A:\n    pass\n")
    assert find(tmp_path).needs is None


@pytest.mark.parametrize(
    ("body", "needs"),
    [
        ("needs = frozenset({'one_version'})", {"one_version"}),
        ("needs: frozenset[str] = frozenset(('one_version', 'group_mean'))", {"one_version", "group_mean"}),
        ("needs = {'whole_weights'}", {"whole_weights"}),
        ("needs = ('whole_weights',)", {"whole_weights"}),
        ("needs = set(['whole_weights'])", {"whole_weights"}),
        ("needs = frozenset()", set()),
        ("needs = compute()", None),
        ("needs = {NEED}", None),
        ("needs = Base.needs | {'one_version'}", None),
        ("x = 5", None),
    ],
)
def test_literal_needs_are_read(tmp_path, body, needs):
    (tmp_path / "mine.py").write_text(f"class A:\n    '''Mine.'''\n    {body}\n")
    assert find(tmp_path).needs == needs


def test_where_a_module_may_lie(tmp_path):
    (tmp_path / "pack" / "inner").mkdir(parents=True)
    (tmp_path / "pack" / "__init__.py").write_text("class A:\n    pass\n")
    (tmp_path / "pack" / "inner" / "deep.py").write_text("class B:\n    pass\n")
    assert find(tmp_path, "pack:A").path == tmp_path / "pack" / "__init__.py"
    assert find(tmp_path, "pack.inner.deep:B").path == tmp_path / "pack" / "inner" / "deep.py"
    assert find(tmp_path, "json.decoder:JSONDecoder").path.name == "decoder.py"
    assert find(tmp_path, "textwrap:TextWrapper").path.name == "textwrap.py"


def test_a_class_may_come_through_an_import_or_a_branch(tmp_path):
    branch = "try:\n    import q\nexcept ImportError:\n    class B:\n        needs = {'one_version'}\n"
    (tmp_path / "mine.py").write_text(f"from x import A\n{branch}C = B\n")
    assert find(tmp_path, "mine:A").needs is None
    assert find(tmp_path, "mine:B").needs == {"one_version"}
    assert find(tmp_path, "mine:C").needs is None


def test_what_is_missing_is_named_with_what_is_near(tmp_path):
    (tmp_path / "mine.py").write_text("class TwoMoons:\n    pass\n")
    message = refused(tmp_path, "mime:TwoMoons")
    assert message.startswith("job.yaml:3:7: no module 'mime'")
    assert "did you mean mine.py?" in message
    assert "Python files there: mine" in refused(tmp_path, "qqqq.zzz:A")
    assert "did you mean mine:TwoMoons?" in refused(tmp_path, "mine:TwoMoon")
    assert "its classes: TwoMoons" in refused(tmp_path, "mine:Q")
    assert "no module '__main__'" in refused(tmp_path, "__main__:Q")
    assert "no module 'sys'" in refused(tmp_path, "sys:Q")


@pytest.mark.parametrize(
    ("source", "place", "phrase"),
    [
        (b"class A:\n    def f(:\n", ":2:11: ", "not valid Python"),
        (b"class A:\n    pass\n\0", ":", "not valid Python"),
        (b"x = '\xff'\n", ":1:", "not valid Python"),
        (b"(" * 5000, ":1:", "not valid Python"),
        (b"class A:\n    needs = {'one_versoin'}\n", ":2:14: ", "'one_versoin'; did you mean 'one_version'?"),
        (b"class A:\n    needs = {'x'}\n", ":2:14: ", "known: group_mean, whole_weights, one_version"),
        (b"class A:\n    needs = {5}\n", ":2:14: ", "unknown need 5"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_source_is_located_there(tmp_path, source, place, phrase):
    path = tmp_path / "mine.py"
    path.write_bytes(source)
    message = refused(tmp_path)
    assert message.startswith(f"{path}{place}")
    assert phrase in message


def test_needs_are_held_against_what_the_strategy_offers(tmp_path, fails):
    (tmp_path / "mine.py").write_text("class A:\n    needs = frozenset({'one_version'})\n")
    spec = HEAD + "task: 'mine:A'\nstop: {steps: 1}\nstrategy: {name: parameter_server, mode: async}\n"
    assert fails(spec) == (
        "job.yaml:5:1: task mine:A needs one_version, which parameter_server/async does not offer; "
        "strategies that do: single, all_reduce, parameter_server/sync, zero/1, zero/2, zero/3"
    )
    (tmp_path / "job.yaml").write_text(spec.replace("async", "sync"))
    assert load_spec(tmp_path / "job.yaml").job.strategy.mode == "sync"


def test_a_missing_file_is_located_at_the_task_s_name(fails):
    assert fails(HEAD + "stop: {steps: 1}\ntask: {name: 'mine:A'}\n").startswith("job.yaml:4:14: no module 'mine'")
