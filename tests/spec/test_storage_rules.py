"""`storage:` as a spec writes it: what is taken, and what is refused without giving secrets away."""

from __future__ import annotations

from pathlib import Path

import pytest

from distml.errors import UsageError
from distml.spec.loader import load_spec
from distml.spec.storage import bucket_of, fault_of

TRAIN = "distml: v1\nname: one\ntask: {name: classification, data: digits}\nstop: {steps: 2}\n"
OVER = """distml: v1
kind: sweep
name: many
base: {task: {name: classification, data: digits}, stop: {steps: 2}}
space: {optimizer.lr: {choice: [0.1, 0.2]}}
objective: {metric: eval/loss, mode: min}
trials: 2
"""


@pytest.mark.parametrize("storage", ["/mnt/runs", "~/runs", "runs", "s3://bucket", "s3://bucket/a/b", "gs://bucket/a",
                                     "s3://bucket/a?endpoint_override=h:9000&scheme=http&region=eu"])  # fmt: skip
@pytest.mark.parametrize("text", [TRAIN, OVER])
def test_taken_by_every_kind_and_kept(tmp_path, text, storage):
    path = tmp_path / "spec.yaml"
    path.write_text(f"{text}storage: {storage}\n")
    loaded = load_spec(path)
    assert loaded.job.storage == storage
    path.write_text(loaded.dump())
    assert load_spec(path).job == loaded.job


def test_a_url_is_taken_apart():
    one = bucket_of("s3://bucket/a/b/?endpoint_override=127.0.0.1:9000&scheme=http")
    assert one.path == "bucket/a/b"
    assert one.options == {"endpoint_override": "127.0.0.1:9000", "scheme": "http"}
    assert bucket_of("gs://bucket").path == "bucket"


@pytest.mark.parametrize(("storage", "said"), [
    ("''", "must be a path, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, or null"),
    ("hdfs://a/b", "does not know hdfs://; write a path, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"),
    ("s3:/bucket/a", "has one slash where a URL has two; write s3://BUCKET/PREFIX"),
    ("s3://", "names no bucket; write s3://BUCKET/PREFIX"),
    ("gs:///a", "names no bucket; write gs://BUCKET/PREFIX"),
    ("s3://bucket/a/../b", "has a prefix with an empty part, . or ..; write it without"),
    ("s3://bucket?access_key=hidden", "has an option that does not work here; after a ? may stand endpoint_override, "
                                      "scheme, region"),
    ("s3://bucket?scheme=ftp", "has a scheme= that is neither http nor https"),
    ("s3://bucket?endpoint_override=http://h", "has an endpoint_override= that is no HOST:PORT; http belongs into "
                                               "&scheme=http"),
])  # fmt: skip
def test_what_cannot_be_is_refused_at_its_place(tmp_path, storage, said):
    path = tmp_path / "spec.yaml"
    path.write_text(f"{TRAIN}storage: {storage}\n")
    with pytest.raises(UsageError) as caught:
        load_spec(path)
    assert str(caught.value) == f"{path}:5:10: storage {said}"
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("storage", ["s3://me:hidden@bucket/a", "s3://bucket?endpoint_override=me:hidden@host"])
def test_secrets_are_refused_and_not_repeated(storage):
    for source in ({"storage": storage}, {}):
        with pytest.raises(UsageError, match="must name no user and no password: credentials come from") as caught:
            load_spec({"distml": "v1", "name": "one", "task": "classification", "stop": {"steps": 2}, **source},
                      [] if source else [f"storage={storage}"])  # fmt: skip
        assert "hidden" not in str(caught.value)
    assert "hidden" not in str(fault_of(storage))


def test_of_a_base_it_belongs_to_the_top(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(OVER.replace("base: {", "base: {storage: /mnt, "))
    with pytest.raises(UsageError, match=r":4:8: storage belongs to the top of the spec, beside base"):
        load_spec(path)
    path.write_text(OVER.replace("optimizer.lr: {choice: [0.1, 0.2]}", "storage: {choice: [a, b]}"))
    with pytest.raises(UsageError, match=r"space.storage may not be searched: it is the same for all"):
        load_spec(path)


def test_nothing_of_a_store_is_imported_with_a_spec():
    import subprocess
    import sys

    code = "import sys, distml.spec.loader; sys.exit(any(name in sys.modules for name in ('pyarrow', 'ray', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path.cwd(), check=False).returncode == 0
