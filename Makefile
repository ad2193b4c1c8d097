# What a newcomer, a developer and the checks of a change run. Needs make and Python 3.10 or newer; all else goes into
# .venv. Use another interpreter with `make PYTHON=python3.11 ...`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all check extras

# Install distml and train a first job: two workers on this machine, about half a minute once it is installed.
quickstart: .venv/.installed
	$(BIN)/distml run digits-all-reduce

# The tests that take seconds.
test: .venv/.installed-test
	$(BIN)/python -m pytest

# All tests that need no GPU: minutes.
test-all: .venv/.installed-test
	$(BIN)/python -m pytest -m "not gpu"

# What only some jobs and measurements need: Atari, MuJoCo and Box2D games, and the peers of `distml bench rl`.
extras: .venv/.installed
	$(BIN)/pip install -c constraints.txt -e ".[atari,mujoco,box2d,bench]"

# Format, lint and types.
check: .venv/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy distml

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The stamps are touched last: an installation that was broken off is repeated, a finished one is not.
.venv/.installed: pyproject.toml setup.py constraints.txt | .venv/bin/python
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

.venv/.installed-test: pyproject.toml setup.py constraints.txt | .venv/bin/python
	$(BIN)/pip install -c constraints.txt -e ".[test]"
	touch $@ .venv/.installed
