"""Real processes over gloo, without Ray: a function called once in each rank with the group of all.

One set of processes serves many cases: importing torch and DeepSpeed takes longer than they do.
"""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from own.oracle import OWN, job_of

from distml.exchange.process_group import ProcessGroup, open_rendezvous
from distml.loop import Trainer
from distml.tasks.build import build_task
from distml.tasks.sources import SourceTree

CPU = torch.device("cpu")
TIMEOUT_S = 120.0


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any, survivors: int | None = None) -> list[Any]:
    """`work(rank, join, *arguments)` in `size` processes; what each returned, in rank order.

    `join()` opens a group of all ranks; as often as all of them call it. Answers of the first `survivors` are enough.
    """
    wanted = set(range(survivors or size))
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    pipes = [context.Pipe(duplex=False) for _ in range(size - 1)]
    ends = [[sender for _, sender in pipes], *([receiver] for receiver, _ in pipes)]
    processes = [context.Process(target=_rank, args=(rank, size, ends[rank], answers, work, arguments), daemon=True)
                 for rank in range(size)]  # fmt: skip
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while wanted - set(found):
            rank, error, value = answers.get(timeout=TIMEOUT_S)
            if error is not None:
                raise AssertionError(f"rank {rank}: {error}")
            found[rank] = value
    except queue.Empty:
        raise AssertionError(f"no answer of ranks {sorted(wanted - set(found))} in {TIMEOUT_S:g} s") from None
    finally:
        for process in processes:
            process.kill()
            process.join(TIMEOUT_S)
    return [found[rank] for rank in sorted(wanted)]


def _rank(rank: int, size: int, ends: list[Connection], answers: Any, work: Callable[..., Any], arguments: Any) -> None:
    import traceback

    torch.set_num_threads(1)

    def join() -> ProcessGroup:
        listener = open_rendezvous("127.0.0.1") if rank == 0 else None
        port = listener.getsockname()[1] if listener else ends[0].recv()
        for sender in ends if listener else ():
            sender.send(port)
        return ProcessGroup(rank, size, "127.0.0.1", port, listener, CPU, TIMEOUT_S)

    try:
        value, error = work(rank, join, *arguments), None
    except BaseException:
        value, error = None, traceback.format_exc()
    answers.put((rank, error, value))
    answers.close()
    answers.join_thread()


def trainer_of(spec: dict[str, Any], rank: int, size: int, **settings: Any) -> Trainer:
    """A built worker of a job as `own.oracle.spec_of` gives it."""
    job = job_of(spec | {"resources": {"workers": size}})
    SourceTree.collect(job.task, OWN).install()
    trainer = Trainer(job, build_task(job), rank, size, **settings)
    trainer.build(None)
    return trainer
