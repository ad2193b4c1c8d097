"""The command line as a user sees it: output, one line per error, exit codes, and what is not imported."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distml import __version__
from distml.cli import main
from distml.errors import RunError, UsageError

LIGHT = """
import contextlib, io, sys
from distml.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    code = main(sys.argv[1:])
heavy = [name for name in ("torch", "ray", "numpy", "sklearn", "matplotlib") if name in sys.modules]
print(code, heavy)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def install(monkeypatch, module, name, function):
    """Put a callee in the place of one that does heavy work."""
    fake = type(sys)(module)
    setattr(fake, name, function)
    monkeypatch.setitem(sys.modules, module, fake)


@pytest.mark.parametrize(
    "arguments",
    ["validate digits-single own-task", "--help", "run --help", "schema", "new mine", "--version",
     "list tasks", "list strategies", "list jobs", "list matrix"],
)  # fmt: skip
def test_light_verbs_import_nothing_heavy(arguments, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments.split()], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert result.stdout.strip() == "0 []"


def test_validate_says_one_line_per_spec(here, capsys):
    (here / "bad.yaml").write_text("distml: v1\nnam: x\n")
    (here / "odd.yaml").write_text("a: [\n")
    assert main(["validate", "digits-ps-async", "bad.yaml", "odd.yaml", "nowhere.yaml"]) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r".*digits-ps-async.yaml: ok \(digits-ps-async, classification, parameter_server/async\)\n", out
    )
    lines = err.splitlines()
    assert [line.split(" ")[1] for line in lines] == ["bad.yaml:2:1:", "odd.yaml:2:1:", "nowhere.yaml:"]
    assert all(line.startswith("error: ") for line in lines)
    assert main(["validate", "digits-single"]) == 0


def test_validate_lays_values_over_every_spec(here, capsys):
    arguments = ["validate", "digits-single", "digits-all-reduce", "--set", "name=other", "--set", "batch_size=8"]
    assert main(arguments) == 0
    assert re.findall(r"\((.*)\)", capsys.readouterr().out) == [
        "other, classification, single", "other, classification, all_reduce"
    ]  # fmt: skip
    assert main([*arguments, "--set", "resources.workers=2"]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert err.startswith("error: --set resources.workers=2: strategy single has one worker")


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ([], ""),
        (["lsit"], "No such command 'lsit'"),
        (["list"], "Missing argument"),
        (["list", "everything"], "everything"),
        (["run"], "Missing argument 'SPEC'"),
        (["run", "x", "--runtime", "mars"], "mars"),
        (["run", "x", "--no-such-option"], "No such option"),
        (["export", "x"], "--out"),
        (["new", "two words"], "must be a Python identifier"),
        (["new", "class"], "must be a Python identifier"),
        (["new", "json"], "would hide the installed module 'json'"),
        (["new", "torch"], "would hide the installed module 'torch'"),
    ],
)
def test_wrong_arguments_end_in_one_line_and_2(arguments, phrase, here, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert phrase in err
    assert len(err.splitlines()) == (1 if arguments else 0)
    assert list(here.iterdir()) == []


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"distml {__version__}\n"
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in ("validate", "schema", "list", "new", "run", "show", "compare", "evaluate", "export", "bench"):
        assert verb in out


def test_schema_is_json(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$schema"].endswith("2020-12/schema")


@pytest.mark.parametrize(
    ("what", "phrase"),
    [("tasks", "regression"), ("strategies", "parameter_server/ssp"), ("jobs", "digits-cnn"), ("matrix", "trains")],
)
def test_lists_are_plain_where_there_is_no_terminal(what, phrase, capsys):
    assert main(["list", what]) == 0
    out = capsys.readouterr().out
    assert phrase in out
    assert out.isascii()
    assert "\x1b" not in out


def test_new_writes_a_starter_that_validates(here, capsys):
    assert main(["new", "two-moons"]) == 0
    assert capsys.readouterr().out == "wrote two_moons.py and two_moons.yaml; next: distml run two_moons.yaml\n"
    source = (here / "two_moons.py").read_text()
    assert "TwoMoonsTask" in [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert len(source.splitlines()) < 30
    assert main(["validate", "two_moons.yaml"]) == 0
    assert "(two_moons, two_moons:TwoMoonsTask, all_reduce)" in capsys.readouterr().out
    assert main(["new", "two_moons"]) == 2
    assert "two_moons.py exists" in capsys.readouterr().err
    (here / "other.yaml").write_text("mine")
    assert main(["new", "other"]) == 2
    assert not (here / "other.py").exists()


@pytest.mark.parametrize("name", ["mean", "task", "_", "none", "my_task"])
def test_new_finds_a_class_name_for_every_module_name(name, here):
    assert main(["new", name]) == 0
    assert main(["validate", f"{name}.yaml"]) == 0


def test_run_passes_everything_on_and_gives_its_code_back(monkeypatch):
    given = {}
    install(monkeypatch, "distml.launch.run", "run_command", lambda **arguments: given.update(arguments) or 4)
    options = (
        "run digits-single --set a.b=1 --set c=2 --out o --runtime inline --fresh --inject kill:rank=1,step=2 --debug"
    )
    assert main(options.split()) == 4
    assert given == {
        "spec": "digits-single",
        "overrides": ["a.b=1", "c=2"],
        "out": Path("o"),
        "runtime": "inline",
        "address": None,
        "fresh": True,
        "inject": ["kill:rank=1,step=2"],
        "debug": True,
    }


def test_compare_passes_everything_on(monkeypatch):
    given = {}
    install(monkeypatch, "distml.launch.compare", "compare_command", lambda **arguments: given.update(arguments))
    arguments = "compare digits-single --vary strategy=single,all_reduce --set seed=1 --out o"
    assert main(arguments.split()) == 0
    assert given == {
        "sources": ["digits-single"],
        "vary": ["strategy=single,all_reduce"],
        "overrides": ["seed=1"],
        "out": Path("o"),
    }


def raising(error):
    def run_command(**arguments):
        raise error

    return run_command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("a:1:1: wrong\nin two lines"), 2, r"error: a:1:1: wrong\nin two lines"),
        (RunError("lost", role="rank 1", phase="exchange", step=7), 3, "error: rank 1, exchange, step 7: lost"),
    ],
)
def test_an_expected_error_is_one_line_with_its_code(error, code, line, monkeypatch, capsys):
    install(monkeypatch, "distml.launch.run", "run_command", raising(error))
    assert main(["run", "x"]) == code
    assert capsys.readouterr().err == f"{line}\n"


def test_a_defect_is_one_line_and_its_traceback_is_kept(here, monkeypatch, capsys):
    install(monkeypatch, "distml.launch.run", "run_command", raising(KeyError("oops")))
    (here / "o").mkdir()
    assert main(["run", "x", "--out", "o"]) == 1
    err = capsys.readouterr().err
    (kept,) = (here / "o").iterdir()
    assert err == f"defect: KeyError: 'oops' (traceback in {here / 'o' / kept.name})\n"
    assert "in run_command" in kept.read_text()
    assert main(["run", "x", "--debug"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    path = Path(re.search(r"traceback in (.+)\)", err).group(1))
    assert "in run_command" in path.read_text()
    path.unlink()


def test_an_interrupt_ends_with_130(monkeypatch):
    install(monkeypatch, "distml.launch.run", "run_command", raising(KeyboardInterrupt()))
    assert main(["run", "x"]) == 130


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "distml", "list", "jobs"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert result.stderr == b""
    assert result.returncode == 141
