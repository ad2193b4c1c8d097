"""Running moments against NumPy over all data at once, however the data are cut over updates, merges and workers."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers.vector import NormalizeReward

from distml.exchange.flat import Carried
from distml.rl.normalise import EPSILON, RewardScaler, RunningMoments

SHAPES = [(), (3,), (2, 3)]


def data(rows: int, shape: tuple[int, ...], seed: int = 0, offset: float = 2.0) -> np.ndarray:
    return offset + 3.0 * np.random.default_rng(seed).standard_normal((rows, *shape))


def moments_of(module: RunningMoments) -> tuple[float, np.ndarray, np.ndarray]:
    count, mean, m2 = module.merged()
    return float(count), mean.numpy(), (m2 / count).numpy()


def exchange(workers: list[RunningMoments]) -> None:
    """What a strategy does: every worker's sums become the sums of all, then they are folded in."""
    for name in RunningMoments.sums:
        total = sum(worker.get_buffer(name).clone() for worker in workers)
        for worker in workers:
            worker.get_buffer(name).copy_(total)
    for worker in workers:
        worker.absorb()


def average(workers: list[RunningMoments]) -> None:
    """What would be done with buffers that are not counts."""
    for name, _ in workers[0].named_buffers():
        mean = torch.stack([worker.get_buffer(name) for worker in workers]).mean(0)
        for worker in workers:
            worker.get_buffer(name).copy_(mean)
    for worker in workers:
        worker.absorb()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("absorb_every", [1, 3, 1000])
def test_moments_are_those_of_all_data_at_once(shape, absorb_every):
    rows, module = data(1000, shape), RunningMoments(shape)
    for index, piece in enumerate(np.array_split(rows, [1, 2, 40, 41, 300, 777]), 1):
        module.update(piece)
        if index % absorb_every == 0:
            module.absorb()
    count, mean, variance = moments_of(module)
    assert count == 1000
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(variance, rows.var(0), rtol=1e-12, atol=1e-12)
    module.absorb()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.absorb()  # nothing was seen in between: nothing changes
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("offset", [1e6, -1e6])
def test_a_large_offset_leaves_the_variance_accurate(offset):
    rows, module = data(20_000, (2,), offset=offset) / 3.0, RunningMoments((2,))
    pieces = np.array_split(rows, 100)
    for piece in pieces[:10]:
        module.update(piece)
    first = rows[: sum(map(len, pieces[:10]))]
    np.testing.assert_allclose(moments_of(module)[2], first.var(0), rtol=2e-3)
    module.absorb()  # from here on the sums are about a mean that is near
    for piece in pieces[10:]:
        module.update(piece)
    _, mean, variance = moments_of(module)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, rows.var(0), rtol=2e-4)
    single = rows.astype(np.float32)  # control: squares and squared mean in float32
    assert (np.abs((single**2).mean(0) - single.mean(0) ** 2 - rows.var(0)) > 0.1).all()


@pytest.mark.parametrize("merge", [exchange, average])
def test_unequal_workers_merge_to_the_moments_of_all_their_data(merge):
    workers = [RunningMoments((3,)) for _ in range(3)]
    seen = []
    for merge_number in range(3):
        for rank, worker in enumerate(workers):
            rows = data(5 + 40 * rank, (3,), seed=10 * merge_number + rank, offset=float(rank))
            worker.update(rows)
            seen.append(rows)
        merge(workers)
    together = np.concatenate(seen)
    exact = []
    for worker in workers:
        count, mean, variance = moments_of(worker)
        exact.append(
            count == len(together)
            and np.allclose(mean, together.mean(0), rtol=1e-12, atol=1e-12)
            and np.allclose(variance, together.var(0), rtol=1e-12)
        )
    assert exact == [merge is exchange] * 3  # control: averaged, they are not


@pytest.mark.parametrize("rebased", [True, False])
def test_sums_survive_a_change_of_the_base(rebased):
    """Asynchronous workers: others' rows are folded in while this worker's own are not sent yet."""
    module, others = RunningMoments((3,)), RunningMoments((3,))
    own, theirs = data(50, (3,), seed=1), data(80, (3,), seed=2, offset=-4.0)
    module.update(own)
    others.update(theirs)
    mine = {name: module.get_buffer(name).clone() for name in module.sums}
    before = {name: module.get_buffer(name).clone() for name in ("count", "mean", "m2")}
    for name in module.sums:
        module.get_buffer(name).copy_(others.get_buffer(name))
    module.absorb()
    for name, tensor in mine.items():
        module.get_buffer(name).copy_(tensor)
    if rebased:
        module.rebase(before)
    together = np.concatenate([own, theirs])
    is_exact = np.allclose(moments_of(module)[2], together.var(0), rtol=1e-12)
    assert is_exact == rebased


def test_asynchronous_workers_fold_each_others_sums_in_one_order():
    generator = np.random.default_rng(0)
    workers = [RunningMoments((3,)) for _ in range(3)]
    carried, seen = [Carried(worker) for worker in workers], []
    sent: list[tuple] = []  # in the clock's order: the base that sums are relative to, and the sums
    read = [0, 0, 0]
    for _ in range(60):
        rank = int(generator.integers(3))
        rows = data(int(generator.integers(1, 9)), (3,), seed=len(seen), offset=5.0 * rank)
        workers[rank].update(rows)
        seen.append(rows)
        if generator.random() < 0.5:
            sent.append((carried[rank].base_vector().numpy(), carried[rank].take_sums().numpy()))
        if generator.random() < 0.5:
            carried[rank].fold(None, sent[read[rank] :])
            read[rank] = len(sent)
    for rank in range(3):
        sent.append((carried[rank].base_vector().numpy(), carried[rank].take_sums().numpy()))
    for rank in range(3):
        carried[rank].fold(None, sent[read[rank] :])
    together = np.concatenate(seen)
    for worker in workers:
        assert all(torch.equal(*pair) for pair in zip(worker.buffers(), workers[0].buffers(), strict=True))
        count, mean, variance = moments_of(worker)
        assert count == len(together)
        np.testing.assert_allclose(mean, together.mean(0), rtol=1e-12)
        np.testing.assert_allclose(variance, together.var(0), rtol=1e-12)


def test_what_is_frozen_stays_until_it_is_frozen_anew():
    module, rows = RunningMoments((3,)), data(100, (3,))
    probe = torch.from_numpy(data(4, (3,), seed=5).astype(np.float32))
    torch.testing.assert_close(module.normalise(probe), probe.clamp(-10, 10))  # nothing seen, nothing changed
    module.freeze()
    torch.testing.assert_close(module.normalise(probe), probe.clamp(-10, 10))
    module.update(rows)
    module.absorb()
    torch.testing.assert_close(module.normalise(probe), probe.clamp(-10, 10))  # still inside the rollout
    module.freeze()
    wanted = (probe - torch.from_numpy(rows.mean(0))) / torch.from_numpy(rows.var(0) + EPSILON).sqrt()
    torch.testing.assert_close(module.normalise(probe), wanted.float())
    module.update(rows + 100)
    torch.testing.assert_close(module.normalise(probe), wanted.float())
    with module.newest():
        assert not torch.allclose(module.normalise(probe), wanted.float(), atol=0.1)
    torch.testing.assert_close(module.normalise(probe), wanted.float())


def test_a_checkpoint_keeps_what_was_seen_and_what_is_frozen_follows_from_it():
    module = RunningMoments((3,))
    module.update(data(10, (3,)))
    module.absorb()
    module.update(data(10, (3,), seed=1))
    module.freeze()
    loaded = RunningMoments((3,))
    loaded.load_state_dict(module.state_dict())
    assert set(module.state_dict()) == {"count", "mean", "m2", "new_count", "new_total", "new_squares"}
    for one, other in zip(module.merged(), loaded.merged(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(loaded.frozen_mean, module.frozen_mean)
    assert torch.equal(loaded.frozen_scale, module.frozen_scale)
    assert float(loaded.frozen_mean.abs().min()) > 0  # the control: not as at the start


def test_rows_that_do_not_count_are_not_seen():
    rows, module = data(60, (2,)).reshape(6, 10, 2), RunningMoments((2,))
    mask = np.random.default_rng(0).random((6, 10)) < 0.5
    module.update(rows, mask)
    count, mean, variance = moments_of(module)
    assert count == mask.sum()
    np.testing.assert_allclose(mean, rows[mask].mean(0))
    np.testing.assert_allclose(variance, rows[mask].var(0))
    assert abs(mean - rows.mean((0, 1))).max() > 1e-3  # control: with all rows it is another
    module.update(rows, np.zeros_like(mask))
    assert moments_of(module)[0] == count


def test_normalised_values_are_clipped_float32():
    module = RunningMoments((1,), clip=2.0)
    module.update(np.array([[0.0], [1.0]]))
    module.freeze()
    out = module.normalise(torch.tensor([[-50.0], [0.5], [50.0]], dtype=torch.float64))
    assert out.dtype == torch.float32
    assert out.tolist() == [[-2.0], [0.0], [2.0]]


def test_a_constant_observation_is_zero():
    module = RunningMoments((1,))
    module.update(np.full((10, 1), 7.0))
    module.freeze()
    assert module.normalise(torch.full((1, 1), 7.0)).tolist() == [[0.0]]


# -------------------------------------------------------------------------------------------------------------- rewards
class Rewards(gymnasium.vector.VectorEnv):
    """Gives the rewards [T, E] and ends of a table."""

    def __init__(self, rewards: np.ndarray, done: np.ndarray) -> None:
        self.table, self.done, self.step_index, self.num_envs = rewards, done, 0, rewards.shape[1]
        self.single_action_space = self.action_space = gymnasium.spaces.Discrete(2)
        self.single_observation_space = self.observation_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(self.num_envs), {}

    def step(self, actions):
        row = self.step_index
        self.step_index += 1
        return np.zeros(self.num_envs), self.table[row], self.done[row], np.zeros(self.num_envs, bool), {}


def episodes(steps: int, envs: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    return 5 * generator.standard_normal((steps, envs)) + 2, generator.random((steps, envs)) < 0.1


def returns_by_hand(rewards: np.ndarray, done: np.ndarray, valid: np.ndarray, gamma: float) -> np.ndarray:
    """The discounted return at every row that is valid."""
    seen = []
    for env in range(rewards.shape[1]):
        running = 0.0
        for step in range(len(rewards)):
            if valid[step, env]:
                running = running * gamma + rewards[step, env]
                seen.append(running)
                running = 0.0 if done[step, env] else running
    return np.array(seen)


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return():
    rewards, done = episodes(40, 3)
    valid = np.ones_like(done)
    moments = RunningMoments(())
    scaler = RewardScaler(moments, 0.9, 3)
    for start in range(0, 40, 8):  # returns go on from one rollout to the next
        piece = slice(start, start + 8)
        scaled = scaler.scale(rewards[piece], done[piece], valid[piece])
        seen = returns_by_hand(rewards[: start + 8], done[: start + 8], valid[: start + 8], 0.9)
        np.testing.assert_allclose(scaled, rewards[piece] / np.sqrt(seen.var() + EPSILON), rtol=1e-5)
        assert scaled.dtype == np.float32
    apart = returns_by_hand(rewards, np.ones_like(done), valid, 0.9)
    assert abs(seen.var() / apart.var() - 1) > 0.1  # control: without discounted sums it is another number


def test_the_deviation_comes_near_to_gymnasiums():
    """Gymnasium's own begins with a made-up row and starts a return anew one step later: near, not equal."""
    rewards, done = episodes(2000, 3)
    wrapped = NormalizeReward(Rewards(rewards, done), gamma=0.9, epsilon=EPSILON)
    wrapped.reset()
    theirs = np.stack([wrapped.step(np.zeros(3, int))[1] for _ in range(2000)])
    ours = RewardScaler(RunningMoments(()), 0.9, 3).scale(rewards, done, np.ones_like(done))
    np.testing.assert_allclose(theirs[-1], ours[-1], rtol=0.05)


def test_rows_where_nothing_happened_change_no_return():
    rewards, done = episodes(30, 2)
    valid = np.random.default_rng(1).random((30, 2)) < 0.7
    rewards[~valid], done[~valid] = 1e3, True
    moments = RunningMoments(())
    RewardScaler(moments, 0.9, 2).scale(rewards, done, valid)
    seen = returns_by_hand(rewards, done, valid, 0.9)
    assert float(moments.new_count) == valid.sum() == len(seen)
    np.testing.assert_allclose(moments_of(moments)[2], seen.var(), rtol=1e-12)
    unmasked = RunningMoments(())
    RewardScaler(unmasked, 0.9, 2).scale(rewards, done, np.ones_like(valid))
    assert moments_of(unmasked)[2] > 10 * seen.var()  # control


def test_scaled_rewards_are_clipped():
    moments = RunningMoments((), clip=3.0)
    rewards = np.zeros((100, 1))
    rewards[50] = 1000.0
    scaled = RewardScaler(moments, 0.0, 1).scale(rewards, np.zeros((100, 1), bool), np.ones((100, 1), bool))
    assert scaled.max() == 3.0
