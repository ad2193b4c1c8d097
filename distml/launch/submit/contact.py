"""Whether a Ray dashboard answers at an address, with which token, and of which version. Without ray: it takes long to
import, and what is wrong is better said before.

The token is Ray's: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token; a cluster that wants one tells so
without it. It is sent in a header, to clusters that want it and to no other, and written nowhere.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import ipaddress
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from distml.errors import UsageError
from distml.limited import within as within_limit
from distml.spec.yaml import one_line

T = TypeVar("T")
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # as Ray orders them
DASHBOARD_PORT = 8265
ANSWER_S = 10.0
MODE, VERSION = "/api/authentication_mode", "/api/version"
FIND_IT = (
    f"a cluster's dashboard is by default http://HEAD:{DASHBOARD_PORT} ('ray start --head' prints it) and listens on "
    f"the head alone: ssh -L {DASHBOARD_PORT}:127.0.0.1:{DASHBOARD_PORT} HEAD, then --address "
    f"http://127.0.0.1:{DASHBOARD_PORT}"
)
FIND_TOKEN = "'ray get-auth-token' on the head node prints it; put it into ~/.ray/auth_token (chmod 600)"


@dataclass(frozen=True)
class Token:
    """A cluster's token and where it was found; its text is never shown."""

    text: str = field(repr=False)
    source: str


@dataclass(frozen=True)
class Contact:
    """A cluster's dashboard that has answered.

    Attributes:
        url: without a slash at its end.
        token: None: it wants none.
        ray_version: the cluster's.
    """

    url: str
    token: Token | None
    ray_version: str

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token.text}"}


class NotReached(UsageError):
    """Nobody answers there; a later attempt may be answered."""


# -------------------------------------------------------------------------------------------------------------- contact
def contact(address: str | None, say: Callable[[str], object] = print) -> Contact:
    """Reach a cluster's dashboard.

    Args:
        address: `http://HOST:PORT`; None: of the environment.
        say: notes for people.

    Raises:
        UsageError: no address, nobody there, no token or a wrong one, or another version of Ray: what to do.
    """
    url = dashboard_url(address, os.environ, say)
    mode = _authentication_mode(url)
    token = None
    if mode != "disabled":
        token = find_token() or ask_for_token(url)
        if is_in_clear(url):
            say(f"note: the token travels to {url} unencrypted; an ssh tunnel or https keeps it from the network")
    one = Contact(url, token, _ray_version(url, token))
    check_version(one.ray_version, importlib.metadata.version("ray"), url)
    return one


def dashboard_url(address: str | None, environment: Mapping[str, str], say: Callable[[str], object] = print) -> str:
    """The address to use: the argument, else RAY_API_SERVER_ADDRESS, else a RAY_ADDRESS that is a URL.

    Ray itself lets the variables win over an argument; here the argument does, and it is said where they differ.

    Raises:
        UsageError: there is none, or it is not a dashboard's.
    """
    if address is not None:
        url = normalised(address, "--address")
        for name in ADDRESS_VARIABLES:
            value = environment.get(name)
            if value and value.rstrip("/") != url:
                say(f"note: --address {url} goes before {name}={shown(value)}")
        return url
    named = dashboard_variable(environment)
    if named is not None:
        return normalised(environment[named], named)
    raise UsageError(
        f"which cluster? give --address http://HOST:{DASHBOARD_PORT}, or set RAY_API_SERVER_ADDRESS; {FIND_IT}"
    )


def dashboard_variable(environment: Mapping[str, str]) -> str | None:
    """The variable that names a dashboard; a RAY_ADDRESS without `://` is of Ray's own protocol."""
    first, second = ADDRESS_VARIABLES
    if environment.get(first):
        return first
    return second if "://" in environment.get(second, "") else None


def normalised(address: str, source: str) -> str:
    """`auto`, `HOST:PORT` and URLs as a URL.

    Raises:
        UsageError: it is none, or holds a name and password, which would be written into job.json.
    """
    text = address.strip()
    if text == "auto":
        return f"http://127.0.0.1:{DASHBOARD_PORT}"
    if text.startswith("ray://"):
        raise UsageError(f"{source} {one_line(text)} is Ray Client's, jobs go to the dashboard; {FIND_IT}")
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{source} {one_line(text)!r}: {error}; give http://HOST:{DASHBOARD_PORT}") from None
    if parts.username or parts.password:
        raise UsageError(f"{source}: leave the name and password out of the address; the token is found by itself")
    plain = parts.scheme in ("http", "https") and host and not parts.query and not parts.fragment
    if not plain or not url.isprintable() or any(char.isspace() for char in url):
        raise UsageError(f"{source} {one_line(text)!r} is no dashboard's address; give http://HOST:{DASHBOARD_PORT}")
    return url.rstrip("/")


def shown(address: str) -> str:
    """An address without what stands before an @."""
    return one_line(address.rpartition("@")[2])


def is_in_clear(url: str) -> bool:
    """Whether what is sent there can be read on a network."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https" or parts.hostname in ("localhost", None):
        return False
    try:
        return not ipaddress.ip_address(str(parts.hostname)).is_loopback
    except ValueError:
        return True


# ---------------------------------------------------------------------------------------------------------------- token
def find_token(environment: Mapping[str, str] = os.environ, home: Path | None = None) -> Token | None:
    """The token that Ray's own clients would use, in Ray's order.

    Raises:
        UsageError: RAY_AUTH_TOKEN_PATH names no readable token, or a token holds what cannot be sent.
    """
    if environment.get("RAY_AUTH_TOKEN"):
        return checked_token(environment["RAY_AUTH_TOKEN"], "RAY_AUTH_TOKEN")
    if environment.get("RAY_AUTH_TOKEN_PATH"):
        path = Path(environment["RAY_AUTH_TOKEN_PATH"]).expanduser()
        return checked_token(_read_token(path), f"RAY_AUTH_TOKEN_PATH ({path})")
    path = (home or Path.home()) / ".ray" / "auth_token"
    return checked_token(_read_token(path), str(path)) if path.exists() else None


def _read_token(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError as error:
        raise UsageError(f"the token's file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the token's file {path} holds no token; {FIND_TOKEN}") from None


def checked_token(text: str, source: str) -> Token:
    """Without space around it.

    Raises:
        UsageError: it is empty, or cannot stand in a header.
    """
    text = text.strip()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise UsageError(f"{source} holds no token; {FIND_TOKEN}")
    return Token(text, source)


def ask_for_token(url: str) -> Token:
    """From the terminal, unseen.

    Raises:
        UsageError: there is no terminal, or nothing was typed.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(
            f"{url} wants a token, and none was found (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token); "
            f"{FIND_TOKEN}"
        )
    return checked_token(getpass.getpass(f"token of the cluster at {url}: "), "what was typed")


# --------------------------------------------------------------------------------------------------------------- asking
def _authentication_mode(url: str) -> str:
    """`disabled` also for a Ray that is too old to have any."""
    status, body = get(url + MODE, {})
    mode = body.get("authentication_mode") if status == 200 and isinstance(body, dict) else None
    return str(mode or "disabled")


def _ray_version(url: str, token: Token | None) -> str:
    headers = {} if token is None else {"Authorization": f"Bearer {token.text}"}
    status, body = get(url + VERSION, headers)
    if status == 401:
        raise UsageError(f"{url} wants a token (401), though it did not say so; set RAY_AUTH_TOKEN; {FIND_TOKEN}")
    if status == 403 and token is not None:
        raise UsageError(f"{url} refuses the token of {token.source}: it is another cluster's; {FIND_TOKEN}")
    version = body.get("ray_version") if status == 200 and isinstance(body, dict) else None
    if version is None:
        raise UsageError(f"what answers at {url} is no Ray dashboard ({status} for {VERSION}); {FIND_IT}")
    return str(version)


def get(url: str, headers: Mapping[str, str]) -> tuple[int, Any]:
    """Status and JSON of a URL; None for a body that is none.

    Raises:
        NotReached: nobody answers, or not in time.
    """
    request = urllib.request.Request(url, headers=dict(headers))
    try:
        return within(ANSWER_S, f"an answer of {url}", lambda: _get(request))
    except (OSError, ValueError) as error:  # http.client's errors are of both kinds
        reason = getattr(error, "reason", error)
        cause = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        where = url.removesuffix(MODE).removesuffix(VERSION)
        raise NotReached(f"nobody answers at {where} ({one_line(str(cause))}); {FIND_IT}") from None


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A dashboard sends nobody elsewhere, and the token is for it alone: a redirect is an answer like any other."""

    def redirect_request(self, *args: object, **named: object) -> None:
        """Refuse."""


def _get(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.build_opener(NoRedirects).open(request, timeout=ANSWER_S) as answer:
            status, body = answer.status, answer.read(2**20)
    except urllib.error.HTTPError as error:
        return error.code, None
    except Exception as error:
        raise error if isinstance(error, OSError) else OSError(str(error)) from None
    try:
        return status, json.loads(body)
    except ValueError:
        return status, None


def within(seconds: float, awaited: str, call: Callable[[], T]) -> T:
    """What `call` returns or raises, on a thread: not every library's waits have limits, nor a name's look-up.

    Raises:
        NotReached: it takes longer; the message names what was awaited.
    """
    try:
        return within_limit(seconds, awaited, call)
    except TimeoutError as error:
        raise NotReached(f"{error}; is the cluster's head alive, and the tunnel to it?") from None


def check_version(cluster: str, client: str, url: str) -> None:
    """Refuse a cluster whose Ray is another than the one that distml needs.

    Raises:
        UsageError: with both versions.
    """
    if cluster.split(".")[:2] != client.split(".")[:2]:
        raise UsageError(
            f"the cluster at {url} runs Ray {cluster}, this distml works with Ray {client}; start the cluster with "
            f"ray[default]=={client}, or install the distml that works with Ray {cluster}"
        )
