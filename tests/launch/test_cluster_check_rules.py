"""What cluster files are checked against: Ray's and KubeRay's own sources, the versions tested, the shell."""

from __future__ import annotations

import contextlib
import json
import random
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from distml.errors import UsageError
from distml.launch.check import providers, versions
from distml.launch.check.command import check_file
from distml.launch.check.documents import read_documents
from distml.launch.check.kuberay_table import FILE, source
from distml.launch.check.secret_values import secrets_in
from distml.launch.check.shell import environment_of, listens_everywhere, ray_starts
from distml.launch.plan.cluster import read_cluster

ROOT = Path(__file__).parents[2]
FOR_RAY_UP = [ROOT / "clusters" / name for name in ("local.yaml", "aws-gpu.yaml", "gcp-gpu.yaml")]
FOR_KUBERAY = sorted((ROOT / "clusters" / "kuberay").glob("*.yaml"))
STARTED = [*FOR_RAY_UP, *FOR_KUBERAY]


# -------------------------------------------------------------------------------------------------------- their sources
@pytest.mark.parametrize("file", FOR_RAY_UP, ids=lambda file: file.stem)
def test_ray_itself_accepts_each_file_and_fills_in_no_command(file):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load(file.read_text()))
    validate_config(prepared)
    commands = " ".join(prepared["head_start_ray_commands"] + prepared["worker_start_ray_commands"])
    assert "0.0.0.0" not in commands
    assert commands.count("RAY_AUTH_MODE=token") == 2


def test_the_providers_keys_are_those_that_rays_sources_look_for():
    folder = Path(find_spec("ray").submodule_search_locations[0]) / "autoscaler" / "_private"
    looked_for = r"""(?:provider_config|config\["provider"\]|provider)(?:\.get\(|\[)"([a-z]\w*)\""""
    constants = set(re.findall(r'_KEY = "([a-z]\w*)"', (folder / "constants.py").read_text()))
    shared = {key for file in folder.glob("*.py") for key in re.findall(looked_for, file.read_text())} - {"module"}
    assert shared | constants <= providers.EVERY | {"_config_cache_path"}
    internal = {"list_of_node_ips"}  # what Ray's coordinator server sets
    for kind, keys in providers.KEYS.items():
        found = {key for file in (folder / kind).rglob("*.py") for key in re.findall(looked_for, file.read_text())}
        assert found - providers.EVERY - internal <= keys
        assert keys <= found, f"no source of Ray reads {keys - found}"


def test_kuberays_schema_is_what_its_definitions_say():
    crds = [Path(__file__).parent / "kuberay" / f"ray.io_ray{kind}.yaml.gz" for kind in ("clusters", "jobs")]
    assert FILE.read_text() == source(crds)
    assert len(FILE.read_bytes()) < 50_000


# ------------------------------------------------------------------------------------------------------------- versions
def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {name.lower(): version for name, version in (line.split("==") for line in lines if "==" in line)}


def test_files_ask_for_the_versions_of_the_constraints():
    pins = _pins()
    assert f"Python {versions.TESTED_PYTHON}:" in (ROOT / "constraints.txt").read_text()
    tags = {tag for file in [*STARTED, ROOT / "clusters" / "kuberay" / "Dockerfile"]
            for tag in re.findall(r"(?:rayproject/ray|distml):([\w.-]+)", file.read_text())}  # fmt: skip
    assert tags == {f"{pins['ray']}-py{versions.TESTED_PYTHON.replace('.', '')}-gpu"}
    assert set(re.findall(r"rayVersion: (\S+)", "".join(file.read_text() for file in FOR_KUBERAY))) == {pins["ray"]}
    assert set(re.findall(r"python(3\.\d+)", FOR_RAY_UP[0].read_text())) == {versions.TESTED_PYTHON}
    for file in FOR_RAY_UP:
        data = yaml.safe_load(file.read_text())
        assert data["file_mounts"]["~/distml-constraints.txt"] == "constraints.txt"
        assert any("-r ~/distml-requirements.txt -c ~/distml-constraints.txt" in one for one in data["setup_commands"])
    for name, pin in pins.items():
        if name in versions.PINNED:
            assert versions.allowed()[name].contains(pin)


def test_nodes_install_what_distml_depends_on():
    project = (ROOT / "pyproject.toml").read_text()
    listed = (ROOT / "clusters" / "requirements.txt").read_text().splitlines()
    installed = {str(Requirement(line)) for line in listed if not line.startswith("#")}
    block = project[project.index("\ndependencies = [") : project.index("\n]\n")]
    wanted = [Requirement(line) for line in re.findall(r'^  "(.+)",', block, re.MULTILINE)]
    assert installed == {one.name + (f"[{','.join(sorted(one.extras))}]" if one.extras else "") for one in wanted}


@pytest.mark.parametrize("file", STARTED, ids=lambda file: file.stem)
def test_the_first_lines_say_what_it_starts_and_how_it_is_used(file):
    header = file.read_text().split("\n\n" if file in FOR_RAY_UP else "\napiVersion")[0]
    commands = ("distml cluster check", "ray get-auth-token --generate", "tunnel", "8265:", " up\n", "submit", "down")
    for said in ("Checked offline with `distml cluster check`, never launched", *commands):
        assert said in header + "\n" or said == " up\n", said
    assert str(file.relative_to(ROOT)) in header
    assert ("ssh -N -L 8265:127.0.0.1:8265" in header) == (file in FOR_RAY_UP)


# -------------------------------------------------------------------------------------------- what is right is accepted
def _checked(tmp_path, monkeypatch, name, *changes):
    home = tmp_path / "home" / ".ray"
    home.mkdir(parents=True)
    (home / "auth_token").write_text("0" * 64)
    (home / "auth_token").chmod(0o600)
    monkeypatch.setenv("HOME", str(home.parent))
    monkeypatch.chdir(ROOT)
    text = (ROOT / "clusters" / name).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "file.yaml").write_text(text)
    return check_file(tmp_path / "file.yaml")[1]


def test_the_token_may_come_in_other_ways(tmp_path, monkeypatch):
    options = '["-e RAY_AUTH_MODE=token", "-e RAY_AUTH_TOKEN_PATH=/etc/ray-token"]'
    mode = ('["--ulimit nofile=65536:65536"]', options)
    mount = ("  ~/.ray/auth_token: ~/.ray/auth_token", "  /etc/ray-token: ~/.ray/auth_token")
    export = ("export RAY_AUTH_MODE=token ", "export ")
    assert _checked(tmp_path, monkeypatch, "aws-gpu.yaml", export, mode, mount) == []


def test_a_token_that_others_can_read_is_told(tmp_path, monkeypatch):
    assert _checked(tmp_path, monkeypatch, "local.yaml") == []
    (tmp_path / "home" / ".ray" / "auth_token").chmod(0o644)
    lines = check_file(tmp_path / "file.yaml")[1]
    assert [line.partition(": ")[2] for line in lines] == [
        "the token in ~/.ray/auth_token can be read by other users; chmod 600 ~/.ray/auth_token"
    ]


def test_without_start_commands_rays_own_would_be_open(tmp_path, monkeypatch):
    text = (ROOT / "clusters" / "aws-gpu.yaml").read_text()
    commands = text[text.index("head_start_ray_commands:") :]
    lines = _checked(tmp_path, monkeypatch, "aws-gpu.yaml", (commands, ""))
    assert (
        "head_start_ray_commands is missing, and Ray's own open the dashboard on 0.0.0.0 and start without" in lines[0]
    )
    assert "worker_start_ray_commands is missing, and Ray's own start without a token" in lines[1]


def test_a_job_on_a_policy_that_lets_everyone_in_is_told(tmp_path, monkeypatch):
    old = "    - from: [{podSelector: {matchLabels: {app: distml-gpt2}}}]\n"
    lines = _checked(tmp_path, monkeypatch, "kuberay/rayjob-gpu.yaml", (old, "    - {}\n"))
    assert len(lines) == 1
    assert "no NetworkPolicy in this file selects the head's pod" in lines[0]


# ----------------------------------------------------------------------------------------------------------- the pieces
@pytest.mark.parametrize(
    ("command", "options", "environment"),
    [
        ("ray start --head --port=1 --block", {"head": "", "port": "1", "block": ""}, {}),
        ("export A=1 B=2; ulimit -n 5; ~/env/bin/ray start --port 1", {"port": "1"}, {"A": "1", "B": "2"}),
        ("A=1 ray start --head", {"head": ""}, {"A": "1"}),
        ("A=1; ray start --head", {"head": ""}, {}),  # not exported
        ("env A=1 nohup ray start --head && true", {"head": ""}, {"A": "1"}),
    ],
)
def test_ray_start_is_found_with_what_it_is_started_in(command, options, environment):
    (start,) = ray_starts(command)
    assert (dict(start.options), dict(start.environment)) == (options, environment)


def test_other_commands_are_not_ray_start():
    assert not list(ray_starts("ray stop; echo ray start --head"))
    assert environment_of(["-e A=1", "--env=B=2", "--shm-size=8g"]) == {"A": "1", "B": "2"}


@pytest.mark.parametrize(("command", "part"), [
    ("tensorboard --bind_all", "--bind_all"), ("jupyter lab --ip=*", "--ip=*"), ("serve --host 0.0.0.0", "0.0.0.0"),
    ("pip install x==10.0.0.0", None), ("ping 10.0.0.0.1", None), ("serve --host 127.0.0.1", None),
])  # fmt: skip
def test_what_listens_everywhere(command, part):
    assert listens_everywhere(command) == part


@pytest.mark.parametrize("text", ["RAY_AUTH_TOKEN_PATH=/etc/token", "HF_TOKEN=$HF_TOKEN", 'X_API_KEY="$(cat key)"'])
def test_what_only_names_a_secret_is_none(text):
    assert list(secrets_in([f"export {text}"])) == []
    assert list(secrets_in([f"export {text.split('=')[0].removesuffix('_PATH')}=abc"]))


def test_a_secret_is_never_repeated():
    secret = "AKIAIOSFODNN7EXAMPLE"
    (problem,) = secrets_in({"env": [{"name": "A", "value": secret}]})
    assert secret not in problem.text


def test_positions_of_merged_repeated_and_several_documents(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("a: &a {x: 1, y: yes}\nb:\n  <<: *a\n  x: 2\n  3: three\n---\n# nothing\n---\nc: 0o7\nc: 8\n")
    (first, second), doubled = read_documents(file)
    assert first.data == {"a": {"x": 1, "y": True}, "b": {"x": 2, "y": True, "3": "three"}}
    assert str(first.values[("b", "x")]) == f"{file}:4:6"
    assert (second.data, str(second.keys[("c",)])) == ({"c": 8}, f"{file}:10:1")
    assert [(str(place), problem.text) for place, problem in doubled] == [
        (f"{file}:10:1", "duplicate key 'c', first on line 9; keep one of them")
    ]


@pytest.mark.parametrize(("text", "said"), [
    ("a: &a [*a]\n", "the anchor contains itself"), ("a: !!python/object:os.x {}\n", "the tag .* is not allowed"),
    ("- a\n", "a cluster file is a mapping of keys, got a list"), ("a: [\n", "not YAML"), ("", "must be a mapping"),
    ("\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]), "write a smaller file"),
])  # fmt: skip
def test_what_is_no_cluster_file_is_one_line(tmp_path, text, said):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    (line,) = check_file(file)[1]
    assert re.match(rf"{re.escape(str(file))}:\d+:\d+: ", line)
    assert re.search(said, line)


ODD = (None, [], {}, "", "x", 3, -1, 2.5, True, [1], {"a": 1}, [None], [{"a": None}], "a b'c", {"1": [None]})


def _places(value, path=()):
    """Where something stands in it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from _places(one, (*path, key))


@pytest.mark.parametrize("file", STARTED, ids=lambda file: file.stem)
def test_whatever_stands_anywhere_is_told_in_lines(tmp_path, file):
    draw, odd = random.Random(file.stem), tmp_path / "odd.yaml"
    for _ in range(40):
        documents = list(yaml.safe_load_all(file.read_text()))
        document = draw.choice(documents)
        *around, last = draw.choice(list(_places(document)))
        for key in around:
            document = document[key]
        document[last] = draw.choice(ODD)
        odd.write_text(yaml.safe_dump_all(documents))
        assert all(line.startswith(f"{odd}:") and "\n" not in line for line in check_file(odd)[1])
        if file in FOR_RAY_UP:
            with contextlib.suppress(UsageError):
                read_cluster(odd)


# ----------------------------------------------------------------------------------------------------------------- plan
def test_plan_knows_the_machines_of_a_file_for_ray_up(tmp_path):
    cluster = read_cluster(ROOT / "clusters" / "aws-gpu.yaml")
    assert (cluster.nodes, cluster.gpus_per_node, cluster.card_name) == (6, 4, "l4")
    assert (cluster.host_memory_gib, cluster.links.inter.gb_per_s) == (192, 40 / 8 / 4)
    other = (ROOT / "clusters" / "aws-gpu.yaml").read_text().replace("g6.12xlarge", "x9.large")
    (tmp_path / "c.yaml").write_text(other)
    with pytest.raises(UsageError, match=r":48:5: 'x9.large' is not among the machines known here; write nodes"):
        read_cluster(tmp_path / "c.yaml")


def test_the_schema_is_json_that_names_its_origin():
    assert "Apache" in json.loads(FILE.read_text())["$comment"]
