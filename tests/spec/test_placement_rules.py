"""Accelerators, labels and servers' places in a spec: names are put right or refused, and one process refuses them."""

from __future__ import annotations

import pytest

from distml.errors import UsageError
from distml.spec.accelerators import ACCELERATORS, canonical_accelerator
from distml.spec.labels import is_label_key, is_label_selector
from distml.spec.loader import load_spec
from distml.spec.placement_rules import why_not_inline

HEAD = "distml: v1\nname: x\ntask: classification\nstop: {steps: 1}\n"  # four lines
SERVED = "strategy: {name: parameter_server, "

BROKEN = {
    "a near accelerator": ("resources: {accelerator: H10O}", "5:26", "unknown accelerator 'H10O'; did you mean H100?"),
    "a foreign one": ("resources: {accelerator: Quadro}", "5:26", "did you mean L4 or A100 or H100?"),
    "a label's name": ("resources: {labels: {a b: x}}", "5:22", "'a b' is no name of a label"),
    "a selector": ("resources: {labels: {zone: '!!x'}}", "5:28", "'!!x' is no label selector; write a value, !value"),
    "a number": ("resources: {labels: {zone: 3}}", "5:28", "resources.labels.zone must be a string, got 3"),
    "servers' labels": (SERVED + "server_labels: {zone: 'in('}}", "5:58", "strategy.server_labels.zone: 'in(' is no"),
    "apart in shared memory": (
        SERVED + "server_placement: apart}\ntransport: shared_memory", "5:36", "with transport shared_memory there are",
    ),
    "labels of the workers' nodes": (
        SERVED + "server_placement: colocated, server_labels: {zone: x}}", "5:65", "colocated takes the workers'",
    ),
    "apart by id": (
        SERVED + "server_placement: apart}\nresources: {labels: {ray.io/node-id: x}}", "6:22", "ray.io/node-id itself",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_no_node_can_be_is_refused_at_its_place(fails, case):
    text, place, words = BROKEN[case]
    message = fails(HEAD + text)
    assert message.startswith(f"job.yaml:{place}: ")
    assert words in message


@pytest.mark.parametrize(
    ("written", "name"),
    [("h100", "H100"), ("NVIDIA_H100", "H100"), ("nvidia-tesla-v100", "V100"), ("A100-80GB", "A100-80G"),
     ("mi250x", "AMD-Instinct-MI250X"), ("tpu-v4", "TPU-V4"), ("rtx_pro_6000", "RTX-PRO-6000"), ("?", "?")],
)  # fmt: skip
def test_usual_names_become_rays(written, name):
    assert canonical_accelerator(written) == name


def test_the_accelerators_are_those_that_ray_lists():
    accelerators = pytest.importorskip("ray.util.accelerators")
    known = {value for name, value in vars(accelerators).items() if name.isupper() and isinstance(value, str)}
    assert known <= {*ACCELERATORS}
    assert all(canonical_accelerator(name.lower()) == name for name in ACCELERATORS)


@pytest.mark.parametrize("key", ["zone", "ray.io/market-type", "a_b", "-a", "a/", "a/b/c", "", "x" * 64])
def test_names_of_labels_are_those_that_ray_takes(key):
    assert is_label_key(key) is (key in ("zone", "ray.io/market-type", "a_b"))


@pytest.mark.parametrize("asked", ["x", "!x", "in(a, b)", "!in(a,b)", "in()", "in(a", "!!a", "", "a b", "-a"])
def test_selectors_are_those_that_ray_takes(asked):
    assert is_label_selector(asked) is (asked in ("x", "!x", "in(a, b)", "!in(a,b)"))


@pytest.mark.parametrize(
    ("keys", "first"),
    [({"resources.accelerator": "L4"}, "resources.accelerator"), ({"resources.labels": {"a": "b"}}, "resources.labels"),
     ({"strategy": {"name": "parameter_server", "server_placement": "apart"}}, "strategy.server_placement: apart"),
     ({"strategy": {"name": "parameter_server", "server_labels": {"a": "b"}}}, "strategy.server_labels")],
)  # fmt: skip
def test_one_process_refuses_what_is_about_nodes(tmp_path, keys, first):
    import distml

    spec = {"distml": "v1", "name": "x", "task": "classification", "stop": {"steps": 1}}
    assert why_not_inline(load_spec(spec).job) is None
    with pytest.raises(UsageError, match=f"^{first} needs --runtime ray: inline workers share one process"):
        distml.run(spec, keys, out=tmp_path / "run", runtime="inline")
