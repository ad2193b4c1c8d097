"""Doctor on one machine: what is all right is said so, and what is not with what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from distml.cli import main
from distml.launch import doctor
from distml.launch.doctor import Finding


def test_a_line_says_ok_or_what_to_do():
    assert str(Finding("disk", "7 GiB free")) == "ok  disk            7 GiB free"
    assert str(Finding("disk", "full\nhere", "make room")) == "!!  disk            full\\nhere; make room"
    assert (Finding("a", "b").ok, Finding("a", "b", "c").ok) == (True, False)


def test_the_verb_ends_with_2_if_anything_is_not_right_and_json_has_the_same(monkeypatch, capsys):
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    found = [Finding("disk", "7 GiB free")]
    monkeypatch.setattr(doctor, "local_findings", lambda address: iter(found))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ok  cluster         none asked for (--address, RAY_ADDRESS)"
    found.append(Finding("token", "readable", "chmod 600"))
    assert main(["doctor", "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert not said["ok"]
    assert said["findings"][1] == {"ok": False, "name": "token", "said": "readable", "do": "chmod 600"}
    assert main(["doctor", "--out", "x.yaml"]) == 2
    assert "add --address" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ libraries
def test_a_script_that_hangs_or_dies_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORT_S", 0.5)
    assert doctor.asked("import time; time.sleep(60)") == "no answer in 0.5 s"
    monkeypatch.setattr(doctor, "IMPORT_S", 60)
    assert doctor.asked("import no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"
    assert doctor.asked("import os; os._exit(3)") == "exit code 3"
    assert doctor.asked("print('noise'); print('{\"a\": 1}')") == {"a": 1}


GPU = {"version": "2.13.0+cu130", "built": "13.0", "cards": [["NVIDIA H100", 80 * 2**30]] * 2, "nccl": "2.28.3"}


@pytest.mark.parametrize(
    ("found", "devices", "lines"),
    [
        (GPU, 2, ["ok torch", "ok cuda 2 x NVIDIA H100, 80.0 GiB, CUDA 13.0", "ok nccl 2.28.3"]),
        ({**GPU, "nccl": None}, 2, ["ok torch", "ok cuda", "!! nccl torch was built without it; install the torch"]),
        ({**GPU, "cards": []}, 2, ["ok torch", "!! cuda 2 GPUs are here and torch sees none: torch is built for CUDA"]),
        ({**GPU, "cards": [], "built": None}, 1, ["ok torch", "!! cuda 1 GPUs are here and torch sees none: torch is "
                                                  "built for CPUs; install torch from PyPI"]),
        ({**GPU, "cards": []}, 0, ["ok torch", "ok cuda no GPU here", "ok nccl not needed"]),
        ({**GPU, "version": "2.1.0"}, 2, ["!! torch 2.1.0; distml is tested with <2.14,>=2.13", "ok cuda", "ok nccl"]),
        ("No module named 'torch'", 0, ["!! torch No module named 'torch'; reinstall it"]),
    ],
)  # fmt: skip
def test_torch_and_its_gpus(monkeypatch, found, devices, lines):
    monkeypatch.setattr(doctor, "asked", lambda script: found)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(["x"] * devices))
    said = [" ".join(str(one).split()) for one in doctor.torch()]
    assert len(said) == len(lines)
    assert all(one.startswith(line) for one, line in zip(said, lines, strict=True)), said


def test_deepspeeds_ops_need_a_compiler(monkeypatch):
    monkeypatch.setattr(doctor, "asked", lambda script: {"version": "0.19.8", "ops": {"cpu_adam": True}})
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
    assert [one.ok for one in doctor.deepspeed()] == [True, True]
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert "no g++ and no ninja; strategy zero compiles at first use" in str(list(doctor.deepspeed())[1])


@pytest.mark.slow
def test_the_scripts_say_what_they_are_asked_here():
    assert doctor.asked(doctor.TORCH)["version"].startswith("2.")
    assert set(doctor.asked(doctor.DEEPSPEED)["ops"]) == {"cpu_adam", "fused_adam"}


# --------------------------------------------------------------------------------------------------------- the machine
def test_little_shared_memory_and_a_full_disk_are_told(monkeypatch):
    usage = SimpleNamespace(total=2**40, used=0, free=2**39)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert all(one.ok for one in [*doctor.shared_memory(), *doctor.disk()])
    usage.total, usage.free, usage.used = 64 * 2**20, 60 * 2**20, 4 * 2**20
    [shared] = doctor.shared_memory()
    assert shared.do == "give the container more: docker run --shm-size=8g"
    assert not any(one.ok for one in doctor.disk())
    usage.total, usage.free, usage.used = 2**40, 2**36, 2**40 - 2**36  # 64 GiB free, and 94 % used
    assert all(one.ok for one in doctor.disk())


def test_a_token_is_for_its_owner_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    [none] = doctor.token(None, {})
    assert none.ok
    [lacking] = doctor.token(None, {"RAY_AUTH_MODE": "token"})
    assert lacking.do.startswith("ray get-auth-token --generate")
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("0" * 64)
    path.chmod(0o644)
    [wide] = doctor.token(None, {})
    assert (wide.said, wide.do) == (f"{path} can be read by other users (mode 644)", f"chmod 600 {path}")
    path.chmod(0o600)
    [narrow] = doctor.token(None, {})
    assert (narrow.ok, narrow.said) == (True, f"found: {path}")
    [off] = doctor.token(None, {"RAY_AUTH_MODE": "disabled"})
    assert not off.ok
    [unreadable] = doctor.token(None, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})
    assert not unreadable.ok
    assert "0000" not in "".join(map(str, (wide, narrow, off, unreadable)))


@pytest.mark.parametrize(("address", "local"), [
    ("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True),
    ("0.0.0.0", False), ("::", False), ("10.0.0.1", False),
])  # fmt: skip
def test_what_only_this_machine_reaches(address, local):
    assert doctor.is_loopback(address) == local


def test_rays_processes_are_told_by_name_and_command():
    assert doctor.ray_process("raylet", []) == "raylet"
    assert (
        doctor.ray_process("python", ["python", "-u", "/x/ray/dashboard/dashboard.py", "--host=0.0.0.0"]) == "dashboard"
    )
    assert doctor.ray_process("python", ["python", "-m", "distml", "run", "x"]) is None


@pytest.fixture
def raylet(tmp_path, request):
    """A process by that name that listens on the loopback interface, with the given token mode."""
    binary = tmp_path / "raylet"
    binary.symlink_to(os.path.realpath(sys.executable))
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"} | request.param
    process = subprocess.Popen([str(binary), "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=environment)  # fmt: skip
    yield process.stdout.readline().strip()
    process.communicate("\n")


@pytest.mark.parametrize("raylet", [{}], indirect=True)
def test_a_ray_without_a_token_that_others_reach_is_told(raylet, monkeypatch):
    said = lambda: str(next(iter(doctor.listening())))  # noqa: E731
    assert f":{raylet}" not in said()
    monkeypatch.setattr(doctor, "is_loopback", lambda address: not address.startswith("127."))
    monkeypatch.setattr(doctor, "ray_process", lambda name, command: name if name == "raylet" else None)
    monkeypatch.setattr(doctor, "NUM_SHOWN", 10_000)
    assert said().startswith("!!")
    assert f"raylet 127.0.0.1:{raylet}" in said()


@pytest.mark.parametrize("raylet", [{"RAY_AUTH_MODE": "token"}], indirect=True)
def test_a_ray_with_a_token_may_be_reached(raylet, monkeypatch):
    monkeypatch.setattr(doctor, "is_loopback", lambda address: not address.startswith("127."))
    monkeypatch.setattr(doctor, "NUM_SHOWN", 10_000)
    assert f":{raylet}" not in str(next(iter(doctor.listening())))


def test_an_agents_environment_is_its_raylets():
    environment = {"PATH": "/bin", "RAY_AUTH_MODE": "token"}
    raylet = SimpleNamespace(environ=lambda: environment, parent=lambda: None)
    assert doctor.token_mode(SimpleNamespace(environ=lambda: {}, parent=lambda: raylet)) == "token"
    assert doctor.token_mode(SimpleNamespace(environ=lambda: {"PATH": "/bin"}, parent=lambda: raylet)) is None


def test_a_probe_that_fails_is_a_finding(monkeypatch):
    def fails():
        raise ZeroDivisionError("x")
        yield

    [finding] = doctor._within("disk", fails)
    assert not finding.ok
    assert finding.said == "ZeroDivisionError: x"
