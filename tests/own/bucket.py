"""An S3 server on loopback (moto's), which can be slow, refuse and lose what it is sent."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from werkzeug.serving import WSGIRequestHandler, make_server

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
Answer = Callable[[str, str], int | None]


class Quiet(WSGIRequestHandler):
    def log(self, kind: str, message: str, *args: object) -> None:
        pass


class BucketServer:
    """Buckets on a port of its own.

    Attributes:
        port: of 127.0.0.1.
        answer: called with a request's method and path; a status that it returns is the answer, in moto's place.
        requests: methods and paths, in their order.
    """

    def __init__(self) -> None:
        from moto.backends import get_backend
        from moto.server import DomainDispatcherApplication, create_backend_app

        self.backend = get_backend("s3")["123456789012"]["aws"]
        self.inner = DomainDispatcherApplication(create_backend_app)
        self.answer: Answer = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self.server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=Quiet)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.num_buckets = 0

    def _serve(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        status = self.answer(method, path)
        if status is None:
            return self.inner(environ, start_response)
        code = {301: "PermanentRedirect", 403: "AccessDenied", 404: "NoSuchBucket"}.get(status, "InternalError")
        start_response(f"{status} {code}", [("Content-Type", "application/xml")])
        return [f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()]

    def new_bucket(self) -> str:
        """The name of an empty one."""
        self.num_buckets += 1
        name = f"bucket-{self.num_buckets}"
        self.backend.create_bucket(name, "us-east-1")
        self.answer, self.requests = (lambda method, path: None), []
        return name

    def url(self, bucket: str, prefix: str = "runs") -> str:
        """As a spec writes it."""
        return f"s3://{bucket}/{prefix}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def objects(self, bucket: str) -> dict[str, bytes]:
        """All that a bucket holds, without marks of folders."""
        keys = self.backend.buckets[bucket].keys
        return {name: keys[name].value for name in sorted(keys) if not name.endswith("/")}

    def manifests(self, bucket: str) -> list[str]:
        """Names of committed checkpoints; cheap enough to ask all the time."""
        return [name for name in list(self.backend.buckets[bucket].keys) if name.endswith("/manifest.json")]

    def put(self, bucket: str, name: str, data: bytes) -> None:
        """Change an object."""
        self.backend.put_object(bucket, name, data)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def committed(names: dict[str, bytes]) -> list[str]:
    """Steps whose manifest is there, by the folder's name."""
    found = (re.fullmatch(r".*/(step-\d+)/manifest.json", name) for name in names)
    return sorted(match[1] for match in found if match)


@contextlib.contextmanager
def bucket_server() -> Iterator[BucketServer]:
    """For a session of tests."""
    server = BucketServer()
    try:
        yield server
    finally:
        server.close()


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative names and contents."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
