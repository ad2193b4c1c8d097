"""What an autoscaler can add: read where Ray and KubeRay leave it, and counted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distml.runtime.growth import BOOTSTRAP, START_COMMAND, read_growth
from distml.runtime.planning import Node, NoPlaceError, Request, plan_placement

ROOT = Path(__file__).parents[2]
HEAD = Node("head", {"CPU": 0.0})
THERE = [HEAD, *(Node(name, {"CPU": 48.0, "GPU": 4.0}) for name in "ab")]
GPU = {"CPU": 4.0, "GPU": 1.0}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """As `ray up clusters/aws-gpu.yaml` leaves it on the head."""
    shutil.copyfile(ROOT / "clusters" / "aws-gpu.yaml", tmp_path / BOOTSTRAP)
    return tmp_path


def test_the_shipped_cluster_takes_eight_gpus_at_once_and_waits_for_spot_nodes_for_sixteen(home):
    growth = read_growth(home, {}, is_head=True)
    assert plan_placement(THERE, Request(8, GPU)).fits_now
    with pytest.raises(NoPlaceError):
        plan_placement(THERE, Request(16, GPU))
    more = growth.more(THERE)
    assert [node.id for node in more] == [f"gpu-spot {index}" for index in range(4)]  # the two that are there are `gpu`
    assert plan_placement([*THERE, *more], Request(24, GPU)).ranks
    with pytest.raises(NoPlaceError, match="this cluster, at its largest, has 24"):
        plan_placement([*THERE, *more], Request(25, GPU), "cluster, at its largest,")


def test_no_more_nodes_come_than_the_whole_cluster_may_have(home):
    crowd = [*THERE, *(Node(f"c{index}", {"CPU": 2.0}) for index in range(3))]  # five of six workers' nodes
    assert len(read_growth(home, {}, is_head=True).more(crowd)) == 1


def test_a_type_that_does_not_say_its_accelerator_may_have_the_one_that_is_asked_for(home):
    node = read_growth(home, {}, is_head=True).more(THERE, ["L4"])[0]
    assert node.accelerators == ["L4"]


def test_kuberays_autoscaler_shows_in_how_the_head_was_started(tmp_path):
    assert read_growth(tmp_path, {START_COMMAND: "ray start --head --no-monitor"}, is_head=True).types is None
    assert read_growth(tmp_path, {START_COMMAND: "ray start --head --num-cpus=0"}, is_head=True) is None


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "available_node_types: 3", "\xff"])
def test_what_cannot_be_read_is_no_sign(tmp_path, text):
    (tmp_path / BOOTSTRAP).write_bytes(text.encode("latin-1"))
    assert read_growth(tmp_path, {}, is_head=True) is None


def test_elsewhere_than_on_the_head_a_file_says_nothing(home):
    assert read_growth(home, {START_COMMAND: "ray start --no-monitor"}, is_head=False) is None


@pytest.mark.parametrize("one", [{"gpu": {}}, {"gpu": None}, {"gpu": {"resources": {"GPU": "x"}, "max_workers": "y"}}])
def test_a_file_with_gaps_adds_nothing(tmp_path, one):
    import yaml

    (tmp_path / BOOTSTRAP).write_text(yaml.safe_dump({"available_node_types": one}))
    assert read_growth(tmp_path, {}, is_head=True).more(THERE) == []
