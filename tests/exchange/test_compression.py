"""Compression alone: what is sent and what stays add up, beside naive twins of every method.

Shapes: n elements of a phase, W ranks.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

import hosted
import numpy as np
import pytest
import torch
from own.oracle import job_of, spec_of, train
from torch import Tensor

from distml.exchange.compression.base import phase_ranges, tiles_of
from distml.exchange.compression.build import build_compressor, build_decoder
from distml.exchange.compression.topk import SAMPLED_WIDTH, largest
from distml.exchange.flat import TAIL
from distml.exchange.layout import Layout
from distml.strategies.shard import shard_range

# Two phases; segments of odd lengths, in blocks of 256 and shorter ones; a convolution's kernel, matrices, vectors.
LAYOUT = Layout.build([
    ("a.weight", (40, 50), 0, 0), ("a.bias", (40,), 0, 1), ("b.weight", (24, 10, 3, 3), 0, 0), ("b.bias", (24,), 0, 1),
    ("d.weight", (60, 30), 1, 0), ("d.bias", (7,), 1, 0), ("d.thin", (1, 9), 1, 0),
])  # fmt: skip
METHODS = {
    "bf16": {"name": "bf16"},
    "int8": {"name": "int8"},
    "topk": {"name": "topk", "fraction": 0.05},
    "powersgd": {"name": "powersgd", "rank": 2},
}
EXACT = ("bf16", "topk")
TYPES = (torch.float32, torch.float64)
CASES = [(name, dtype) for name in METHODS for dtype in TYPES]


def job(name: str, momentum: float = 0.0, nesterov: bool = False, **changes):
    optimizer = {"name": "sgd", "momentum": momentum, "nesterov": nesterov}
    return job_of(spec_of(strategy={"name": "all_reduce", "compression": METHODS[name] | changes}, workers=2,
                          optimizer=optimizer))  # fmt: skip


def like(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


def drawn(seed: int, size: int, dtype: torch.dtype) -> Tensor:
    """Values of many magnitudes, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    return (values * torch.randn(size, generator=generator, dtype=torch.float64).exp()).to(dtype)


def decoded(task, phase: int, shards: int, payloads: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """What the servers of a phase read, end to end."""
    decoder, pieces = build_decoder(task, LAYOUT, like(dtype)), []
    for span, payload in zip(server_ranges(phase, shards), payloads, strict=True):
        total = torch.full((span[1] - span[0],), 7.0, dtype=dtype)
        decoder.decode(span, [payload], total)
        pieces.append(total)
    return torch.cat(pieces)


def server_ranges(phase: int, shards: int) -> list[tuple[int, int]]:
    return [shard_range(LAYOUT, LAYOUT.shard(index, shards), phase) for index in range(shards)]


class Rank:
    """A group of threads."""

    def __init__(self, rank: int, size: int, board: dict, barrier: threading.Barrier) -> None:
        self.rank, self.size, self.bytes_sent, self.board, self.barrier = rank, size, 0, board, barrier

    def meet(self, value) -> list:
        self.board[self.rank] = value
        self.barrier.wait(20)
        values = [self.board[rank] for rank in range(self.size)]
        self.barrier.wait(20)
        return values

    def all_reduce(self, vector: Tensor) -> None:
        self.bytes_sent += 2 * (self.size - 1) * vector.nbytes // self.size
        total = sum(self.meet(vector.clone()))
        vector.copy_(total)

    def all_gather(self, payload: bytes) -> list[bytes]:
        return self.meet(payload)

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        assert all(part.dtype == torch.uint8 for part in parts)
        self.bytes_sent += sum(part.numel() for rank, part in enumerate(parts) if rank != self.rank)
        got = [row[self.rank] for row in self.meet([part.clone() for part in parts])]
        assert [part.numel() for part in got] == list(lengths)
        return got


def together(size: int, work: Callable[[Rank], object]) -> list:
    """What each of `size` ranks returns."""
    board, barrier, results = {}, threading.Barrier(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(Rank(rank, size, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(result is not None for result in results)
    return results


# ------------------------------------------------------------------------------------------------- sent and what stays
@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_what_is_sent_and_what_stays_are_the_gradient(name, dtype, shards):
    task = job(name)
    compressor = build_compressor(task, LAYOUT, like(dtype))
    for step in range(6):
        for phase in (0, 1):
            first, last = LAYOUT.phase_range(phase)
            gradient = drawn(10 * step + phase, last - first, dtype)
            before = compressor.residual[first:last].clone()
            payloads = compressor.encode(phase, gradient.clone(), server_ranges(phase, shards))
            sent, stays = decoded(task, phase, shards, payloads, dtype), compressor.residual[first:last]
            assert not torch.equal(sent, gradient + before)  # something does stay
            if name in EXACT:
                assert torch.equal(sent + stays, gradient + before)
            else:
                scale = (gradient + before).abs().max()
                assert ((sent + stays) - (gradient + before)).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_payloads_of_shards_say_what_the_whole_one_says(name, dtype):
    """And no shard's residual depends on where it was cut."""
    read = {}
    for shards in (1, 2, 3, 7):
        task = job(name)
        compressor = build_compressor(task, LAYOUT, like(dtype))
        rows = []
        for step in range(3):
            for phase in (0, 1):
                size = LAYOUT.phase_range(phase)[1] - LAYOUT.phase_range(phase)[0]
                payloads = compressor.encode(phase, drawn(step, size, dtype), server_ranges(phase, shards))
                rows.append(decoded(task, phase, shards, payloads, dtype))
        read[shards] = torch.cat([*rows, compressor.residual])
    assert all(torch.equal(read[shards], read[1]) for shards in read)


def reduced(name: str, size: int, dtype: torch.dtype, steps: int, momentum: float = 0.0, **changes) -> list[dict]:
    """Each rank's gradients, what came out of every step, residuals at the end, bytes sent."""
    task = job(name, momentum, **changes)

    def work(group: Rank) -> dict:
        compressor = build_compressor(task, LAYOUT, like(dtype))
        total, applied, tails = torch.zeros(LAYOUT.numel, dtype=dtype), torch.zeros(LAYOUT.numel, dtype=dtype), []
        for step in range(steps):
            for phase in (0, 1):
                first, last = LAYOUT.phase_range(phase)
                gradient = drawn(1000 * step + 10 * phase + group.rank, last - first, dtype)
                tail = torch.tensor(
                    [16_777_215.0 - group.rank if step else group.rank, 2.0**-12, 3.0, 5.0], dtype=dtype
                )
                message = torch.cat([gradient, tail])
                compressor.reduce(phase, message, group)
                total[first:last] += gradient
                applied[first:last] += message[:-TAIL]
                tails.append(message[-TAIL:].clone())
        return {"total": total, "applied": applied, "tails": torch.stack(tails), "residuals": compressor.residuals,
                "bytes": group.bytes_sent}  # fmt: skip

    return together(size, work)


def missing(ranks: list[dict]) -> float:
    """How far the sum of all that was applied and what stays is from the sum of all gradients, relatively."""
    total = sum(rank["total"] for rank in ranks)
    stays = sum(rank["residuals"].get("residual", torch.zeros_like(total)) for rank in ranks)
    return float((ranks[0]["applied"] + stays - total).abs().max() / total.abs().max())


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_over_many_steps_and_ranks_nothing_is_lost(name, dtype, size):
    ranks = reduced(name, size, dtype, steps=12)
    assert missing(ranks) <= (1e-5 if dtype == torch.float32 else 1e-12)
    assert all(torch.equal(rank["applied"], ranks[0]["applied"]) for rank in ranks)
    last = [
        sum(torch.tensor(16_777_215.0 - rank, dtype=dtype) for rank in range(size)),
        size * 2.0**-12,
        3.0 * size,
        5.0 * size,
    ]
    for rank in ranks:
        assert rank["tails"][-1].tolist() == [float(value) for value in last]


@pytest.mark.parametrize("name", METHODS)
def test_without_feedback_it_is_lost(name):
    """Control."""
    ranks = reduced(name, 3, torch.float64, steps=12, error_feedback=False)
    assert all(rank["residuals"] == {} for rank in ranks)
    assert missing(ranks) > 1e-4


# ------------------------------------------------------------------------------------------------------- naive twins
def naive_rows(phase: int, width: int) -> list[tuple[int, int]]:
    """Rows of a phase, counted from each segment's start."""
    return [(start, min(start + width, segment.stop)) for segment in LAYOUT.segments if segment.phase == phase
            for start in range(segment.start, segment.stop, width)]  # fmt: skip


def naive_bf16(corrected: np.ndarray, phase: int) -> np.ndarray:
    return torch.from_numpy(corrected).to(torch.bfloat16).to(torch.float64).numpy()


def naive_int8(corrected: np.ndarray, phase: int) -> np.ndarray:
    sent, first = np.zeros_like(corrected), LAYOUT.phase_range(phase)[0]
    for start, stop in naive_rows(phase, min(1024, LAYOUT.block_size)):
        row = corrected[start - first : stop - first]
        scale = float(np.float32(np.abs(row).max() / 127))
        sent[start - first : stop - first] = np.round(row / scale) * scale
    return sent


def naive_topk(corrected: np.ndarray, phase: int, fraction: float = 0.05) -> np.ndarray:
    sent, first = np.zeros_like(corrected), LAYOUT.phase_range(phase)[0]
    for start, stop in naive_rows(phase, LAYOUT.block_size):
        places = sorted(range(start - first, stop - first), key=lambda place: -abs(corrected[place]))
        for place in places[: max(1, round(fraction * (stop - start)))]:
            sent[place] = corrected[place]
    return sent


@pytest.mark.parametrize(("name", "naive"), [("bf16", naive_bf16), ("int8", naive_int8), ("topk", naive_topk)])
def test_two_ranks_equal_a_naive_twin(name, naive):
    """c = g + e; send C(c); e = c - C(c); the update is made from the sum of C(c)."""
    found = reduced(name, 2, torch.float64, steps=5)[0]["applied"].numpy()
    errors, applied = np.zeros((2, LAYOUT.numel)), np.zeros(LAYOUT.numel)
    for step in range(5):
        for phase in (0, 1):
            first, last = LAYOUT.phase_range(phase)
            for rank in range(2):
                gradient = drawn(1000 * step + 10 * phase + rank, last - first, torch.float64).numpy()
                corrected = gradient + errors[rank, first:last]
                sent = naive(corrected, phase)
                errors[rank, first:last] = corrected - sent
                applied[first:last] += sent
    assert np.abs(found - applied).max() <= 1e-12 * np.abs(applied).max()


@pytest.mark.parametrize("size", [2, 3])
def test_powersgd_equals_the_papers_algorithm(size):
    """Means over ranks and Gram-Schmidt, as Vogels et al. write it."""
    found = reduced("powersgd", size, torch.float64, steps=4)[0]["applied"].numpy()
    start = build_compressor(job("powersgd"), LAYOUT, like(torch.float64)).factors
    factors = {name: factor.numpy().T for name, factor in start.items()}
    assert sorted(factors) == ["a.weight", "b.weight", "d.weight"]
    errors, applied = np.zeros((size, LAYOUT.numel)), np.zeros(LAYOUT.numel)
    for step in range(4):
        for phase in (0, 1):
            first, last = LAYOUT.phase_range(phase)
            for rank in range(size):
                errors[rank, first:last] += drawn(1000 * step + 10 * phase + rank, last - first, torch.float64).numpy()
            for entry in LAYOUT.entries:
                own = slice(entry.offset, entry.offset + entry.numel)
                if entry.phase != phase:
                    continue
                if entry.name not in factors:
                    applied[own] += errors[:, own].sum(0)
                    errors[:, own] = 0.0
                    continue
                matrices = [error[own].reshape(entry.shape[0], -1) for error in errors]
                basis = gram_schmidt(np.mean([m @ factors[entry.name] for m in matrices], axis=0))
                factors[entry.name] = np.mean([m.T @ basis for m in matrices], axis=0)
                applied[own] += size * (basis @ factors[entry.name].T).ravel()
                errors[:, own] = [(m - basis @ (basis.T @ m)).ravel() for m in matrices]
    assert np.abs(found - applied).max() <= 1e-10 * np.abs(applied).max()


def gram_schmidt(columns: np.ndarray) -> np.ndarray:
    basis = []
    for column in columns.T:
        for other in basis:
            column = column - (other @ column) * other
        basis.append(column / np.linalg.norm(column))
    return np.stack(basis, axis=1)


@pytest.mark.parametrize("nesterov", [False, True])
def test_topk_corrects_momentum_as_the_paper_does(nesterov):
    """Equation 4 and momentum factor masking of Lin et al. 2018, element by element."""
    task, momentum = job("topk", 0.9, nesterov), 0.9
    compressor, first = build_compressor(task, LAYOUT, like(torch.float64)), LAYOUT.phase_range(0)[0]
    size = LAYOUT.phase_range(0)[1]
    u, v = np.zeros(size), np.zeros(size)
    for step in range(30):
        gradient = drawn(step, size, torch.float64)
        payloads = compressor.encode(0, gradient.clone(), [(first, first + size)])
        g = gradient.numpy()
        u = momentum * (u + g) if nesterov else momentum * u + g
        v = v + u + g if nesterov else v + u
        sent = naive_topk(v, 0)
        u, v = np.where(sent != 0, 0.0, u), np.where(sent != 0, 0.0, v)
        found = decoded(task, 0, 1, payloads, torch.float64).numpy()
        assert np.abs(found - sent).max() <= 1e-12 * np.abs(sent).max()
    assert np.abs(compressor.residual[:size].numpy() - v).max() <= 1e-9


@pytest.mark.parametrize("nesterov", [False, True])
def test_what_is_never_sent_has_the_momentum_of_sgd(nesterov):
    """Elements that are too small to be chosen add up what torch's SGD would have stepped by."""
    compressor = build_compressor(job("topk", 0.9, nesterov, fraction=1e-9), LAYOUT, like(torch.float64))
    span = LAYOUT.phase_range(0)
    weights = torch.zeros(span[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=1.0, momentum=0.9, nesterov=nesterov)
    never = torch.ones(span[1], dtype=torch.bool)
    for step in range(8):
        weights.grad = drawn(step, span[1], torch.float64)
        optimizer.step()
        (payload,) = compressor.encode(0, weights.grad.clone(), [span])
        never[compressor.codec.positions(span, payload)] = False
    assert int(never.sum()) > 1000
    assert (compressor.residual[: span[1]] + weights.detach())[never].abs().max() <= 1e-12


# --------------------------------------------------------------------------------------------------------------- hosts
@pytest.mark.parametrize("name", METHODS)
def test_on_several_hosts_what_goes_between_them_is_compressed(name):
    """Two hosts of two workers each are two workers with their hosts' sums; leaders keep what is not sent."""
    keys = {"strategy": {"name": "all_reduce", "compression": METHODS[name]}, "batch_size": 12, "steps": 20,
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "clip_norm": 0.5}}  # fmt: skip
    tolerance = 1e-6 if name == "powersgd" else 1e-9  # a basis amplifies the order of sums
    board, barrier = {}, threading.Barrier(2)
    wires = {0: Rank(0, 2, board, barrier), 2: Rank(1, 2, board, barrier)}
    found = hosted.trainers(spec_of(workers=4, **keys), hosts=[[0, 1], [2, 3]], wires=wires)
    hosted.together([lambda t=t: hosted.advance(t) for t in found])
    flat = train(spec_of(workers=2, **keys))
    for trainer in found:
        assert (trainer.strategy.flat.weights - flat.weights).abs().max() <= tolerance
    for leader, alone in zip((found[0], found[2]), flat.strategies, strict=True):
        kept, expected = leader.strategy.compressor.residuals, alone.compressor.residuals
        assert all((kept[key] - expected[key]).abs().max() <= tolerance for key in expected)
    assert not any(found[1].strategy.compressor.residual)


# ------------------------------------------------------------------------------------------------------------- details
@pytest.mark.parametrize(("name", "share"), [("bf16", 0.5), ("int8", 0.25), ("topk", 1.5 * 0.05)])
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_are_what_the_payloads_add_up_to(name, share, size):
    """Of a model large enough for full rows: half, a quarter, 6 bytes of 4 per chosen element."""
    layout = Layout.build([("w", (512, 1024), 0, 0)])
    gradient, task = drawn(0, layout.numel, torch.float32), job(name)

    def work(group: Rank) -> int:
        compressor = build_compressor(task, layout, like(torch.float32))
        compressor.reduce(0, torch.cat([gradient, torch.ones(TAIL)]), group)
        return group.bytes_sent

    sent = together(size, work)
    uncompressed = 2 * (size - 1) / size * 4 * layout.numel
    gathered = (size - 1) * 4 * layout.numel  # topk sends its payload to everyone
    expected = share * (gathered if name == "topk" else uncompressed)
    assert max(sent) == pytest.approx(expected, rel=0.02)
    assert min(sent) == pytest.approx(expected, rel=0.02)


def test_powersgds_bytes_are_its_factors():
    """Both all-reduces: r (a + b) of each matrix, all of the rest, and the tail."""
    ranks = reduced("powersgd", 2, torch.float32, steps=1)
    matrices = [(40, 50), (24, 90), (60, 30)]
    elements = sum(2 * (a + b) for a, b in matrices) + 40 + 24 + 7 + 9 + 2 * TAIL
    assert [rank["bytes"] for rank in ranks] == [4 * elements] * 2


@pytest.mark.parametrize("count", [1, 40, 400])
def test_the_sampled_search_finds_the_largest(count):
    width = SAMPLED_WIDTH
    rows = [drawn(1, width, torch.float32), torch.zeros(width), torch.ones(width),
            torch.arange(width, dtype=torch.float32), torch.sin(torch.arange(width) * 2 * torch.pi / 32)]  # fmt: skip
    rows[1][5:5003] = torch.arange(1.0, 4999.0)  # the sample sees few
    rows.append(torch.where(torch.arange(width) % 32 == 0, 2.0, 0.001) * drawn(2, width, torch.float32))  # many
    for row in rows:
        chosen = largest(-row.view(1, -1), count)[0]
        assert len(set(chosen.tolist())) == count
        assert torch.equal(row[chosen].abs().sort()[0], row.abs().sort()[0][-count:])


@pytest.mark.parametrize("name", ["bf16", "int8", "topk"])
def test_a_large_model_has_full_blocks(name):
    """Of 65,536 elements: places take all 16 bits, and the sampled search is used."""
    layout = Layout.build([("w", (2_200_000,), 0, 0)])
    gradient, task, whole = drawn(3, layout.numel, torch.float32), job(name), (0, layout.numel)
    assert layout.block_size == 65_536
    compressor, sent = build_compressor(task, layout, like(torch.float32)), torch.zeros(layout.numel)
    build_decoder(task, layout, like(torch.float32)).decode(
        whole, compressor.encode(0, gradient.clone(), [whole]), sent
    )
    assert (sent + compressor.residual - gradient).abs().max() <= (0.0 if name in EXACT else 1e-5)
    if name == "topk":
        assert int(sent.count_nonzero()) == sum(round(0.05 * (stop - start)) for start, stop in layout.blocks)
        block = slice(65_536, 131_072)
        assert sent[block].abs()[sent[block] != 0].min() >= compressor.residual[block].abs().max()


def test_nothing_finite_hides_what_is_not():
    for value in (torch.nan, torch.inf, -torch.inf):
        for name in METHODS:
            gradient = drawn(0, LAYOUT.phase_range(0)[1], torch.float32)
            gradient[17] = value
            compressor = build_compressor(job(name), LAYOUT, like(torch.float32))
            payloads = compressor.encode(0, gradient, [LAYOUT.phase_range(0)])
            assert not decoded(job(name), 0, 1, payloads, torch.float32).isfinite().all(), (name, value)


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_of_zeros_is_sent_and_does_not_end_learning(name):
    compressor, span = build_compressor(job(name), LAYOUT, like(torch.float32)), LAYOUT.phase_range(0)
    for gradient in (torch.zeros(span[1]), torch.zeros(span[1]), drawn(0, span[1], torch.float32)):
        payloads = compressor.encode(0, gradient.clone(), [span])
        sent = decoded(job(name), 0, 1, payloads, torch.float32)
        assert sent.isfinite().all()
        assert bool(sent.any()) == bool(gradient.any())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_is_all_that_goes_on(name, momentum):
    first, second = (build_compressor(job(name, momentum), LAYOUT, like(torch.float32)) for _ in range(2))
    span = LAYOUT.phase_range(0)
    for step in range(3):
        first.encode(0, drawn(step, span[1], torch.float32), [span])
    state = first.state()
    assert set(state["sums"]["residual"]) == {entry.name for entry in LAYOUT.entries}
    assert state["sums"]["residual"]["b.weight"].shape == (24, 10, 3, 3)
    second.encode(0, drawn(9, span[1], torch.float32), [span])  # is forgotten
    second.load_state(state)
    sent = [c.encode(0, drawn(5, span[1], torch.float32), [span])[0] for c in (first, second)]
    assert torch.equal(*sent)
    second.load_state({})
    anew = build_compressor(job(name, momentum), LAYOUT, like(torch.float32))
    sent = [c.encode(0, drawn(5, span[1], torch.float32), [span])[0] for c in (second, anew)]
    assert torch.equal(*sent)


def test_another_methods_residual_is_taken_over():
    span = LAYOUT.phase_range(0)
    before = build_compressor(job("topk", 0.9), LAYOUT, like(torch.float32))
    before.encode(0, drawn(0, span[1], torch.float32), [span])
    after = build_compressor(job("powersgd"), LAYOUT, like(torch.float32))
    after.load_state(before.state())
    assert torch.equal(after.residual, before.residual)
    assert before.residual.any()


def test_phases_are_cut_at_blocks_for_any_number_of_ranks():
    for phase in (0, 1):
        first, last = LAYOUT.phase_range(phase)
        starts = {start for start, _ in LAYOUT.blocks} | {last}
        for count in (1, 2, 3, 5, 64):
            ranges = phase_ranges(LAYOUT, phase, count)
            assert len(ranges) == count
            assert (ranges[0][0], ranges[-1][1]) == (first, last)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
            assert all(start in starts for start, _ in ranges)


def test_tiles_cover_a_range_in_whole_rows():
    layout = Layout.build([("w", (300_000,), 0, 0), ("b", (70_001,), 0, 1)])
    for width, span in ((1024, (0, 370_001)), (layout.block_size, layout.shard(1, 3)), (1, layout.shard(0, 2))):
        tiles = tiles_of(layout, span, width, 65_536)
        assert [tile.start for tile in tiles] == [0, *(tile.stop for tile in tiles[:-1])]
        assert tiles[-1].stop == span[1] - span[0]
        assert all(tile.num_rows * tile.width == tile.stop - tile.start <= 65_536 for tile in tiles)
