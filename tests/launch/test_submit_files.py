"""What of a directory is sent: held against Git itself, and what nobody wants to send."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from distml.errors import UsageError
from distml.launch.submit.archive import Upload, package_files
from distml.launch.submit.checks import check_base, check_data, check_modules, check_recording, sent_as
from distml.launch.submit.files import ALWAYS_BEHIND, Selection, select
from distml.launch.submit.written import as_written
from distml.spec.loader import load_spec

FOLDERS = ("a", "b", "data", "build")
NAMES = ("x.txt", "y.txt", "z.py", "log.bin", "keep.txt", "a b", "odd", "d")
PATTERNS = (
    "*.txt", "!keep.txt", "build/", "/data", "data/", "a/b", "**/log.bin", "x.*", "!x.txt", "a/*", "!a/b/", "*",
    "!*/", "!*.py", "# a comment", "", "\\!odd", "b/**/z.py", "/a/", "[xy].txt", "lo?.bin", "a\\ b", "keep.txt ",
)  # fmt: skip


def write(root: Path, name: str, text: str = "") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text or name)
    return path


def random_tree(root: Path, draw: random.Random) -> None:
    """Files in folders up to three deep, with ignore files here and there."""
    folders = [""] + ["/".join(draw.choices(FOLDERS, k=draw.randint(1, 3))) + "/" for _ in range(6)]
    for folder in folders:
        for name in draw.sample(NAMES, 5):
            write(root, folder + name)
    for folder in draw.sample(folders, 3):
        (root / folder / ".gitignore").write_text("\n".join(draw.choices(PATTERNS, k=draw.randint(1, 4))) + "\n")


def git_files(root: Path) -> set[str]:
    command = ["git", "-C", str(root), "ls-files", "-z", "--others", "--exclude-standard"]
    out = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return set(out.split("\0")) - {""}


@pytest.mark.parametrize("seed", range(30))
def test_what_git_ignores_stays_behind(tmp_path: Path, seed: int) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    random_tree(root, random.Random(seed))
    assert set(select(root).files) == git_files(root)
    for below in (path for path in root.iterdir() if path.is_dir() and path.name != ".git"):
        # A folder inside the repository: the rules above it hold there too.
        expected = {name.split("/", 1)[1] for name in git_files(root) if name.startswith(below.name + "/")}
        if expected:
            assert set(select(below).files) == expected


def test_what_nobody_sends(tmp_path: Path) -> None:
    for name in ALWAYS_BEHIND:
        write(tmp_path, f"deep/{name}/file")
    write(tmp_path, "env/pyvenv.cfg")
    write(tmp_path, "runs/x/file")
    write(tmp_path, "package/runs/module.py")  # a folder of this name further down is not where runs are
    write(tmp_path, "elsewhere/result.json"), write(tmp_path, "elsewhere/spec.yaml")
    write(tmp_path, "weights/manifest.json"), write(tmp_path, "weights/state.json")
    write(tmp_path, "spec.yaml"), write(tmp_path, "notes.txt")
    write(tmp_path, ".rayignore", "notes.txt\n")
    found = select(tmp_path)
    assert set(found.files) == {"package/runs/module.py", "spec.yaml", ".rayignore"}
    assert {"runs", "env", "elsewhere", "weights", "deep/.git", "notes.txt"} <= set(found.behind)
    assert found.why_behind("runs/x/file") == "runs is never sent"
    assert found.why_behind("notes.txt") == "ignored"
    assert found.why_behind("spec.yaml") is None


def test_links_never_bring_what_is_not_sent(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", write(tmp_path, "secret.txt", "secret")
    write(root, "data/one.txt", "one"), write(root, "hidden.txt", "hidden")
    write(root, ".gitignore", "hidden.txt\n"), write(root, ".git/config", "token")
    (root / "away").symlink_to(outside)
    (root / "away-folder").symlink_to(tmp_path)
    (root / "inside").symlink_to("data/one.txt")
    (root / "folder").symlink_to("data")
    (root / "data" / "loop").symlink_to("..")
    (root / "to-hidden").symlink_to("hidden.txt")
    (root / "to-git").symlink_to(".git/config")
    (root / "nowhere").symlink_to("missing")
    found = select(root)
    assert set(found.files) == {".gitignore", "data/one.txt", "inside", "folder/one.txt"}
    assert {"away", "away-folder", "data/loop", "to-hidden", "to-git", "nowhere"} <= set(found.behind)
    assert str(outside) in found.behind["away"]
    Upload(found).write(tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert archive.read("folder/one.txt") == archive.read("inside") == b"one"
        texts = b"".join(archive.read(name) for name in archive.namelist() if not name.startswith("distml/"))
    assert b"secret" not in texts
    assert b"token" not in texts


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert select(tmp_path).behind == {"pipe": "not a file"}
    os.close(os.open(os.fsencode(tmp_path) + b"/odd-\xff", os.O_CREAT))
    with pytest.raises(UsageError, match="odd-"):
        select(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        select(tmp_path / "missing")


# ---------------------------------------------------------------------------------------------------------- the archive
def test_equal_content_is_an_equal_archive(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for root in (one, other):
        write(root, "b/c.txt", "text"), write(root, "a.py", "code")
    os.utime(other / "a.py", (1, 1))
    for root in (one, other):
        Upload(select(root)).write(root.with_suffix(".zip"))
    assert one.with_suffix(".zip").read_bytes() == other.with_suffix(".zip").read_bytes()
    write(other, "a.py", "c0de")
    Upload(select(other)).write(other.with_suffix(".zip"))
    assert one.with_suffix(".zip").read_bytes() != other.with_suffix(".zip").read_bytes()


def test_too_much_is_refused_with_what_to_leave_out(tmp_path: Path) -> None:
    with open(tmp_path / "model.bin", "wb") as file:
        file.truncate(90 * 2**20)  # no bytes of it are read
    write(tmp_path, "data/x", "x" * 1000)
    upload = Upload(select(tmp_path))
    upload.check_size()
    with open(tmp_path / "data" / "more.bin", "wb") as file:
        file.truncate(20 * 2**20)
    upload = Upload(select(tmp_path))
    with pytest.raises(
        UsageError, match=r"takes 100.0 MiB.*\.rayignore.*model\.bin \(90\.0 MiB\), data/ \(20\.0 MiB\)"
    ):
        upload.check_size()
    text = "\n".join(upload.lines())
    for part in ("sending 3 files, 110.0 MiB", "90.0 MiB  model.bin", "itself: "):
        assert part in text


def test_the_listing_names_at_most_ten(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path, f"{number:02d}.txt", "x" * (1000 + number))
        write(tmp_path, f"{number:02d}.tmp")
    write(tmp_path, ".gitignore", "*.tmp")
    lines = Upload(select(tmp_path)).lines()
    assert [line.split()[-1] for line in lines[1:11]] == [f"{number}.txt" for number in range(29, 19, -1)]
    assert lines[11].startswith("and distml")
    assert lines[-1].endswith("11.tmp and 18 more")


def test_the_archive_brings_a_distml_that_runs(tmp_path: Path) -> None:
    """Without any other: the interpreter sees third-party packages, and not the source that runs this test."""
    Upload(None).write(tmp_path / "x.zip")
    zipfile.ZipFile(tmp_path / "x.zip").extractall(tmp_path / "there")
    code = (
        "import distml; from distml.cli import main; "
        "print(distml.__file__); raise SystemExit(main(['validate', 'digits-single', 'own-task']))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "there", capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert str(tmp_path / "there" / "distml") in found.stdout
    assert {"distml/cli.py", "distml/shipped_jobs/own_task.py", "distml/py.typed"} <= set(package_files())
    assert not any("__pycache__" in name for name in package_files())


def test_a_working_directory_that_holds_distml_brings_its_own(tmp_path: Path) -> None:
    write(tmp_path, "distml/__init__.py"), write(tmp_path, "distml/cli.py")
    upload = Upload(select(tmp_path))
    assert upload.package == {}
    assert "with distml's source among them" in upload.lines()


@pytest.mark.parametrize("name", ["distml.py", "distml/notes.txt"])
def test_something_else_of_its_name_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    with pytest.raises(UsageError, match="would be taken for distml"):
        Upload(select(tmp_path))


# ----------------------------------------------------------------------------------------------------------- the checks
OWN = "distml: v1\nname: own\ntask: 'my_task:Mine'\nstrategy: single\nbatch_size: 4\nstop: {steps: 1}\n"
TASK = "import shelved_helper\nimport distml\nclass Mine(distml.Task):\n    needs = frozenset()\n"


def checked(spec: Path, root: Path, *overrides: str) -> list[str]:
    chosen = select(root)
    loaded = load_spec(spec, overrides)
    sent_as(spec, chosen.root, chosen)
    written = as_written(spec, overrides, loaded, root)
    check_base(written, chosen)
    check_recording(loaded, written)
    return [*check_modules(loaded, chosen), *check_data(loaded, written, chosen)]


def test_own_modules_must_be_sent(tmp_path: Path) -> None:
    spec = write(tmp_path, "jobs/own.yaml", OWN)
    write(tmp_path, "jobs/my_task.py", TASK), write(tmp_path, "jobs/shelved_helper.py")
    assert checked(spec, tmp_path) == []
    write(tmp_path, ".gitignore", "shelved_helper.py\n")
    with pytest.raises(UsageError, match=r"needs .*shelved_helper\.py, which is not sent: ignored"):
        checked(spec, tmp_path)
    write(tmp_path, ".gitignore", "my_*.py\n")
    with pytest.raises(UsageError, match=r"my_task\.py, which is not sent"):
        checked(spec, tmp_path)


def test_own_modules_from_elsewhere_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write(tmp_path, "here/own.yaml", OWN)
    write(tmp_path, "here/my_task.py", TASK), write(tmp_path, "library/shelved_helper.py")
    assert checked(spec, spec.parent) == []  # a module that is nowhere: the run will say so
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    with pytest.raises(
        UsageError, match=r"imports shelved_helper, which is .*library/shelved_helper\.py, .*outside the working dir"
    ):
        checked(spec, spec.parent)
    assert checked(spec, tmp_path) == []


def test_a_shipped_job_with_its_own_task_needs_no_directory() -> None:
    assert list(check_modules(load_spec("own-task"), None)) == []


def test_weights_that_stay_behind_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "distml: v1\nname: x\ntask: classification\nstrategy: single\nstop: {steps: 1}\ninit: {from: %s}\n"
    write(tmp_path, "runs/before/spec.yaml"), write(tmp_path, "good.safetensors")
    spec = write(tmp_path, "x.yaml", text % "good.safetensors")
    assert checked(spec, tmp_path) == []
    spec.write_text(text % "runs/before")
    with pytest.raises(UsageError, match=r"init\.from runs/before is not sent: runs is never sent; .*distml export"):
        checked(spec, tmp_path)
    outside = write(tmp_path.parent, f"{tmp_path.name}-w.safetensors")
    spec.write_text(text % outside)
    assert checked(spec, tmp_path) == [f"note: init.from {outside} is not sent; it must exist on the cluster"]
    outside.unlink()


DIGITS = "distml: v1\nname: b\ntask: {task}\nstrategy: single\nstop: {{steps: 4}}\n{more}"
SEARCH = {
    "population": "kind: population\nmembers: 2\nevery: 2\nobjective: {metric: eval/loss, mode: min}\n",
    "sweep": "kind: sweep\ntrials: 2\nsampler: random\nobjective: {metric: eval/loss, mode: min}\n",
    "nas": "kind: nas\ntrials: 2\ncontroller: random\nreward: {metric: eval/accuracy}\n",
}  # fmt: skip
RATES = "space: {optimizer.lr: {choice: [0.1, 0.01]}}\n"


@pytest.mark.parametrize("kind", list(SEARCH))
def test_the_file_of_a_base_must_be_sent(tmp_path: Path, kind: str) -> None:
    text = "distml: v1\nname: over\nbase: {base}\n" + SEARCH[kind].replace("{", "{{").replace("}", "}}")
    write(tmp_path, "work/base.yaml", DIGITS.format(task="classification", more="evaluate: {every: 2}\n"))
    write(tmp_path, "outside.yaml", DIGITS.format(task="classification", more="evaluate: {every: 2}\n"))
    spec, root = write(tmp_path, "work/over.yaml", text.format(base="base.yaml") + RATES), tmp_path / "work"
    assert checked(spec, root) == []
    assert checked(spec, root, "base=digits-single") == []  # travels with distml
    for base in ("../outside.yaml", str(tmp_path / "outside.yaml")):
        with pytest.raises(UsageError, match=r"base is .*outside\.yaml, which lies outside the working directory"):
            checked(spec, root, f"base={base}")
    with pytest.raises(UsageError, match="is in another place on the cluster"):
        checked(spec, root, f"base={root / 'base.yaml'}")
    write(root, ".rayignore", "base.yaml\n")
    with pytest.raises(UsageError, match=r"base is .*base\.yaml, which is not sent: ignored"):
        checked(spec, root)


def test_classes_that_only_a_space_names_must_be_sent(tmp_path: Path) -> None:
    for name in ("env_a", "env_b"):
        write(tmp_path, f"{name}.py", "import gymnasium\nclass One(gymnasium.Env):\n    pass\n")
    base = "{distml: v1, name: r, task: {name: actor_critic, environment: {id: 'env_a:One'}}, strategy: single, " \
           "stop: {frames: 100}}"  # fmt: skip
    head = f"distml: v1\nkind: sweep\nname: s\nbase: {base}\ntrials: 2\nsampler: grid\n"
    goal = "objective: {metric: eval/return_greedy_mean, mode: max}\n"
    space = "space: {task.environment.id: {choice: ['env_a:One', 'env_b:One']}}\n"
    spec = write(tmp_path, "s.yaml", head + goal + space)
    assert checked(spec, tmp_path) == []
    write(tmp_path, ".rayignore", "env_b.py\n")
    with pytest.raises(UsageError, match=r"env_b:One needs .*env_b\.py, which is not sent: ignored"):
        checked(spec, tmp_path)
    spec.write_text(head + goal + RATES)
    assert checked(spec, tmp_path) == []


def test_images_that_stay_behind_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "cifar/data_batch_1.bin")
    spec = write(tmp_path, "c.yaml", DIGITS.format(task="{name: classification, data: cifar10, path: cifar}", more=""))
    assert checked(spec, tmp_path) == []
    with pytest.raises(UsageError, match=r"task\.path .*other does not exist"):
        checked(spec, tmp_path, "task.path=other")
    write(tmp_path, ".rayignore", "cifar\n")
    with pytest.raises(UsageError, match=r"task\.path .*cifar is not sent: ignored"):
        checked(spec, tmp_path)
    found = checked(spec, tmp_path, "task.path=/data/cifar")
    assert found == ["note: task.path /data/cifar is not sent; it must exist on the cluster"]


def test_whole_paths_mean_the_same_file_on_the_cluster(tmp_path: Path) -> None:
    text = write(tmp_path, "text/a.txt", "hello world, this is text. " * 500).parent
    task = "{name: language_model, data: {path: text}, model: {name: gpt, layers: 1, heads: 1, width: 16}}"
    spec = write(tmp_path, "l.yaml", DIGITS.format(task=task, more="batch_size: 4\n"))
    assert checked(spec, tmp_path) == []
    found = checked(spec, tmp_path, f"task.data.path={text}")
    assert found == [f"note: task.data.path {text} is not sent; it must exist on the cluster; it would be sent if it "
                     "were written relative to the spec"]  # fmt: skip
    inner = write(tmp_path, "jobs/l.yaml", spec.read_text().replace("text}", "../text}"))
    with pytest.raises(UsageError, match="lies outside the working directory"):
        checked(inner, inner.parent)


def test_paths_from_another_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "work/w.safetensors")
    spec = write(tmp_path, "work/x.yaml", DIGITS.format(task="classification", more="init: {from: w.safetensors}\n"))
    with pytest.raises(UsageError, match=r"init\.from work/w\.safetensors: the job begins in .*; write w\.safetens"):
        checked(spec, tmp_path / "work", "init.from=work/w.safetensors")
    with pytest.raises(UsageError, match=r"init\.from w\.safetensors"):  # is not there from here
        checked(spec, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    assert checked(spec, tmp_path / "work") == []


def test_recorded_episodes_of_rllib(tmp_path: Path) -> None:
    text = ("distml: v1\nkind: rllib\nname: p\nalgorithm: PPO\nenvironment: {id: CartPole-v1}\nstop: {steps: 2}\n"
            "config: {%s}\n")  # fmt: skip
    write(tmp_path, "episodes/one.json")
    spec = write(tmp_path, "r.yaml", text % "input_: episodes")
    assert checked(spec, tmp_path) == []
    write(tmp_path, ".rayignore", "episodes\n")
    with pytest.raises(UsageError, match=r"config\.input_ .*episodes is not sent: ignored"):
        checked(spec, tmp_path)
    spec.write_text(text % "output: recorded")
    with pytest.raises(UsageError, match=r"config\.output .*recorded is in a folder that Ray removes"):
        checked(spec, tmp_path)
    spec.write_text(text % "output: /shared/recorded")
    assert checked(spec, tmp_path) == []


def test_a_spec_outside_is_refused(tmp_path: Path) -> None:
    spec = write(tmp_path, "elsewhere/x.yaml")
    (tmp_path / "work").mkdir()
    root = (tmp_path / "work").resolve()
    with pytest.raises(UsageError, match=r"lies outside the working directory .*--working-dir .*elsewhere"):
        sent_as(spec, root, Selection(root))


def test_a_tree_of_ten_thousand_files_is_listed(tmp_path: Path) -> None:
    for folder in range(100):
        (tmp_path / f"{folder}").mkdir()
        for number in range(100):
            (tmp_path / f"{folder}" / f"{number}").touch()
    assert len(select(tmp_path).files) == 10_000
    shutil.rmtree(tmp_path / "0")
    assert len(select(tmp_path).files) == 9_900
