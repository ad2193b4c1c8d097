"""Addresses, tokens and versions, before ray is imported: against servers that answer as a dashboard does, or not."""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distml.cli import main
from distml.errors import UsageError
from distml.launch.submit import contact as module
from distml.launch.submit.contact import (
    NotReached,
    Token,
    ask_for_token,
    contact,
    dashboard_url,
    find_token,
    is_in_clear,
    within,
)  # fmt: skip

OURS = importlib.metadata.version("ray")


class Dashboard(http.server.BaseHTTPRequestHandler):
    """Answers as Ray's head does; keeps the headers it was sent."""

    mode, token, version = "token", "good-token", OURS
    seen: list[str] = []

    def do_GET(self) -> None:
        type(self).seen.append(self.headers.get("Authorization", ""))
        if self.path == "/api/authentication_mode":
            return self.answer(200, {"authentication_mode": self.mode})
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.mode == "token" and given != self.token:
            return self.answer(403 if given else 401, {})
        return self.answer(200, {"ray_version": self.version}) if self.path == "/api/version" else self.answer(404, {})

    def answer(self, status: int, body: dict) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(**values: object) -> Iterator[tuple[str, type[Dashboard]]]:
    handler = type("Handler", (Dashboard,), {**values, "seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
        server.shutdown()


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


# ------------------------------------------------------------------------------------------------------------ addresses
@pytest.mark.parametrize(
    ("given", "url"),
    [("http://h:1/", "http://h:1"), ("h:8265", "http://h:8265"), ("auto", "http://127.0.0.1:8265"),
     ("https://proxy/ray/", "https://proxy/ray"), (" http://[::1]:1 ", "http://[::1]:1")],
)  # fmt: skip
def test_addresses_as_urls(given: str, url: str) -> None:
    assert dashboard_url(given, {}) == url


@pytest.mark.parametrize(
    ("given", "what"),
    [("ray://h:10001", "Ray Client's"), ("http://me:pw@h:1", "leave the name and password out"), ("http://", "no dash"),
     ("ftp://h", "no dashboard"), ("http://h:1?x=y", "no dashboard"), ("http://h:port", "give http"),
     ("http://h /x", "no dashboard"), ("", "no dashboard")],
)  # fmt: skip
def test_what_is_no_address(given: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as found:
        dashboard_url(given, {})
    assert "pw" not in str(found.value)


def test_the_argument_goes_before_the_environment_and_says_so() -> None:
    environment = {"RAY_API_SERVER_ADDRESS": "http://other:1", "RAY_ADDRESS": "http://me:pw@third:2"}
    said: list[str] = []
    assert dashboard_url("http://mine:3", environment, said.append) == "http://mine:3"
    assert said == ["note: --address http://mine:3 goes before RAY_API_SERVER_ADDRESS=http://other:1",
                    "note: --address http://mine:3 goes before RAY_ADDRESS=third:2"]  # fmt: skip
    assert dashboard_url("http://other:1", {"RAY_ADDRESS": "http://other:1/"}, pytest.fail) == "http://other:1"


def test_the_environment_in_rays_order() -> None:
    assert dashboard_url(None, {"RAY_API_SERVER_ADDRESS": "a:1", "RAY_ADDRESS": "http://b:2"}) == "http://a:1"
    assert dashboard_url(None, {"RAY_ADDRESS": "http://b:2"}) == "http://b:2"
    for environment in ({}, {"RAY_ADDRESS": "10.0.0.1:6379"}):  # that is not the dashboard's
        with pytest.raises(UsageError, match="which cluster"):
            dashboard_url(None, environment)


def test_nobody_there_is_one_line_with_what_to_do() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"nobody answers at {url} .*refused.*ssh -L"):
            contact(url)
    with pytest.raises(UsageError, match=r"nobody answers at http://no-such-host\.invalid:1"):
        contact("http://no-such-host.invalid:1")


def test_one_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.3)
    awaited = pytest.raises(NotReached, match=r"waited 0\.3 s for an answer of|timed out")
    with socket.create_server(("127.0.0.1", 0)) as silent, awaited:
        contact(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_another_server_is_not_a_dashboard() -> None:
    class Other(Dashboard):
        def do_GET(self) -> None:
            self.answer(404, {})

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UsageError, match=r"is no Ray dashboard \(404"):
            contact(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


def test_another_version_of_ray_is_refused() -> None:
    refused = pytest.raises(UsageError, match=rf"runs Ray 2\.9\.0, this distml works with Ray {OURS}")
    with serving(mode="disabled", version="2.9.0") as (url, _), refused:
        contact(url)
    patch = ".".join([*OURS.split(".")[:2], "99"])
    with serving(mode="disabled", version=patch) as (url, _):
        assert contact(url).ray_version == patch


# --------------------------------------------------------------------------------------------------------------- tokens
def test_the_token_is_found_in_rays_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_token({}, tmp_path) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-home\n")
    (tmp_path / "file").write_text("of-file")
    assert find_token({}, tmp_path) == Token("of-home", str(tmp_path / ".ray" / "auth_token"))
    environment = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "file")}
    assert find_token(environment, tmp_path).text == "of-file"
    assert find_token({**environment, "RAY_AUTH_TOKEN": "of-variable"}, tmp_path).text == "of-variable"


@pytest.mark.parametrize("text", ["", " \n", "two words", "a\nb", "\x00", "ü"])
def test_what_is_no_token_is_refused_unseen(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(UsageError, match="holds no token"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "file")}, tmp_path)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "missing")}, tmp_path)


def test_a_missing_and_a_wrong_token_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (url, handler):
        with pytest.raises(UsageError, match=r"wants a token, and none was found .*ray get-auth-token"):
            contact(url)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-token")
        with pytest.raises(UsageError, match="refuses the token of RAY_AUTH_TOKEN") as found:
            contact(url)
        assert "wrong-token" not in str(found.value)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "good-token")
        there = contact(url)
        assert there.headers == {"Authorization": "Bearer good-token"}
        assert "good-token" not in repr(there)
        assert "Bearer good-token" in handler.seen


def test_a_cluster_that_wants_no_token_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "good-token")
    with serving(mode="disabled") as (url, handler):
        assert contact(url).headers == {}
        assert set(handler.seen) == {""}


def test_asking_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(module.getpass, "getpass", lambda prompt: " typed \n" if "http://h:1" in prompt else "")
    assert ask_for_token("http://h:1").text == "typed"
    with pytest.raises(UsageError, match="what was typed holds no token"):
        ask_for_token("http://h:2")


@pytest.mark.parametrize(
    ("url", "clear"),
    [("http://127.0.0.1:1", False), ("http://localhost", False), ("https://h", False), ("http://10.0.0.1:1", True),
     ("http://head:8265", True), ("http://[::1]:1", False)],
)  # fmt: skip
def test_where_a_token_could_be_read(url: str, clear: bool) -> None:
    assert is_in_clear(url) is clear


@pytest.mark.parametrize("path", ["/api/version", "/api/authentication_mode"])
def test_a_token_goes_where_it_was_sent_to_and_nowhere_else(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    class Elsewhere(Dashboard):
        place = ""

        def do_GET(self) -> None:
            if self.path != path:
                return super().do_GET()
            self.send_response(302)
            self.send_header("Location", f"{self.place.replace('127.0.0.1', 'localhost')}{self.path}")
            self.end_headers()

    monkeypatch.setenv("RAY_AUTH_TOKEN", "good-token")
    with serving() as (place, other), http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        Elsewhere.place = place
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UsageError, match=r"is no Ray dashboard \(302|wants a token \(401\)"):
            contact(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
        assert other.seen == []
        contact(place)  # and this one would have taken it
        assert other.seen == ["", "Bearer good-token"]


# ------------------------------------------------------------------------------------------------------------ the verbs
def test_verbs_without_a_cluster_are_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "local").mkdir(parents=True)
    for arguments, what in (
        (["status", "nothing"], "no such run directory"), (["logs", "runs/local"], "has no job.json"),
        (["stop", "nothing"], "no such run directory"), (["jobs"], "which cluster?"),
        (["submit", "digits-single"], "which cluster?"), (["submit", "missing.yaml"], "no such file"),
        (["submit", "digits-single", "--env", "X Y=1"], "not a variable's name"),
        (["submit", "digits-single", "--working-dir", "nowhere"], "there is no such directory"),
    ):  # fmt: skip
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert what in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs" / "digits-single").exists()


@pytest.mark.parametrize("name", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_a_cluster_of_the_environment_is_asked_for_an_id(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with serving(mode="disabled", version="2.9.0") as (url, _):
        monkeypatch.setenv(name, url)
        assert main(["status", "a-1"]) == 2
    assert f"the cluster at {url} runs Ray 2.9.0" in capsys.readouterr().err  # so far, and not "no such directory"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # no dashboard's
    assert main(["status", "a-1"]) == 2
    assert "no such run directory" in capsys.readouterr().err


def test_a_wrong_address_is_said_before_ray_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from distml.cli import main; code = main(['jobs', '--address', 'http://127.0.0.1:1']); "
        "assert not {'ray', 'torch'} & set(sys.modules); raise SystemExit(code)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (found.returncode, "nobody answers" in found.stderr) == (2, True), found.stderr


def test_within_gives_what_the_call_gives() -> None:
    assert within(5.0, "x", lambda: None) is None
    with pytest.raises(KeyError):
        within(5.0, "x", lambda: {}["missing"])
    with pytest.raises(NotReached, match=r"waited 0\.05 s for the moon"):
        within(0.05, "the moon", threading.Event().wait)
