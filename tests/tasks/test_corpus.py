"""Where text comes from: which files, which documents, which splits."""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

import pytest
from own.oracle import OWN

from distml.errors import UsageError
from distml.spec.corpus_files import find_files, iterate_files
from distml.spec.language import CorpusSpec
from distml.tasks.corpus import SPLITS, deal, documents_of, read

RHYMES = OWN / "rhymes.txt"


def corpus(path: Path | str, **settings) -> CorpusSpec:
    return CorpusSpec(path=str(path), **settings)


def texts(spec: CorpusSpec, seed: int = 0) -> dict[str, list[str]]:
    documents = documents_of(find_files(spec), spec.max_bytes)
    return {name: list(read(chosen)) for name, chosen in deal(documents, spec, seed).items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, text in {"b.txt": "two", "a/z.txt": "one", "c.md": "three", "empty.txt": "", ".hidden.txt": "no",
                       ".git/config.txt": "no", "d.txt": "four"}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_standard_library_is_its_python_files_without_tests():
    files = find_files(corpus("stdlib"))
    names = [file.name for file in files]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    assert not [name for name in names if {"test", "tests", "site-packages", "idle_test"} & set(name.split("/"))]
    first = next(read(documents_of(files)))
    assert first.encode() == Path(sysconfig.get_path("stdlib"), names[0]).read_bytes()


def test_a_folder_is_its_files_by_name(folder):
    assert [file.name for file in find_files(corpus(folder))] == ["a/z.txt", "b.txt", "c.md", "d.txt"]
    assert [file.name for file in find_files(corpus(folder, pattern="*.txt"))] == ["a/z.txt", "b.txt", "d.txt"]
    assert list(read(documents_of(find_files(corpus(folder))))) == ["one", "two", "three", "four"]


def test_whether_there_is_a_file_takes_no_second_one(folder, monkeypatch):
    listed = []
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: listed.append(path) or is_file(path))
    next(iterate_files(corpus(folder, pattern="*.txt")))
    few = len(listed)
    assert len(list(iterate_files(corpus(folder, pattern="*.txt")))) == 3
    assert few < len(listed) - few


def test_a_files_documents_end_at_blank_lines():
    documents = list(read(documents_of(find_files(corpus(RHYMES)))))
    assert documents == re.split(r"\n\n", RHYMES.read_text())
    assert len(documents) == 24


def test_blank_lines_of_all_kinds_end_a_document(tmp_path):
    file = tmp_path / "x.txt"
    file.write_bytes(
        b"\n\n" + b"\n \t\r\n\n".join(b"  paragraph %d\r\nof two lines" % n for n in range(20)) + b"\n\n\n"
    )
    found = list(read(documents_of(find_files(corpus(file)))))
    assert found == [f"  paragraph {n}\r\nof two lines" for n in range(20)]


@pytest.mark.parametrize("text", ["line of text\n" * 500, "é" * 3000, "a b" * 50])
def test_a_file_with_few_paragraphs_is_cut_into_pieces_that_cover_it(tmp_path, text):
    file = tmp_path / "x.txt"
    file.write_text(text, encoding="utf-8")
    found = list(read(documents_of(find_files(corpus(file)))))
    assert "".join(found) == text
    assert len(found) >= 90
    assert max(len(piece) for piece in found) <= 2.5 * len(text) / 100 + 13
    assert "\n" not in text or all(piece.endswith("\n") for piece in found)


def test_splits_are_whole_documents_that_cover_the_text_once_in_its_order():
    spec = corpus(RHYMES, validation=0.2, test=0.1)
    everything = list(read(documents_of(find_files(spec))))
    split = texts(spec)
    assert {name: len(split[name]) for name in SPLITS} == {"train": 17, "validation": 5, "test": 2}
    assert sorted(text for found in split.values() for text in found) == sorted(everything)
    for found in split.values():
        assert found == [document for document in everything if document in found]
    assert texts(spec) == split
    assert texts(spec, seed=1) != split


def test_a_share_that_rounds_to_nothing_still_gives_a_document():
    assert [len(found) for found in texts(corpus(RHYMES, validation=0.001, test=0.001)).values()] == [22, 1, 1]


def test_documents_beyond_max_bytes_are_left_out():
    spec = corpus(RHYMES)
    documents = documents_of(find_files(spec))
    sizes = [document.stop - document.start for document in documents]
    assert documents_of(find_files(spec), sum(sizes[:5])) == documents[:5]
    assert documents_of(find_files(spec), sum(sizes[:5]) - 1) == documents[:4]
    assert documents_of(find_files(spec), 1) == []


@pytest.mark.parametrize(("content", "message"), [
    (b"ok\n\xff\xfe", "x.txt is not text in UTF-8 (byte 3)"), (b"ab\0c", "x.txt is not text in UTF-8 (byte 2)"),
    (b"", "x.txt is empty"), (b"a", "has 1 document, of which validation takes 1 and test 1"),
])  # fmt: skip
def test_a_file_that_is_no_corpus(tmp_path, content, message):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        texts(corpus(tmp_path / "x.txt"))
    assert message in str(caught.value)


def test_a_folder_that_is_no_corpus(folder):
    with pytest.raises(UsageError, match=r"has no file that matches '\*\.rst'"):
        find_files(corpus(folder, pattern="*.rst"))
    with pytest.raises(UsageError, match="nowhere: cannot be read: No such file"):
        find_files(corpus(folder / "nowhere"))
    (folder / "d.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"d\.txt is not text in UTF-8"):
        texts(corpus(folder))
    (folder / "d.txt").unlink()
    os.symlink(folder / "gone", folder / "d.txt")
    assert [file.name for file in find_files(corpus(folder))] == ["a/z.txt", "b.txt", "c.md"]


def test_documents_that_leave_none_to_train_on():
    with pytest.raises(UsageError, match="has 24 documents, of which validation takes 12 and test 12"):
        texts(corpus(RHYMES, validation=0.5, test=0.5))
