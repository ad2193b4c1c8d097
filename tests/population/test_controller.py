"""Controllers: REINFORCE's gradient against enumeration, that it finds what chance does not, ageing, exact resumes."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from distml.population.controller import Policy, ReinforceController, make_controller
from distml.population.evolution import Evolution, RandomController
from distml.population.tabulated import make_table, tabulated
from distml.spec.nas import EvolutionSpec, RandomControllerSpec, ReinforceControllerSpec

REINFORCE = ReinforceControllerSpec(name="reinforce", hidden=8, lr=0.01)
SPECS = {"reinforce": REINFORCE, "evolution": EvolutionSpec(name="evolution", population=6, sample=3),
         "random": RandomControllerSpec(name="random")}  # fmt: skip
TWO = (2, 3)  # two choices
ALL = torch.tensor(list(itertools.product(range(2), range(3))))
REWARDS = torch.tensor([0.1, 0.9, 0.3, -0.5, 0.4, 0.7])


def gradients(policy: Policy, value: torch.Tensor) -> list[torch.Tensor]:
    """Zeros where a parameter has no part in it, as the last decision's embedding."""
    found = torch.autograd.grad(value, list(policy.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(policy.parameters(), found, strict=True)]


@pytest.mark.parametrize("baseline", [0.0, 0.6])
@pytest.mark.parametrize("weight", [0.0, 0.05])
def test_the_expected_gradient_is_that_of_the_enumerated_expected_reward(baseline, weight):
    controller = ReinforceController(REINFORCE.model_copy(update={"entropy": weight}), TWO, seed=3)
    policy = controller.policy
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(8.0)  # far from uniform
    log_prob, entropy = policy(ALL)
    probability = log_prob.exp()
    assert float(probability.detach().sum()) == pytest.approx(1.0, abs=1e-6)
    bonus = (probability.detach() * entropy).sum()  # of the decisions as they are met
    enumerated = gradients(policy, (probability * REWARDS).sum() + weight * bonus)
    expected = [torch.zeros_like(p) for p in policy.parameters()]
    for choices, reward, share in zip(ALL, REWARDS, probability.tolist(), strict=True):
        loss = controller.loss(choices[None], (reward - baseline)[None])
        for total, one in zip(expected, gradients(policy, -loss), strict=True):
            total += share * one
    for one, other in zip(expected, enumerated, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert max(float(g.abs().max()) for g in enumerated) > 1e-3


def test_a_sampled_batch_estimates_that_gradient():
    controller = ReinforceController(REINFORCE.model_copy(update={"entropy": 0.0}), TWO, seed=3)
    policy = controller.policy
    enumerated = gradients(policy, (policy(ALL)[0].exp() * REWARDS).sum())
    sampled = torch.tensor([controller.propose() for _ in range(4000)])
    rewards = REWARDS[sampled[:, 0] * 3 + sampled[:, 1]]
    estimated = gradients(policy, -controller.loss(sampled, rewards - 0.3))
    flat, other = (torch.cat([g.reshape(-1) for g in found]) for found in (estimated, enumerated))
    assert float(torch.nn.functional.cosine_similarity(flat, other, dim=0)) > 0.98


def test_proposals_follow_the_probabilities_and_log_prob_is_theirs():
    controller = ReinforceController(REINFORCE, TWO, seed=2)
    with torch.no_grad():
        for parameter in controller.policy.parameters():
            parameter.mul_(25.0)
        controller.policy.logits.bias.zero_()
        joint = controller.policy(ALL)[0].exp().reshape(2, 3)
    after = joint / joint.sum(1, keepdim=True)
    assert float((after[0] - after[1]).abs().max()) > 0.2  # what comes second depends on what came first
    counted = Counter(controller.propose() for _ in range(3000))
    for choices in map(tuple, ALL.tolist()):
        probability = float(np.exp(controller.log_prob(choices)))
        assert counted[choices] / 3000 == pytest.approx(probability, abs=0.03)


def test_entropy_is_that_of_each_decision_given_those_before_it():
    policy = Policy(TWO, 4)
    policy.initialise(1)
    log_prob, entropy = policy(ALL)
    first = torch.stack([log_prob[:3].exp().sum(), log_prob[3:].exp().sum()])
    second = log_prob[3:].exp() / first[1]
    expected = -(first * first.log()).sum() - (second * second.log()).sum()
    torch.testing.assert_close(entropy[3], expected)


def test_the_bonus_alone_makes_proposals_uniform():
    controller = ReinforceController(REINFORCE.model_copy(update={"entropy": 1.0, "lr": 0.05}), TWO, seed=0)
    with torch.no_grad():
        controller.policy.logits.bias.copy_(torch.tensor([0.0, 2.0, 0.0, 2.0, 0.0]))
    before = float(controller.policy(ALL)[1].detach().mean())
    for _ in range(200):
        controller.learn(controller.propose(), 0.5)
    assert float(controller.policy(ALL)[1].detach().mean()) > before + 0.1
    assert float(controller.policy(ALL)[1].detach().mean()) == pytest.approx(np.log(2) + np.log(3), abs=0.05)


def test_the_baseline_is_a_moving_average_and_updates_take_batches():
    controller = ReinforceController(REINFORCE.model_copy(update={"batch": 2, "baseline_decay": 0.5}), TWO, seed=0)
    before = [parameter.detach().clone() for parameter in controller.policy.parameters()]
    controller.learn((0, 1), 1.0)
    assert controller.baseline is None
    assert all(torch.equal(a, b) for a, b in zip(before, controller.policy.parameters(), strict=True))
    controller.learn((1, 1), 2.0)
    assert controller.baseline == pytest.approx(0.5 * (0.5 * 1.5 + 0.5 * 1.0) + 0.5 * 2.0)
    assert not all(torch.equal(a, b) for a, b in zip(before, controller.policy.parameters(), strict=True))


OPTIONS = (4, 4, 4, 4, 4, 4)


def test_on_a_known_table_reinforce_finds_what_chance_does_not():
    """4,096 architectures and 300 proposals: chance meets the best one once in 14 searches."""
    spec = ReinforceControllerSpec(name="reinforce", hidden=24)
    found = {}
    for controller in (spec, SPECS["random"]):
        searches = [tabulated(controller, make_table(OPTIONS, seed), 300, seed) for seed in range(5)]
        found[controller.name] = sum(search.found_at is not None for search in searches)
        for search in searches:
            assert search.found_at is None or search.rewards[search.found_at - 1] == search.best == 1.0
    assert found["reinforce"] >= found["random"] + 3


@pytest.mark.parametrize("name", SPECS)
def test_a_search_is_a_function_of_its_seed(name):
    table = make_table((3, 3, 2), 0)
    searches = [tabulated(SPECS[name], table, 30, seed).rewards for seed in (1, 1, 2)]
    assert searches[0] == searches[1]
    assert searches[0] != searches[2]


@pytest.mark.parametrize("name", SPECS)
def test_a_restored_controller_goes_on_as_the_one_that_went_on(name):
    table = make_table((3, 2, 4), 0)

    def search(controller, proposals):
        found = []
        for _ in range(proposals):
            found.append(controller.propose())
            controller.learn(found[-1], table[found[-1]])
        return found

    whole = make_controller(SPECS[name], (3, 2, 4), seed=5)
    search(whole, 13)  # not a multiple of the batch
    values, arrays = whole.state()
    rest = search(whole, 12)
    other = make_controller(SPECS[name], (3, 2, 4), seed=5)
    other.load(values, arrays)
    assert search(other, 12) == rest
    assert (other.baseline, other.num_proposed) == (whole.baseline, whole.num_proposed)
    fresh = make_controller(SPECS[name], (3, 2, 4), seed=5)
    assert search(fresh, 12) != rest


@pytest.mark.parametrize("name", SPECS)
def test_rewards_may_come_in_any_order(name):
    controller = make_controller(SPECS[name], (2, 3, 2), seed=0)
    proposals = [controller.propose() for _ in range(8)]
    for choices in reversed(proposals):
        controller.learn(choices, sum(choices) / 5)
    assert all(0 <= choice < count for choice, count in zip(controller.propose(), (2, 3, 2), strict=True))


def test_the_oldest_dies_however_good_it_is():
    evolution = Evolution(EvolutionSpec(name="evolution", population=3, sample=3), (5, 5), seed=0)
    evolution.learn((4, 4), 9.0)
    for index in range(2):
        evolution.learn((0, index), 1.0)
    assert (4, 4) in [one for one, _ in evolution.alive]
    evolution.learn((1, 1), 0.0)
    assert [one for one, _ in evolution.alive] == [(0, 0), (0, 1), (1, 1)]


def test_a_child_is_the_best_of_a_sample_with_one_decision_changed():
    evolution = Evolution(EvolutionSpec(name="evolution", population=4, sample=4), (5, 1, 5), seed=0)
    assert {len(evolution.propose()) for _ in range(4)} == {3}
    evolution.learn((2, 0, 3), 0.9)
    for index in range(3):
        evolution.learn((0, 0, index), 0.1 * index)
    children = [evolution.propose() for _ in range(50)]
    assert all(sum(a != b for a, b in zip(child, (2, 0, 3), strict=True)) == 1 for child in children)
    assert {child[0] for child in children} == set(range(5))  # each option but the parent's own, and that of others
    weak = Evolution(EvolutionSpec(name="evolution", population=4, sample=1), (5, 1, 5), seed=0)
    for index in range(4):
        weak.learn((index, 0, 4), float(index))
        weak.propose()
    assert len({child[0] for child in (weak.propose() for _ in range(50))}) == 5  # a sample of one has no preference


def test_chance_is_uniform():
    controller = RandomController((2, 3), seed=0)
    counted = Counter(controller.propose() for _ in range(3000))
    assert all(counted[choices] / 3000 == pytest.approx(1 / 6, abs=0.03) for choices in map(tuple, ALL.tolist()))
    assert controller.log_prob((0, 0)) is None
