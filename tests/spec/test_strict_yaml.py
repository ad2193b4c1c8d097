"""Every kind of broken YAML ends in one line with its place; what is read is YAML 1.2's core schema."""

from __future__ import annotations

import math

import pytest

from distml.errors import UsageError
from distml.spec.yaml import Document, dump, parse

BAD = {
    "empty": ("", "1:1", "it is empty"),
    "comment only": ("# nothing\n", "1:1", "it is empty"),
    "list at the top": ("\n- a\n", "2:1", "must be a mapping of keys, got a list"),
    "scalar at the top": ("job\n", "1:1", "got the string 'job'"),
    "duplicate key": ("a: 1\nb: 2\na: 3\n", "3:1", "duplicate key 'a', first on line 1"),
    "duplicate inner key": ("a: {b: 1, b: 2}\n", "1:11", "duplicate key 'b'"),
    "python tag": (
        "a: !!python/object/apply:os.system [ls]\n",
        "1:4",
        "!!python/object/apply:os.system: tags are not allowed",
    ),
    "standard tag": ("a: !!str 5\n", "1:4", "tags are not allowed"),
    "own tag": ("a:\n  b: !x 5\n", "2:6", "tags are not allowed"),
    "bare tag": ("a: ! 5\n", "1:4", "tags are not allowed"),
    "unknown handle": ("a: !e!x 5\n", "1:4", "not YAML"),
    "recursive list": ("a: &x\n  - *x\n", "1:4", "contains itself"),
    "recursive mapping": ("a: &x {b: *x}\n", "1:4", "contains itself"),
    "undefined alias": ("a: *x\n", "1:4", "undefined alias"),
    "merge key": ("a: &x {b: 1}\nc:\n  <<: *x\n", "3:3", "merge keys"),
    "tab": ("a:\n\tb: 1\n", "2:1", "a tab"),
    "tab after the colon": ("a:\n  b:\t[1,\n\t\tc: 1\n", "2:5", "a tab"),
    "two documents": ("a: 1\n---\nb: 2\n", "2:1", "one document"),
    "open bracket": ("a: [1, 2\nb: 3\n", "2:2", "not YAML"),
    "open quote": ("a: 'x\n", "2:1", "not YAML"),
    "bad indentation": ("a: 1\n  b: 2\n", "2:4", "not YAML"),
    "integer key": ("a: {1: x}\n", "1:5", "a key must be a string, got '1'"),
    "null key": ("~: x\n", "1:1", "a key must be a string"),
    "list as key": ("? [a]\n: 1\n", "1:3", "a key must be a string"),
    "nan": ("a: .nan\n", "1:4", "nan"),
    "long integer": ("a: 99999999999999999999\n", "1:4", "64 bits"),
    "very long integer": (f"a: {'9' * 6000}\n", "1:4", "too many digits"),
    "very long hexadecimal": (f"a: 0x{'f' * 6000}\n", "1:4", "64 bits"),
    "surrogate": ('a: "\\ud800"\n', "1:4", "surrogate"),
    "no such character": ('a: "\\UFFFFFFFF"\n', "1:7", "not readable as YAML"),
    "control character": ("a: b\x07\n", "1:5", "not allowed in YAML"),
    "not utf-8": (b"a: 1\nb: x\xff\n", "2:5", "0xff is not UTF-8"),
    "deep": ("[" * 5000, "1:65", "nested deeper than 64"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(100)), "64:64", "nested deeper than 64"),
    "too long": (b"#" * 1_000_001, "1:1", "larger than"),
    "billion laughs": (
        "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
        "5:5",
        "expand to over",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_yaml_is_one_line_with_its_place(case, fails):
    text, place, phrase = BAD[case]
    message = fails(text)
    assert message.startswith(f"job.yaml:{place}: "), message
    assert phrase in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.0e-3", 0.001),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("-1.", -1.0),
        ("-.inf", -math.inf),
        ("+7", 7),
        ("010", 10),
        ("0o10", 8),
        ("0xff", 255),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("off", "off"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("null", None),
        ("", None),
        ("'5'", "5"),
        ("1e", "1e"),
        ("=", "="),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = parse(f"a: {text}\n", "x").data["a"]
    assert found == value
    assert type(found) is type(value)


def test_aliases_are_written_out():
    assert parse("a: &x [1, 2]\nb: *x\n", "x").data == {"a": [1, 2], "b": [1, 2]}


def test_byte_order_mark_and_windows_lines():
    document = parse("﻿a: 1\r\nb: 2\r\n".encode(), "x")
    assert document.data == {"a": 1, "b": 2}
    assert str(document.where(("b",), "key")) == "x:2:1"


def test_every_key_and_value_knows_its_place():
    document = parse("a:\n  - b: 1\n    c: {d: x}\n", "x")
    assert str(document.where(("a", 0, "c", "d"), "key")) == "x:3:9"
    assert str(document.where(("a", 0, "c", "d"))) == "x:3:12"
    assert str(document.where(("a", 0, "c", "missing"))) == "x:3:8"
    assert str(Document({}, document.start).where(("q",))) == "x:1:1"


@pytest.mark.parametrize(
    "value", ["1e-3", "yes", "true", "null", "~", "", "0o7", "<<", "a: b", "#x", "é", "x\ny", "- a", "2024-01-01", ".5"]
)
def test_a_dumped_string_stays_one(value):
    assert parse(dump({"a": value, "b": {value: 1.0e-8}}), "x").data == {"a": value, "b": {value: 1.0e-8}}


def test_an_odd_file_name_does_not_break_the_line():
    with pytest.raises(UsageError) as caught:
        parse("a: [", "two\nlines")
    assert "\n" not in str(caught.value)
