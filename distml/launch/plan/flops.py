"""Floating-point operations of a transformer, and the share of a device's peak that they come to. No torch.

The convention is that of PaLM's appendix B (Chowdhery et al. 2022) and nanoGPT: a multiply-add counts as two
operations; forward takes 2 per parameter and token and backward 4; attention's two products of queries with keys and
of weights with values add 12 L·T·D (causal masks do not make it less). What is computed again under activation
checkpointing is work of the device and not of the model: it is not counted.

N is the number of parameters that take part in a product per token. An embedding that is only looked up is not one of
them: positions, segments, and the tokens' table unless the output layer is tied to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

LOOKED_UP = ("positions.weight", "segments.weight")
TOKENS, OUTPUT = "tokens.weight", "output.weight"


def flops_per_token(parameters: int, layers: int, block: int, width: int) -> int:
    """6 N + 12 L·T·D: forward and backward of one token.

    Args:
        parameters: N, see `product_parameters`.
        layers: L.
        block: T, tokens that a text has.
        width: D, of all heads together.
    """
    return 6 * parameters + 12 * layers * block * width


def product_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """N of one of our transformers, from its parameters' names and shapes.

    A tied output layer has no parameter of its own: the tokens' table is then counted, as the output's.
    """
    looked_up = {*LOOKED_UP, *((TOKENS,) if OUTPUT in shapes else ())}
    return sum(prod(shape) for name, shape in shapes.items() if name not in looked_up)


def model_flops_utilisation(tokens_per_s: float, per_token: float, peak_flops: float) -> float:
    """MFU: the model's operations per second as a share of the devices' peak (both of all devices together)."""
    return tokens_per_s * per_token / peak_flops
