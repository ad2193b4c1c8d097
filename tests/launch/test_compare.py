"""`distml compare`: finished runs as they are, and one spec run in variations."""

from __future__ import annotations

import json

import pytest

from distml.cli import main
from distml.errors import UsageError
from distml.launch.compare import compare_command, slug, split_values, variations
from distml.spec.loader import load_spec
from distml.spec.yaml import dump


@pytest.fixture
def spec(tmp_path, monkeypatch, tiny_spec) -> str:
    """A spec of ten steps, and the current directory that it is in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(dump({**tiny_spec, "stop": {"steps": 10}}))
    return "tiny.yaml"


# ----------------------------------------------------------------------------------------------------------- variations
@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a,b", ["a", "b"]),
        ("0.1, 1e-3", ["0.1", "1e-3"]),
        ("{name: x, mode: y},z", ["{name: x, mode: y}", "z"]),
        ("[1, [2, 3]],[4]", ["[1, [2, 3]]", "[4]"]),
        ("\"a,b\",'c, [d'", ['"a,b"', "'c, [d'"]),
    ],
)
def test_commas_inside_brackets_and_quotes_do_not_split(text, values):
    assert split_values(text, text) == values


@pytest.mark.parametrize("text", ["a,,b", "a,", "{a", "a}", "'a"])
def test_values_that_cannot_be_split(text):
    with pytest.raises(UsageError, match="--vary"):
        split_values(text, f"key={text}")


def test_strategies_have_readable_names(spec):
    names = "single,all_reduce,parameter_server/sync,parameter_server/async,parameter_server/ssp"
    found = [load_spec(spec, one.overrides).job.strategy for one in variations([f"strategy={names}"])]
    assert ",".join(strategy.label for strategy in found) == names
    assert found[-1].max_staleness == 4
    block = variations(["strategy={name: parameter_server, mode: ssp, max_staleness: 9}"])[0]
    assert load_spec(spec, block.overrides).job.strategy.max_staleness == 9


def test_several_varies_make_every_combination():
    found = variations(["seed=0,1", "strategy=single,parameter_server/async"])
    assert [one.label for one in found] == [
        "0-single", "0-parameter_server-async", "1-single", "1-parameter_server-async",
    ]  # fmt: skip
    assert found[0].overrides[0] == "seed=0"


@pytest.mark.parametrize("vary", [["seed"], ["=1"], ["seed="], ["seed=1", "seed=2"], ["seed=1,1"]])
def test_what_is_no_variation(vary):
    with pytest.raises(UsageError, match="--vary"):
        variations(vary)


def test_a_value_is_part_of_a_folder_s_name():
    assert slug("{name: x, mode: y}") == "name-x-mode-y"
    assert slug("../..") == "value"
    assert slug("1.0e-3") == "1.0e-3"


# -------------------------------------------------------------------------------------------------------------- running
def test_every_variation_runs_once_and_is_compared(spec, tmp_path, capsys):
    arguments = ["compare", spec, "--vary", "optimizer.lr=0.001,0.01", "--set", "seed=3", "--out", "out"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "[1/2] 0.001: done at step 10" in out
    assert "picture: out/compare.png" in out
    runs = json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["tiny-0.001", "tiny-0.01"]
    assert load_spec(tmp_path / "out" / "tiny-0.01" / "spec.yaml").job.optimizer.lr == 0.01
    assert load_spec(tmp_path / "out" / "tiny-0.01" / "spec.yaml").job.seed == 3
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "out" / "tiny-0.01" / "metrics.jsonl").stat().st_mtime_ns
    assert main(arguments) == 0
    assert "[2/2] 0.01: already finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "tiny-0.01" / "metrics.jsonl").stat().st_mtime_ns == written


def test_a_variation_that_fails_is_listed_and_the_others_go_on(spec, capsys):
    vary = ["optimizer={name: sgd, lr: 1.0e+30},adamw,adamm"]
    assert compare_command([spec], vary, [], None) == 0
    out, err = capsys.readouterr()
    assert "[1/3] name-sgd-lr-1.0e+30: failed: rank 0, loss, step" in err
    assert "[2/3] adamw: done" in out
    assert "[3/3] adamm: failed: --set optimizer=adamm: unknown optimizer 'adamm'" in err
    assert "2 of 3 variations failed" in err
    assert "picture: runs/compare/compare.png" in out


@pytest.mark.parametrize(("vary", "code"), [("optimizer={name: sgd, lr: 1.0e+30}", 3), ("stop.steps=-1,0", 2)])
def test_if_none_finishes_its_code_is_the_command_s(spec, vary, code, capsys):
    assert compare_command([spec], [vary], [], None) == code
    assert "picture" not in capsys.readouterr().out


def test_single_has_one_worker_also_where_the_spec_has_two(spec, tiny_spec, tmp_path, capsys):
    (tmp_path / spec).write_text(
        dump({**tiny_spec, "stop": {"steps": 10}, "strategy": "all_reduce", "resources": {"workers": 2}})
    )
    assert compare_command([spec], ["strategy=single,all_reduce"], [], tmp_path / "out", runtime="inline") == 0
    assert "[1/2] single: resources.workers: 2 -> 1" in capsys.readouterr().out
    first, second = json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]
    assert first["final"]["eval/loss"] == pytest.approx(second["final"]["eval/loss"], abs=1e-4)
    # What the user says stays.
    assert compare_command([spec], ["strategy=single"], ["resources.workers=2"], tmp_path / "other") == 2
    assert "strategy single has one worker" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ run directories
def test_run_directories_are_compared_as_they_are(tiny, own_run, tmp_path, capsys):
    assert main(["compare", str(tiny), str(own_run), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert f"picture: {tmp_path / 'out' / 'compare.png'}" in out
    assert {run["name"] for run in json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]} == {
        "tiny",
        "own",
    }


def test_sources_that_cannot_be_compared(spec, tiny, capsys):
    for arguments, phrase in (
        ([str(tiny), spec], "run directories or one spec"),
        ([spec, spec], "one spec or several run directories"),
        ([str(tiny), "--vary", "seed=1,2"], "--vary and --set are for"),
        ([spec], "say what to vary"),
        (["nowhere.yaml"], "no such file"),
    ):
        assert main(["compare", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert phrase in err
        assert len(err.splitlines()) == 1
