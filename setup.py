"""Packs `jobs/` into the package, where `distml run NAME` finds it; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["distml", "distml.*"]), "distml.shipped_jobs"],
    package_dir={"distml.shipped_jobs": "jobs"},
    package_data={"distml.shipped_jobs": ["*.yaml"], "distml": ["py.typed", "launch/check/*.json"]},
)
