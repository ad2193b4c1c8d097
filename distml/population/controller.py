"""Who proposes architectures: the protocol of all controllers, and the one that learns by REINFORCE.

    propose() ──▶ decisions ──▶ (a child trains, for long) ──▶ learn(decisions, reward)

Rewards come in any order, each with its decisions, so nobody waits for anybody. A controller is a function of its seed
and of the order of calls: repeated, these make the same proposals again. Its k-th proposal draws from a generator that
the seed and k alone determine, so there is no random state to keep.

Shapes: N proposals of a batch, T decisions, O options of all decisions together, H width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from distml.exchange.layout import Array
from distml.population.evolution import Evolution, RandomController
from distml.spec.nas import ControllerSpec, EvolutionSpec, ReinforceControllerSpec
from distml.tasks.data import mix

Choices = tuple[int, ...]
State = tuple[dict[str, Any], dict[str, Array]]  # JSON values, and arrays for a file of tensors


class Controller(Protocol):
    """Proposes vectors of decisions and learns from their rewards."""

    @property
    def baseline(self) -> float | None:
        """What rewards are compared with; None: nothing yet, or nothing at all."""
        ...

    def propose(self) -> Choices:
        """The next vector of decisions."""
        ...

    def log_prob(self, choices: Sequence[int]) -> float | None:
        """The logarithm of the probability with which it would propose these now; None: not known."""
        ...

    def learn(self, choices: Sequence[int], reward: float) -> None:
        """Take note of a reward, which is finite."""
        ...

    def state(self) -> State:
        """All that later proposals depend on, as a copy."""
        ...

    def load(self, values: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Go on from a `state` of a controller with the same settings."""
        ...


def make_controller(spec: ControllerSpec, options: Sequence[int], seed: int) -> Controller:
    """The controller that a spec names.

    Args:
        options: how many options each decision has.
    """
    if isinstance(spec, ReinforceControllerSpec):
        return ReinforceController(spec, options, seed)
    if isinstance(spec, EvolutionSpec):
        return Evolution(spec, options, seed)
    return RandomController(options, seed)


class Policy(nn.Module):
    """An LSTM over the decisions: each sees the one before it, and has a softmax over its own options.

    One table embeds all options of all decisions, one layer has all their logits; each decision has its slice of both.
    """

    def __init__(self, options: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.options = tuple(options)
        self.starts = (0, *accumulate(options))[:-1]
        self.first = nn.Parameter(torch.empty(hidden))
        self.embedding = nn.Embedding(sum(options), hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.logits = nn.Linear(hidden, sum(options))

    def initialise(self, seed: int) -> None:
        """Uniform in ±0.1 (Zoph & Le 2017, section 4.1), from `seed` alone."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-0.1, 0.1, generator=generator)

    def sample(self, generator: torch.Generator) -> Choices:
        """One vector of decisions, one after the other."""
        chosen: list[int] = []
        state: tuple[Tensor, Tensor] | None = None
        with torch.no_grad():
            inputs = self.first.view(1, 1, -1)
            for step in range(len(self.options)):
                outputs, state = self.lstm(inputs, state)
                probabilities = self._slice(self.logits(outputs[0, 0]), step).softmax(-1)
                chosen.append(int(torch.multinomial(probabilities, 1, generator=generator)))
                inputs = self.embedding.weight[self.starts[step] + chosen[-1]].view(1, 1, -1)
        return tuple(chosen)

    def forward(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities, entropies) of vectors of decisions, each [N].

        Args:
            choices: int64 [N, T].
        """
        embedded = self.embedding(choices[:, :-1] + torch.tensor(self.starts[:-1], dtype=torch.int64))
        inputs = torch.cat([self.first.expand(len(choices), 1, -1), embedded], 1)  # [N, T, H]
        logits = self.logits(self.lstm(inputs)[0])  # [N, T, O]
        log_prob, entropy = torch.zeros(len(choices)), torch.zeros(len(choices))
        for step in range(len(self.options)):
            logs = self._slice(logits[:, step], step).log_softmax(-1)
            log_prob = log_prob + logs.gather(1, choices[:, step : step + 1]).squeeze(1)
            entropy = entropy - (logs.exp() * logs).sum(-1)
        return log_prob, entropy

    def _slice(self, logits: Tensor, step: int) -> Tensor:
        return logits[..., self.starts[step] : self.starts[step] + self.options[step]]


class ReinforceController:
    """REINFORCE with a moving baseline (Williams 1992; Zoph & Le 2017, equation 3), an entropy bonus and Adam.

    An update takes `spec.batch` rewards, whatever weights their decisions were proposed with: the policy gradient is
    taken at the weights of now, as by the parameter servers of Zoph & Le.
    """

    def __init__(self, spec: ReinforceControllerSpec, options: Sequence[int], seed: int) -> None:
        self.spec, self.seed = spec, seed
        self.policy = Policy(options, spec.hidden)
        self.policy.initialise(seed)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=spec.lr)
        self.baseline: float | None = None
        self.num_proposed = 0
        self.waiting: list[tuple[Choices, float]] = []

    def propose(self) -> Choices:
        generator = torch.Generator().manual_seed(mix(self.seed, self.num_proposed))
        self.num_proposed += 1
        return self.policy.sample(generator)

    def log_prob(self, choices: Sequence[int]) -> float | None:
        with torch.no_grad():
            return float(self.policy(torch.tensor([list(choices)]))[0])

    def learn(self, choices: Sequence[int], reward: float) -> None:
        self.waiting.append((tuple(choices), reward))
        if len(self.waiting) >= self.spec.batch:
            self._update()

    def loss(self, choices: Tensor, advantages: Tensor) -> Tensor:
        """-mean(advantage · log π + weight · entropy), whose gradient is minus that of the expected reward.

        Args:
            choices: int64 [N, T]; advantages: float32 [N], reward minus baseline.
        """
        log_prob, entropy = self.policy(choices)
        gained: Tensor = advantages * log_prob + self.spec.entropy * entropy
        return -gained.mean()

    def _update(self) -> None:
        choices = torch.tensor([list(chosen) for chosen, _ in self.waiting])
        rewards = [reward for _, reward in self.waiting]
        self.waiting = []
        if self.baseline is None:
            self.baseline = sum(rewards) / len(rewards)
        advantages = torch.tensor(rewards, dtype=torch.float64) - self.baseline
        self.optimizer.zero_grad()
        self.loss(choices, advantages.float()).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        for reward in rewards:
            self.baseline = self.spec.baseline_decay * self.baseline + (1 - self.spec.baseline_decay) * reward

    def state(self) -> State:
        values = {"proposed": self.num_proposed, "baseline": self.baseline,
                  "waiting": [[list(chosen), reward] for chosen, reward in self.waiting]}  # fmt: skip
        arrays = {name: tensor.detach().numpy().copy() for name, tensor in self.policy.named_parameters()}
        for (name, _), moments in zip(self.policy.named_parameters(), self._moments(), strict=True):
            arrays |= {f"{name}/{kind}": tensor.numpy().copy() for kind, tensor in moments.items()}
        return values, arrays

    def load(self, values: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        self.num_proposed, self.baseline = int(values["proposed"]), values["baseline"]
        self.waiting = [(tuple(chosen), reward) for chosen, reward in values["waiting"]]
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for index, (name, parameter) in enumerate(self.policy.named_parameters()):
                parameter.copy_(torch.from_numpy(np.array(arrays[name])))
                kinds = [key.removeprefix(f"{name}/") for key in arrays if key.startswith(f"{name}/")]
                if kinds:
                    moments[index] = {kind: torch.from_numpy(np.array(arrays[f"{name}/{kind}"])) for kind in kinds}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

    def _moments(self) -> list[dict[str, Tensor]]:
        """Adam's, per parameter; empty before the first update."""
        return [dict(self.optimizer.state.get(parameter, {})) for parameter in self.policy.parameters()]
