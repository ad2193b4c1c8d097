"""Which Ray, torch and Python a cluster file asks for, against what this distml works with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from distml.spec.messages import Problem
from distml.spec.yaml import KeyPath

TESTED_PYTHON = "3.11"  # the one that constraints.txt is for
PINNED = ("ray", "torch", "deepspeed")
_IMAGE = re.compile(r"(?P<name>[\w./:-]*?)(?::(?P<tag>[\w.-]+))?(?:@sha256:[0-9a-f]+)?$")
_TAG = re.compile(r"^(?P<ray>\d+\.\d+\.\d+\w*)(?:[.\w]*)?(?:-py(?P<python>\d{2,3}))?")
_PIP_INSTALL = re.compile(r"\bpip3?\s+install\b(?P<rest>[^;&|\n]*)")
_PYTHON = re.compile(r"\bpython(?:=|==)?(3\.\d{1,2})\b")
_WHEEL = re.compile(r"ray-wheels|ray-\d[\w.]*-cp\d")


@dataclass(frozen=True)
class Asked:
    """A version that a file asks for, and where."""

    name: str
    version: str
    path: KeyPath


def allowed() -> dict[str, SpecifierSet]:
    """What distml's own metadata says of what a cluster must have."""
    wanted = (Requirement(line) for line in requires("distml") or ())
    return {one.name: one.specifier for one in wanted if one.name in PINNED and "extra" not in str(one.marker or "")}


def in_image(image: str, path: KeyPath) -> Iterator[Asked]:
    """What the tag of a Ray image says: `rayproject/ray:2.60.0-py311-gpu`."""
    found = _IMAGE.match(image)
    tag = _TAG.match(found["tag"] or "") if found else None
    if tag is None:
        return
    yield Asked("ray", tag["ray"], path)
    if tag["python"]:
        yield Asked("python", f"{tag['python'][0]}.{tag['python'][1:]}", path)


def unpinned_image(image: str, path: KeyPath) -> Iterator[Problem]:
    """An image whose tag does not say what is in it."""
    found = _IMAGE.match(image)
    if found is None or "@sha256:" in image or _TAG.match(found["tag"] or ""):
        return
    if "ray" in image.lower() or found["tag"] in (None, "latest", "nightly"):
        yield Problem(f"the image {image!r} does not say which Ray and Python it has; name it "
                      f"…:RAY-pyXY, such as {example_image()}", (path,), "value")  # fmt: skip


def example_image() -> str:
    """An image that fits."""
    lowest = next(iter(sorted(one.version for one in allowed()["ray"] if one.operator == ">=")), "")
    return f"rayproject/ray:{Version(lowest).major}.{Version(lowest).minor}.0-py{TESTED_PYTHON.replace('.', '')}-gpu"


def in_command(command: str, path: KeyPath) -> Iterator[Asked]:
    """What a command installs, or makes an environment of."""
    for requirement in _installed(command):
        pins = [one.version for one in requirement.specifier if one.operator == "=="]
        if requirement.name in PINNED and pins:
            yield Asked(requirement.name, pins[0], path)
    for found in _PYTHON.finditer(command):
        yield Asked("python", found[1], path)


def unpinned(command: str, path: KeyPath) -> Iterator[Problem]:
    """Installations that another day would give another version, or a nightly wheel."""
    if _WHEEL.search(command):
        yield Problem(f"installs a wheel of Ray by its address; install ray=={_lowest('ray')} or use an image",
                      (path,), "value")  # fmt: skip
    for found in _PIP_INSTALL.finditer(command):
        if re.search(r"(^|\s)(-c|--constraint)[\s=]", found["rest"]):
            continue
        for one in _requirements(found["rest"]):
            if one.name in PINNED and not any(pin.operator == "==" for pin in one.specifier):
                yield Problem(f"pip install {one.name} without a version; nodes that start later get another one: "
                              f"write {one.name}=={_lowest(one.name)}, or -c constraints.txt", (path,),
                              "value")  # fmt: skip


def _lowest(name: str) -> str:
    return next(one.version for one in allowed()[name] if one.operator == ">=")


def _installed(command: str) -> Iterator[Requirement]:
    for found in _PIP_INSTALL.finditer(command):
        yield from _requirements(found["rest"])


def _requirements(text: str) -> Iterator[Requirement]:
    for word in text.replace('"', " ").replace("'", " ").split():
        if not word.startswith("-"):
            try:
                yield Requirement(word)
            except ValueError:  # a path, an address, an option's value
                continue


def mismatches(asked: list[Asked]) -> Iterator[Problem]:
    """What distml does not work with, and what differs within one file."""
    first: dict[str, Asked] = {}
    known = allowed() | {"python": SpecifierSet(f"=={TESTED_PYTHON}.*")}
    for one in asked:
        try:
            version = Version(one.version)
        except InvalidVersion:
            continue
        before = first.setdefault(one.name, one)
        called = {"ray": "Ray", "python": "Python"}.get(one.name, one.name)
        if not known[one.name].contains(version, prereleases=True):
            yield Problem(f"{called} {one.version}; distml is tested with {known[one.name]}: use that", (one.path,),
                          "value")  # fmt: skip
        elif Version(before.version) != version:
            yield Problem(f"{called} {one.version} here, {before.version} in {'.'.join(map(str, before.path))}; all "
                          "nodes need the same", (one.path,), "value")  # fmt: skip
