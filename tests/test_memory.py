"""Allocations that fail, told by real errors; what the kernel says of a control group."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distml.memory import (
    binary_size,
    group_limit,
    is_out_of_memory,
    memory_bytes,
    out_of_memory,
    out_of_memory_kills,
    resident_bytes,
)
from distml.tasks.build import describe

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.72 GiB of which 312.00 MiB is "
    "free. Including non-PyTorch memory, this process has 139.40 GiB memory in use. Of the allocated memory 138.1 GiB "
    "is allocated by PyTorch, and 20.00 MiB is reserved by PyTorch but unallocated."
)
HUGE = 2**50  # more than any machine has


def raised(run) -> Exception:
    with pytest.raises(Exception) as caught:
        run()
    return caught.value


@pytest.mark.parametrize(
    ("run", "needed"),
    [
        (lambda: torch.empty(HUGE, dtype=torch.uint8), "1,048,576 GiB more were needed"),
        (lambda: np.ones(HUGE // 8), "1,048,576 GiB more were needed"),
        (lambda: bytearray(HUGE), "more was needed"),
    ],
    ids=["torch", "numpy", "python"],
)
def test_real_errors_say_what_was_needed_and_what_there_was(run, needed):
    error = raised(run)
    said = describe(error)
    assert said.startswith(f"out of memory: {needed}, the process had ")
    assert said.endswith(f" of {binary_size(memory_bytes())}")
    assert is_out_of_memory(said)
    assert "\n" not in said


def test_of_a_gpu_the_errors_own_numbers_are_said():
    said = out_of_memory(torch.OutOfMemoryError(CUDA))
    assert said == "out of memory: 2.50 GiB more were needed, 312.0 MiB of the GPU's 139.7 GiB were free"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of range"), KeyError("memory")],
)
def test_other_errors_are_others(error):
    assert out_of_memory(error) is None
    assert not is_out_of_memory(describe(error))


def test_the_kernels_files_are_read(tmp_path):
    assert group_limit(tmp_path) is None
    assert out_of_memory_kills(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert group_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1048576\n")
    (tmp_path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert (group_limit(tmp_path), memory_bytes(tmp_path), out_of_memory_kills(tmp_path)) == (2**20, 2**20, 2)
    assert 2**20 < resident_bytes() < 2**40


def test_the_older_kinds_files_are_read(tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert group_limit(tmp_path) is None
    assert out_of_memory_kills(tmp_path) == 1


LIMITED = """
import resource, sys
import torch
from distml.cli import main
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
sys.exit(main(sys.argv[1:]))
"""


def run_limited(out: Path, at: int, how: str) -> subprocess.CompletedProcess[str]:
    """A run in a process that may have 8 GiB of addresses, whose task asks for 64 at a step."""
    spec = out.parent / "hungry.yaml"
    spec.write_text(
        f"distml: v1\nname: hungry\ntask: {{name: 'hungry:Hungry', args: {{at: {at}, how: {how}}}}}\n"
        "strategy: single\nbatch_size: 8\nstop: {steps: 6}\nlog: {every: 1, to: []}\n"
    )
    (out.parent / "hungry.py").write_text((Path(__file__).parent / "own" / "hungry.py").read_text())
    command = [sys.executable, "-c", LIMITED, "run", str(spec), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("at", "how", "code"), [(3, "torch", 3), (0, "numpy", 2)])
def test_a_run_that_is_out_of_memory_ends_with_one_line(tmp_path, at, how, code):
    """After the first update exit 3, before it exit 2; rank, phase, needed, had, and what a plan suggests."""
    done = run_limited(tmp_path / "out", at, how)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"error: rank 0, loss, step {at}: out of memory: 64.0 GiB more were needed, the process had "
    )
    assert " of 8.00 GiB; " in line
    assert re.search(r"; plan says \d+\.\d MiB per rank$", line)
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (record["error"]["rank"], record["error"]["phase"]) == (
        ("rank 0", "loss") if code == 3 else ("driver", "start")
    )


def test_without_a_limit_that_it_meets_the_same_run_ends_well(tmp_path):
    """The control."""
    done = run_limited(tmp_path / "out", at=3, how="not")
    assert (done.returncode, done.stderr) == (0, "")
