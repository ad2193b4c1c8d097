"""What policies are built of: encodings of observations, layers, a memory over time, and the two heads.

Shapes: T time, E environments, B rows, O observation, D encoded inputs, F features, P distribution parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from distml.errors import UsageError
from distml.rl.distributions import Distribution, Gaussian

Array = NDArray[Any]
State = tuple[Tensor, ...]
Activation = Literal["tanh", "relu"]

TORCH_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}
SUPPORTED = "Box, Discrete, MultiDiscrete and MultiBinary"
WAY_OUT = "add the wrapper FlattenObservation (environment.wrappers), or write an own policy ('module:Class')"


# ------------------------------------------------------------------------------------------------------------ encodings
class VectorEncoding:
    """Numbers end to end: [B, *O] -> [B, D] float32."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.size = math.prod(shape)

    def tensor(self, observations: Tensor) -> Tensor:
        return observations.reshape(len(observations), self.size).float()

    def array(self, observations: Array) -> Array:
        return observations.reshape(len(observations), self.size).astype(np.float32, copy=False)


class OneHotEncoding:
    """One-hot vectors of K class numbers, end to end: [B, *O] -> [B, D] float32.

    Args:
        classes: the number of classes of each of the K numbers.
        start: what the space calls class 0 of each.
    """

    def __init__(self, classes: Array, start: Array) -> None:
        counts = classes.reshape(-1)
        self.size = int(counts.sum())
        self.offsets = np.cumsum(counts) - counts - start.reshape(-1)

    def tensor(self, observations: Tensor) -> Tensor:
        places = observations.reshape(len(observations), -1) + torch.from_numpy(self.offsets).to(observations.device)
        return places.new_zeros((len(places), self.size), dtype=torch.float32).scatter(1, places, 1.0)

    def array(self, observations: Array) -> Array:
        places = observations.reshape(len(observations), -1) + self.offsets
        encoded = np.zeros((len(places), self.size), np.float32)
        np.put_along_axis(encoded, places, 1.0, axis=1)
        return encoded


VectorLike = VectorEncoding | OneHotEncoding


def build_vector_encoding(space: spaces.Space[Any]) -> VectorLike:
    """The encoding of a space's observations as vectors.

    Raises:
        UsageError: there is none.
    """
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return VectorEncoding(space.shape)
    if isinstance(space, spaces.Discrete):
        return OneHotEncoding(np.array([space.n]), np.array([space.start]))
    if isinstance(space, spaces.MultiDiscrete):
        return OneHotEncoding(space.nvec, space.start)
    raise UsageError(f"observations of {space} are not supported, {SUPPORTED} are; {WAY_OUT}")


class ImageEncoding:
    """Images as [B, C, H, W] float32: uint8 divided by 255, floating ones as they are.

    Args:
        space: a Box of [C, H, W], [H, W, C] (the channels are the smaller end) or [H, W].

    Raises:
        UsageError: it is not that.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        kind = space.dtype if isinstance(space, spaces.Box) else None
        if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
            raise UsageError(f"policy cnn needs images, a Box of [C, H, W], [H, W, C] or [H, W], not {space}; take mlp")
        if kind != np.uint8 and not np.issubdtype(space.dtype, np.floating):
            raise UsageError(f"policy cnn needs images of uint8 or floats, not {space}; take mlp, or wrap it")
        self.is_bytes, self.is_flat = kind == np.uint8, len(space.shape) == 2
        self.channels_last = not self.is_flat and space.shape[-1] < space.shape[0]
        channels, *image = np.roll(space.shape, 1) if self.channels_last else (1,) * self.is_flat + space.shape
        self.channels, self.image = int(channels), (int(image[0]), int(image[1]))

    def tensor(self, observations: Tensor) -> Tensor:
        images = observations.unsqueeze(1) if self.is_flat else observations
        images = images.permute(0, 3, 1, 2) if self.channels_last else images
        return images.float() / 255.0 if self.is_bytes else images.float()


# --------------------------------------------------------------------------------------------------------------- layers
class Dense(nn.Module):
    """Fully connected layers, each followed by the activation: [..., D] -> [..., F]; none: F = D, as it is."""

    def __init__(self, inputs: int, hidden: Sequence[int], activation: Activation) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        self.size, self.activation = widths[-1], activation
        self.layers = nn.ModuleList(orthogonal(nn.Linear(*pair), math.sqrt(2.0)) for pair in pairwise(widths))

    def forward(self, inputs: Tensor) -> Tensor:
        """Features [..., F]."""
        activate = TORCH_ACTIVATIONS[self.activation]
        for layer in self.layers:
            inputs = activate(layer(inputs))
        return inputs


class Convolutions(nn.Module):
    """Convolutions and one hidden layer with ReLU (Mnih et al. 2015): [B, C, H, W] -> [B, F].

    Raises:
        UsageError: a kernel is larger than the image that reaches it.
    """

    def __init__(
        self, encoding: ImageEncoding, channels: Sequence[int], kernels: Sequence[int], strides: Sequence[int],
        hidden: int,
    ) -> None:  # fmt: skip
        super().__init__()
        height, width = encoding.image
        before, layers = encoding.channels, []
        for index, (after, kernel, stride) in enumerate(zip(channels, kernels, strides, strict=True), 1):
            if kernel > min(height, width):
                raise UsageError(
                    f"policy cnn: layer {index}'s kernel {kernel} is larger than what reaches it, {height} x {width} "
                    f"(images are {encoding.image[0]} x {encoding.image[1]}); take smaller kernels or strides"
                )
            layers.append(orthogonal(nn.Conv2d(before, after, kernel, stride), math.sqrt(2.0)))
            before, height, width = after, (height - kernel) // stride + 1, (width - kernel) // stride + 1
        self.size = hidden
        self.layers = nn.ModuleList(layers)
        self.hidden = orthogonal(nn.Linear(before * height * width, hidden), math.sqrt(2.0))

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, F]."""
        for layer in self.layers:
            images = layer(images).relu()
        features: Tensor = self.hidden(images.flatten(1)).relu()
        return features


class Memory(nn.Module):
    """Fully connected layers and a recurrent cell over time, whose state is zero at an episode's start."""

    def __init__(
        self, inputs: int, hidden: Sequence[int], activation: Activation, cell: Literal["lstm", "gru"], units: int
    ) -> None:
        super().__init__()
        self.encoder = Dense(inputs, hidden, activation)
        self.cell = nn.LSTM(self.encoder.size, units) if cell == "lstm" else nn.GRU(self.encoder.size, units)
        for name, parameter in self.cell.named_parameters():
            nn.init.orthogonal_(parameter) if name.startswith("weight") else nn.init.zeros_(parameter)
        self.size, self.num_states = units, 2 if cell == "lstm" else 1

    def initial_state(self, num_envs: int) -> State:
        """Zeros [E, F], one or two of them."""
        zeros = next(self.parameters()).new_zeros(num_envs, self.size)
        return (zeros,) * self.num_states

    def forward(self, inputs: Tensor, state: State, resets: Tensor) -> tuple[Tensor, State]:
        """Features [T, E, F] of inputs [T, E, D] and the state after them.

        Between two steps at which some environment resets, time passes in one call of the cell.
        """
        encoded = self.encoder(inputs)
        starts = [step for step, any_reset in enumerate(resets.any(1).tolist()) if any_reset and step > 0]
        pieces = []
        for start, stop in pairwise([0, *starts, len(encoded)]):
            reset = resets[start].unsqueeze(-1)
            state = tuple(part.masked_fill(reset, 0.0) for part in state)
            features, state = self._run(encoded[start:stop], state)
            pieces.append(features)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces), state

    def _run(self, encoded: Tensor, state: State) -> tuple[Tensor, State]:
        inner = tuple(part.unsqueeze(0) for part in state)
        features, after = self.cell(encoded, inner if self.num_states == 2 else inner[0])
        return features, tuple(part[0] for part in (after if self.num_states == 2 else (after,)))


# ---------------------------------------------------------------------------------------------------------------- heads
class ActionBranch(nn.Module):
    """From what its body makes of its inputs to the parameters of a distribution.

    A Gaussian's deviations do not depend on the observation: their logarithms are a parameter.
    """

    def __init__(self, body: nn.Module, size: int, distribution: Distribution, log_std: float) -> None:
        super().__init__()
        self.body = body
        self.log_std: nn.Parameter | None = None
        outputs = distribution.num_parameters
        if isinstance(distribution, Gaussian):
            outputs = distribution.size
            self.log_std = nn.Parameter(torch.full((outputs,), float(log_std)))
        self.output = orthogonal(nn.Linear(size, outputs), 0.01)

    def head(self, features: Tensor) -> Tensor:
        """Parameters [..., P] of the body's features [..., F]."""
        outputs: Tensor = self.output(features)
        if self.log_std is None:
            return outputs
        return torch.cat((outputs, self.log_std.expand_as(outputs)), -1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Parameters [..., P]."""
        return self.head(self.body(inputs))


class ValueBranch(nn.Module):
    """From what its body makes of its inputs to a value."""

    def __init__(self, body: nn.Module, size: int) -> None:
        super().__init__()
        self.body = body
        self.output = orthogonal(nn.Linear(size, 1), 1.0)

    def head(self, features: Tensor) -> Tensor:
        """Values [...] of the body's features [..., F]."""
        values: Tensor = self.output(features)
        return values.squeeze(-1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Values [...]."""
        return self.head(self.body(inputs))


def orthogonal(layer: Any, gain: float) -> Any:
    """The layer with orthogonal weights (Saxe et al. 2014) and zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
