"""Architectures that a search may build: NASNet's two cells and the rows of EfficientNet. No torch.

    model: {name: nasnet, repeats: 2, filters: 16}     # NASNet-A's cells (Zoph et al. 2018, figure 4)
    model: stages                                      # EfficientNet-B0 (Tan & Le 2019, table 1)

What a search decides is `normal` and `reduction` of the one and `rows` of the other; all else is fixed by the base.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from distml.spec.base import Block, Count, Fraction

# The thirteen operations of Zoph et al. 2018, section 3.
NasNetOperation = Literal[
    "identity", "conv_1x3_3x1", "conv_1x7_7x1", "dilated_3x3", "average_3x3", "max_3x3", "max_5x5", "max_7x7",
    "conv_1x1", "conv_3x3", "separable_3x3", "separable_5x5", "separable_7x7",
]  # fmt: skip
Combination = Literal["add", "concatenate"]
OPERATIONS: tuple[NasNetOperation, ...] = get_args(NasNetOperation)
COMBINATIONS: tuple[Combination, ...] = get_args(Combination)
Input = Annotated[int, Field(ge=0)]


class CellBlockSpec(Block):
    """One block of a cell: an operation on each of two inputs, and how the two results become one.

    Input 0 is the previous cell's output, 1 the output of the cell before that, 2 + i the output of block i.
    """

    inputs: Annotated[list[Input], Field(min_length=2, max_length=2)]
    operations: Annotated[list[NasNetOperation], Field(min_length=2, max_length=2)]
    combine: Combination = "add"


def _added(first: Input, one: NasNetOperation, second: Input, other: NasNetOperation) -> CellBlockSpec:
    return CellBlockSpec(inputs=[first, second], operations=[one, other])


Cell = Annotated[list[CellBlockSpec], Field(min_length=1)]
NASNET_A_NORMAL = [
    _added(0, "separable_5x5", 1, "separable_3x3"),
    _added(1, "separable_5x5", 1, "separable_3x3"),
    _added(0, "average_3x3", 1, "identity"),
    _added(1, "average_3x3", 1, "average_3x3"),
    _added(0, "separable_3x3", 0, "identity"),
]
NASNET_A_REDUCTION = [
    _added(0, "separable_5x5", 1, "separable_7x7"),
    _added(0, "max_3x3", 1, "separable_7x7"),
    _added(0, "average_3x3", 1, "separable_5x5"),
    _added(3, "identity", 2, "average_3x3"),
    _added(2, "separable_3x3", 0, "max_3x3"),
]


class NasNetSpec(Block):
    """A stack of two kinds of cells (Zoph et al. 2018): normal ones, and reductions that halve the image."""

    name: Literal["nasnet"]
    repeats: Count = Field(2, description="normal cells before, between and after the two reductions (N)")
    filters: Count = Field(16, description="channels within the first cells (F); each reduction doubles them")
    normal: Cell = NASNET_A_NORMAL
    reduction: Cell = NASNET_A_REDUCTION


# MBConv: expand, depthwise convolution, project (Sandler et al. 2018); separable is MBConv without expansion.
StageOperation = Literal["conv", "separable", "mbconv_3", "mbconv_6"]
Skip = Literal["none", "identity", "pool"]
STAGE_OPERATIONS: tuple[StageOperation, ...] = get_args(StageOperation)
SKIPS: tuple[Skip, ...] = get_args(Skip)
KERNELS = (3, 5)
SQUEEZES = (0.0, 0.25)
NUM_STAGES = 7


class StageSpec(Block):
    """A row: `layers` equal layers, the first of which changes channels and image size."""

    operation: StageOperation
    kernel: Literal[3, 5] = 3
    squeeze_excitation: Fraction = Field(0.25, description="width of the gate, as a share of the channels; 0: none")
    skip: Skip = Field("identity", description="identity or a 3 x 3 average around a layer, where shapes allow it")
    channels: Count
    layers: Count = 1
    stride: Literal[1, 2] = 1


def _row(
    operation: StageOperation, kernel: Literal[3, 5], channels: int, layers: int, stride: Literal[1, 2]
) -> StageSpec:
    return StageSpec(operation=operation, kernel=kernel, channels=channels, layers=layers, stride=stride)


EFFICIENTNET_B0 = [
    _row("separable", 3, 16, 1, 1),
    _row("mbconv_6", 3, 24, 2, 2),
    _row("mbconv_6", 5, 40, 2, 2),
    _row("mbconv_6", 3, 80, 3, 2),
    _row("mbconv_6", 5, 112, 3, 1),
    _row("mbconv_6", 5, 192, 4, 2),
    _row("mbconv_6", 3, 320, 1, 1),
]


class StagesSpec(Block):
    """A stem, seven rows of equal layers and a head; as it stands, EfficientNet-B0."""

    name: Literal["stages"]
    stem: Count = Field(32, description="channels of the first 3 x 3 convolution")
    stem_stride: Literal[1, 2] = 2
    rows: Annotated[list[StageSpec], Field(min_length=NUM_STAGES, max_length=NUM_STAGES)] = EFFICIENTNET_B0
    head: Count = Field(1280, description="channels of the last 1 x 1 convolution")
    dropout: Fraction = Field(0.0, description="share of the head's channels dropped in training")


# ----------------------------------------------------------------------------------------------------------- the spaces
class NasNetSpace(Block):
    """Both cells of a base whose model is `nasnet`: per block two inputs, two operations and the combination."""

    name: Literal["nasnet"]
    blocks: Count = Field(5, description="of each cell: 5 x 2 x blocks decisions")
    operations: Annotated[list[NasNetOperation], Field(min_length=2)] = list(OPERATIONS)


class StagesSpace(Block):
    """The rows of a base whose model is `stages`; strides, stem and head are the base's."""

    name: Literal["stages"]
    channels: Annotated[list[Annotated[float, Field(gt=0.0)]], Field(min_length=1)] = Field(
        [0.75, 1.0, 1.25], description="factors of the base's channels, rounded to multiples of 8"
    )
    layers: Annotated[list[int], Field(min_length=1)] = Field(
        [-1, 0, 1], description="added to the base's layers; at least one layer stays"
    )


STRUCTURED: dict[str, type[NasNetSpace] | type[StagesSpace]] = {"nasnet": NasNetSpace, "stages": StagesSpace}
