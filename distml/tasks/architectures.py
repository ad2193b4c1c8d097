"""The architectures that a search builds: NASNet's cells and EfficientNet's rows, in plain PyTorch.

Shapes: B examples, C channels of the image, H x W its size, F filters of a cell, K classes. Images are [B, C, H, W], or
[B, H, W] where they have one channel. Every operation pads so that stride s makes ceil(H / s) of H: any image works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distml.spec.architectures import CellBlockSpec, NasNetOperation, NasNetSpec, StageOperation, StageSpec, StagesSpec
from distml.tasks.models import with_channels

NUM_REDUCTIONS = 2
EXPANSION: dict[StageOperation, int] = {"separable": 1, "mbconv_3": 3, "mbconv_6": 6}


# --------------------------------------------------------------------------------------------------------------- NASNet
def relu_conv_norm(
    before: int, after: int, kernel: tuple[int, int], stride: int = 1, dilation: int = 1
) -> list[nn.Module]:
    """ReLU, convolution, batch norm: the order of Zoph et al. 2018, appendix A.4."""
    padding = (dilation * (kernel[0] // 2), dilation * (kernel[1] // 2))
    conv = nn.Conv2d(before, after, kernel, stride, padding, dilation, bias=False)
    return [nn.ReLU(), conv, nn.BatchNorm2d(after)]


def separable(filters: int, kernel: int, stride: int) -> list[nn.Module]:
    """Depthwise-separable convolution, applied twice; the first one has the stride."""
    layers: list[nn.Module] = []
    for step in (stride, 1):
        depthwise = nn.Conv2d(filters, filters, kernel, step, kernel // 2, groups=filters, bias=False)
        layers += [nn.ReLU(), depthwise, nn.Conv2d(filters, filters, 1, bias=False), nn.BatchNorm2d(filters)]
    return layers


def twice(filters: int, width: int, stride: int) -> list[nn.Module]:
    """1 x width, then width x 1: between them they have the stride once in each direction."""
    padding = width // 2
    across = nn.Conv2d(filters, filters, (1, width), (1, stride), (0, padding), bias=False)
    down = nn.Conv2d(filters, filters, (width, 1), (stride, 1), (padding, 0), bias=False)
    return [nn.ReLU(), across, nn.BatchNorm2d(filters), nn.ReLU(), down, nn.BatchNorm2d(filters)]


def identity(filters: int, stride: int) -> list[nn.Module]:
    """Nothing; with a stride a 1 x 1 convolution."""
    return [] if stride == 1 else relu_conv_norm(filters, filters, (1, 1), stride)


# The number of filters and the stride -> layers [B, F, H, W] -> [B, F, ceil(H / stride), ceil(W / stride)].
NASNET_OPERATIONS: dict[NasNetOperation, Callable[[int, int], list[nn.Module]]] = {
    "identity": identity,
    "conv_1x3_3x1": lambda filters, stride: twice(filters, 3, stride),
    "conv_1x7_7x1": lambda filters, stride: twice(filters, 7, stride),
    "dilated_3x3": lambda filters, stride: relu_conv_norm(filters, filters, (3, 3), stride, dilation=2),
    "average_3x3": lambda filters, stride: [nn.AvgPool2d(3, stride, 1, count_include_pad=False)],
    "max_3x3": lambda filters, stride: [nn.MaxPool2d(3, stride, 1)],
    "max_5x5": lambda filters, stride: [nn.MaxPool2d(5, stride, 2)],
    "max_7x7": lambda filters, stride: [nn.MaxPool2d(7, stride, 3)],
    "conv_1x1": lambda filters, stride: relu_conv_norm(filters, filters, (1, 1), stride),
    "conv_3x3": lambda filters, stride: relu_conv_norm(filters, filters, (3, 3), stride),
    "separable_3x3": lambda filters, stride: separable(filters, 3, stride),
    "separable_5x5": lambda filters, stride: separable(filters, 5, stride),
    "separable_7x7": lambda filters, stride: separable(filters, 7, stride),
}


class CellBlock(nn.Module):
    """Two operations on two inputs, added or concatenated: 2 x [B, F, ...] -> [B, F, H, W].

    After a concatenation a 1 x 1 convolution brings 2 F filters back to F, so that whatever takes the result has as
    many ("1 x 1 convolutions are inserted", appendix A.4).
    """

    def __init__(self, spec: CellBlockSpec, filters: int, reduces: bool) -> None:
        super().__init__()
        self.sources = spec.inputs
        # Only the two previous cells' outputs are still large: blocks come after the stride.
        strides = [2 if reduces and source < 2 else 1 for source in spec.inputs]
        self.operations = nn.ModuleList(
            nn.Sequential(*NASNET_OPERATIONS[name](filters, stride))
            for name, stride in zip(spec.operations, strides, strict=True)
        )
        adds = spec.combine == "add"
        self.merge = None if adds else nn.Sequential(*relu_conv_norm(2 * filters, filters, (1, 1)))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """The block's output, from all states of the cell so far."""
        one, other = (
            operation(states[source]) for operation, source in zip(self.operations, self.sources, strict=True)
        )
        added: Tensor = one + other if self.merge is None else self.merge(torch.cat([one, other], 1))
        return added


class Cell(nn.Module):
    """Blocks on top of two cells' outputs: [B, C0, ...], [B, C1, ...] -> [B, F x unused blocks, H, W]."""

    def __init__(
        self, blocks: Sequence[CellBlockSpec], previous: int, older: int, filters: int, reduces: bool, shrinks: bool
    ) -> None:
        """previous, older: channels of the two inputs; shrinks: the older one is twice as large as the previous."""
        super().__init__()
        pool: list[nn.Module] = [nn.AvgPool2d(2, 2, ceil_mode=True)] if shrinks else []
        self.previous = nn.Sequential(*relu_conv_norm(previous, filters, (1, 1)))
        self.older = nn.Sequential(*pool, *relu_conv_norm(older, filters, (1, 1)))
        self.blocks = nn.ModuleList(CellBlock(block, filters, reduces) for block in blocks)
        used = {source - 2 for block in blocks for source in block.inputs}
        self.unused = [index for index in range(len(blocks)) if index not in used]
        self.channels = filters * len(self.unused)

    def forward(self, previous: Tensor, older: Tensor) -> Tensor:
        """The outputs of all blocks that no other block takes, concatenated."""
        states = [self.previous(previous), self.older(older)]
        for block in self.blocks:
            states.append(block(states))
        return torch.cat([states[2 + index] for index in self.unused], 1)


class NasNet(nn.Module):
    """Stem, then N normal cells, a reduction, N normal cells, a reduction, N normal cells: [B, C, H, W] -> [B, K]."""

    def __init__(self, spec: NasNetSpec, image: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        stem = 3 * spec.filters
        self.stem = nn.Sequential(nn.Conv2d(image[0], stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem))
        previous = older = stem
        filters, shrinks = spec.filters, False
        cells: list[Cell] = []
        for stage in range(NUM_REDUCTIONS + 1):
            kinds = [spec.normal] * spec.repeats
            if stage:
                filters *= 2
                kinds = [spec.reduction, *kinds]
            for index, blocks in enumerate(kinds):
                reduces = bool(stage) and index == 0
                cells.append(Cell(blocks, previous, older, filters, reduces, shrinks))
                previous, older, shrinks = cells[-1].channels, previous, reduces
        self.cells = nn.ModuleList(cells)
        self.head = nn.Linear(previous, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K]."""
        previous = older = self.stem(with_channels(images))
        for cell in self.cells:
            previous, older = cell(previous, older), previous
        logits: Tensor = self.head(F.relu(previous).mean((2, 3)))
        return logits


# --------------------------------------------------------------------------------------------------------------- stages
def conv_norm(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution and batch norm."""
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after)]


class SqueezeExcitation(nn.Module):
    """Each channel times a gate that all channels' means decide (Hu et al. 2018): [B, F, H, W] -> the same."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(channels, width, 1), nn.SiLU(), nn.Conv2d(width, channels, 1), nn.Sigmoid())

    def forward(self, inputs: Tensor) -> Tensor:
        """Gated inputs."""
        gated: Tensor = inputs * self.gate(inputs.mean((2, 3), keepdim=True))
        return gated


class StageLayer(nn.Module):
    """One layer of a row: [B, before, H, W] -> [B, after, ceil(H / stride), ceil(W / stride)].

    conv is a convolution; the others expand, convolve depthwise and project (MBConv; separable does not expand).
    """

    def __init__(self, spec: StageSpec, before: int, stride: int) -> None:
        super().__init__()
        after = spec.channels
        gate = max(1, int(before * spec.squeeze_excitation)) if spec.squeeze_excitation else None
        layers: list[nn.Module]
        if spec.operation == "conv":
            layers = [*conv_norm(before, after, spec.kernel, stride), nn.SiLU()]
            layers += [SqueezeExcitation(after, gate)] if gate else []
        else:
            wide = before * EXPANSION[spec.operation]
            layers = [*conv_norm(before, wide, 1), nn.SiLU()] if wide != before else []
            layers += [*conv_norm(wide, wide, spec.kernel, stride, groups=wide), nn.SiLU()]
            layers += [SqueezeExcitation(wide, gate)] if gate else []
            layers += conv_norm(wide, after, 1)
        self.layers = nn.Sequential(*layers)
        self.skip: nn.Module | None = None
        if spec.skip == "identity" and before == after and stride == 1:
            self.skip = nn.Identity()
        if spec.skip == "pool" and before == after:
            self.skip = nn.AvgPool2d(3, stride, 1, count_include_pad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output, with what goes around it added."""
        outputs: Tensor = self.layers(inputs)
        return outputs if self.skip is None else outputs + self.skip(inputs)


class Stages(nn.Module):
    """Stem, seven rows of equal layers, head: [B, C, H, W] -> [B, K]."""

    def __init__(self, spec: StagesSpec, image: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [*conv_norm(image[0], spec.stem, 3, spec.stem_stride), nn.SiLU()]
        before = spec.stem
        for row in spec.rows:
            for index in range(row.layers):
                layers.append(StageLayer(row, before, row.stride if index == 0 else 1))
                before = row.channels
        self.layers = nn.Sequential(*layers, *conv_norm(before, spec.head, 1), nn.SiLU())
        self.head = nn.Sequential(nn.Dropout(spec.dropout), nn.Linear(spec.head, outputs))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K]."""
        logits: Tensor = self.head(self.layers(with_channels(images)).mean((2, 3)))
        return logits
