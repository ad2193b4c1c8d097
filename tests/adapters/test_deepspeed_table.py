"""The table of DeepSpeed's settings is what the installed DeepSpeed has; of each it is said whether it may be set."""

from __future__ import annotations

from distml.adapters.deepspeed_table import table
from distml.spec import deepspeed_table
from distml.spec.deepspeed import REFUSED
from distml.spec.deepspeed_table import SETTINGS

BLOCKS = {"zero_optimization", "fp16", "bf16", "data_types", "aio"}
PASSED = {"communication_data_type", "train_batch_size", "train_micro_batch_size_per_gpu",
          "gradient_accumulation_steps"}  # fmt: skip


def test_the_table_is_what_deepspeed_says():
    for name, value in table().items():
        assert vars(deepspeed_table)[name] == value, f"run python -m distml.adapters.deepspeed_table ({name})"


def test_every_key_at_the_top_is_passed_or_refused_with_a_reason():
    top = {key for key in SETTINGS if "." not in key}
    assert top == BLOCKS | PASSED | {key for key in REFUSED if "." not in key}
    assert not {key for key in REFUSED if "." not in key} & (BLOCKS | PASSED)


def test_what_is_refused_exists():
    assert set(REFUSED) <= set(SETTINGS)


def test_a_passed_value_is_of_a_known_kind():
    assert [key for key, entry in SETTINGS.items() if entry == "any" and key not in REFUSED] == []
