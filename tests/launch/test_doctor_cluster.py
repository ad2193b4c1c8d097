"""Doctor on a cluster: its nodes, its links, and what `distml plan --cluster` reads of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from own.small_ray import small_ray

from distml.bench.hosts import two_hosts
from distml.bench.network import missing
from distml.errors import UsageError
from distml.launch import doctor_cluster
from distml.launch.doctor_cluster import cluster_findings, cluster_of, for_plan, known_card, links, nodes
from distml.launch.plan.cluster import read_cluster

REASON = missing()
VERSIONS = {"ray": "2.60.0", "torch": "2.13.0", "deepspeed": "0.19.8", "distml": None}
NODE = {"id": "1", "address": "10.0.0.1", "num_gpus": 8, "is_head": False, "host": "a", "python": "3.11.9",
        "versions": VERSIONS, "num_cpus": 96, "memory_bytes": 2**40, "shared_memory_bytes": 2**39,
        "cards": [["NVIDIA H100 80GB HBM3", "81559"]] * 8}  # fmt: skip
HEAD = {**NODE, "id": "0", "address": "10.0.0.9", "num_gpus": 0, "num_cpus": 4, "cards": [], "is_head": True}
LINK = {"from": "10.0.0.1", "to": "10.0.0.2", "latency_us": 12.34, "gb_per_s": 11.0, "object_gb_per_s": 2.0}
MEASURED = {"nodes": [HEAD, NODE, {**NODE, "address": "10.0.0.2"}], "silent": [],
            "links": [LINK, {**LINK, "latency_us": 15.0, "gb_per_s": 12.0}]}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what is said
def test_plan_reads_what_is_written(tmp_path):
    out = tmp_path / "c.yaml"
    [finding] = for_plan(MEASURED, out)
    assert (finding.ok, finding.said) == (True, f"written to {out}")
    cluster = read_cluster(out)
    assert (cluster.nodes, cluster.gpus_per_node, cluster.card_name, cluster.cpus_per_node) == (2, 8, "h100", 96)
    assert (cluster.links.inter.latency_us, cluster.links.inter.gb_per_s) == (15.0, 11.0)  # the slowest
    assert cluster.host_memory_gib == 1024


def test_a_card_that_is_not_known_is_asked_for():
    unknown = [{**NODE, "cards": [["Tesla T4", "15360"]]}]
    description, card = cluster_of({**MEASURED, "nodes": unknown})
    assert (card, "gpu" in description) == ("Tesla T4", False)
    [finding] = for_plan({**MEASURED, "nodes": unknown}, None)
    assert "write gpu: {memory_gib: …, tflops: …} for Tesla T4" in finding.do


@pytest.mark.parametrize(("name", "gib", "card"), [
    ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"), ("NVIDIA A100-SXM4-80GB", 79.2, "a100"), ("NVIDIA L4", 22.5, "l4"),
    ("NVIDIA L40S", 44.9, "l40s"), ("NVIDIA GeForce RTX 4090", 23.9, "rtx4090"), ("Tesla V100-SXM2-32GB", 31.7, "v100"),
    ("NVIDIA H100 PCIe", 40.0, None), ("Tesla T4", 15.0, None),
])  # fmt: skip
def test_cards_are_known_by_name_and_memory(name, gib, card):
    assert known_card(name, gib) == card


def test_nodes_must_be_alike_and_answer():
    assert all(one.ok for one in nodes(MEASURED))
    other = {**NODE, "address": "10.0.0.3", "python": "3.12.1", "versions": {**VERSIONS, "torch": None}}
    silent = {"address": "10.0.0.4", "error": "GetTimeoutError"}
    wrong = [
        str(one) for one in nodes({**MEASURED, "nodes": [*MEASURED["nodes"], other], "silent": [silent]}) if one.do
    ]
    assert [" ".join(line.split()) for line in wrong] == [
        "!! nodes 10.0.0.4 does not answer: GetTimeoutError; look at its raylet.err",
        "!! python, nodes 3.11.9 on 3, 3.12.1 on 10.0.0.3; give all nodes the same",
        "!! torch not on 10.0.0.3; pip install -r clusters/requirements.txt there",
    ]


def test_a_link_that_was_not_measured_is_told():
    [good, bad] = links([LINK, {"from": "a", "to": "b", "error": "timed out"}], 2)
    assert (good.ok, good.said) == (True, "10.0.0.1 to 10.0.0.2: 12 us, 11 GB/s; objects of Ray 2 GB/s")
    assert bad.do == "let the nodes reach each other on all ports"
    assert [one.said for one in links([], 1)] == ["one node has none"]


def test_nobody_there_is_one_line_in_time(monkeypatch):
    [line] = cluster_findings("http://127.0.0.1:9", None)
    assert not line.ok
    assert line.said.startswith("nobody answers at http://127.0.0.1:9")
    monkeypatch.setattr(doctor_cluster, "JOIN_S", 1.0)
    [line] = list(cluster_findings("127.0.0.1:9", None))[1:]
    assert line.said == "waited 1 s for Ray at 127.0.0.1:9"
    with pytest.raises(UsageError, match="the job x failed: Traceback; is the address right"):
        doctor_cluster._result("noise\nTraceback", "mark", "the job x failed")


# --------------------------------------------------------------------------------------------------------- a real Ray
@pytest.fixture(scope="module")
def ray_here() -> Iterator[str]:
    yield from small_ray()


def test_a_joined_ray_is_described(ray_here):
    found = {one.name: one for one in cluster_findings(ray_here, None)}
    assert all(one.ok for one in found.values()), found
    assert found["nodes"].said == f"1, {os.cpu_count()} CPUs, 0 GPUs"
    assert found["ray, nodes"].said == "2.60.0"
    assert found["links"].said == "one node has none"
    assert "nodes: 1, gpus_per_node: 0" in found["for plan"].said


def test_two_ends_measure_the_link_between_them(ray_here):
    import ray

    from distml.launch.doctor_links import Probe, _measure_link

    ends = [ray.remote(Probe).options(num_cpus=0).remote() for _ in range(2)]
    link = _measure_link(*ends)
    assert set(link) == {"latency_us", "gb_per_s", "object_gb_per_s"}
    assert 0 < link["latency_us"] < 1e5
    assert 0.01 < link["gb_per_s"] < 1000
    # A stranger, who does not know the secret, is not served.
    address = ray.get(ends[0].listen.remote(bytes(32)), timeout=20)
    with pytest.raises(OSError):
        Probe().link(address, bytes(31) + b"x")


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize(("rate", "gb_per_s"), [("1gbit", 0.125), ("100mbit", 0.0125)])
def test_what_is_measured_is_what_the_link_carries(rate, gb_per_s, tmp_path):
    with two_hosts(rate) as pair:
        command = pair.hosts[0].command([sys.executable, "-m", "distml", "doctor", "--address", pair.ray, "--json",
                                         "--out", str(tmp_path / "c.yaml")])  # fmt: skip
        done = subprocess.run(command, env={**os.environ, **pair.environment}, capture_output=True, text=True,
                              timeout=300)  # fmt: skip
    found = json.loads(done.stdout)["findings"]
    assert [one for one in found if one["name"] == "links" and not one["ok"]] == []
    inter = read_cluster(tmp_path / "c.yaml").links.inter
    assert 0.75 * gb_per_s < inter.gb_per_s < 1.02 * gb_per_s  # headers take 5 %
    assert 0 < inter.latency_us < 5000


@pytest.mark.slow
def test_a_dashboards_cluster_is_measured_by_a_job(tmp_path, monkeypatch, capsys):
    from own.head import ray_head

    token = "7" * 64
    with ray_head(token) as head:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        found = {one.name: one for one in cluster_findings(head.url, tmp_path / "c.yaml")}
        assert all(one.ok for one in found.values()), found
        assert found["cluster"].said == f"{head.url} answers, Ray 2.60.0, with a token"
        assert read_cluster(tmp_path / "c.yaml").nodes == 1
        monkeypatch.setenv("RAY_AUTH_TOKEN", "8" * 64)
        [refused] = cluster_findings(head.url, None)
        assert "refuses the token of RAY_AUTH_TOKEN" in refused.said
    assert token not in capsys.readouterr().out + "".join(map(str, found.values()))
