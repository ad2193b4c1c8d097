"""Names of accelerators as Ray's nodes have them (`accelerator_type:NAME`), and how users write them. No ray here.

The list is that of `ray.util.accelerators`; a test ties the two.
"""

from __future__ import annotations

import difflib
import re

ACCELERATORS: tuple[str, ...] = (
    "H100", "A100", "A100-40G", "A100-80G", "L4", "L40S", "A10G", "T4", "V100", "P100", "P4", "K80", "H200", "H20",
    "B200", "B300", "GB200", "GB300", "RTX-PRO-6000",
    "Intel-GPU-Max-1550", "Intel-GPU-Max-1100", "Intel-GAUDI",
    "AMD-Instinct-MI100", "AMD-Instinct-MI210", "AMD-Instinct-MI250X", "AMD-Instinct-MI250X-MI250",
    "AMD-Instinct-MI300A", "AMD-Instinct-MI300X-OAM", "AMD-Instinct-MI300X-HF", "AMD-Instinct-MI308X",
    "AMD-Instinct-MI325X-OAM", "AMD-Instinct-MI350X-OAM", "AMD-Instinct-MI355X-OAM",
    "AMD-Radeon-R9-200-HD-7900", "AMD-Radeon-HD-7900",
    "aws-neuron-core", "TPU-V2", "TPU-V3", "TPU-V4", "TPU-V5P", "TPU-V5LITEPOD", "TPU-V6E", "TPU-V7X",
    "Ascend910B", "Ascend910B4", "MXC500", "MXC550", "FURIOSA_RNGD", "MOBILINT_ARIES", "MOBILINT_REGULUS",
    "M1", "M1-Pro", "M1-Max", "M1-Ultra", "M2", "M2-Pro", "M2-Max", "M2-Ultra", "M3", "M3-Pro", "M3-Max",
    "Apple-Silicon",
)  # fmt: skip
_MAKERS = r"^(nvidia|tesla|geforce|amd|instinct|google|huawei|apple)+"


def _plain(text: str) -> str:
    """Lower case letters and digits, without the maker: `NVIDIA_Tesla-V100` and `v100` are the same."""
    plain = re.sub(_MAKERS, "", re.sub(r"[^a-z0-9]", "", text.lower()))
    return re.sub(r"(?<=\d)gb$", "g", plain)


_BY_PLAIN = {_plain(name): name for name in reversed(ACCELERATORS)}


def canonical_accelerator(text: str) -> str:
    """Ray's name for what a user wrote (`h100`, `nvidia-h100`, `A100-80GB`); what is not known stays as it is."""
    return text if text in ACCELERATORS else _BY_PLAIN.get(_plain(text), text)


def similar_accelerators(text: str, names: tuple[str, ...] = ACCELERATORS) -> list[str]:
    """At most three of `names` that could have been meant, the nearest first."""
    by_plain = {_plain(name): name for name in reversed(names)}
    return [by_plain[plain] for plain in difflib.get_close_matches(_plain(text), by_plain, n=3, cutoff=0.6)]
