"""`distml plan` as a user sees it: what is printed, exit codes, cluster files, and changes that make a job fit."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from own.oracle import OWN, job_of, spec_of

from distml.cli import main
from distml.errors import UsageError
from distml.launch.plan.cluster import ClusterSpec, GPUSpec, read_cluster
from distml.launch.plan.estimate import Traced, estimate, micro_batches_of
from distml.launch.plan.fit import levels_of, smallest_change
from distml.launch.plan.machine import machine_of
from distml.launch.plan.places import nodes_of, places_of
from distml.launch.plan.states import Size
from distml.launch.plan.text import amount, seconds, worked
from distml.memory import binary_size
from distml.spec.loader import load_spec

CLUSTER = """\
nodes: 2
gpus_per_node: 8
gpu: {gpu}
host_memory_gib: 2000
links:
  intra: {{latency_us: 5, gb_per_s: 400}}
  inter: {{latency_us: 15, gb_per_s: 50}}
price_per_gpu_hour: 2.0
"""
JOB = """\
distml: v1
name: small-gpt
task: {name: language_model, data: text.txt, block: 64, model: {name: gpt, layers: 4, width: 64, vocabulary: 4096}}
strategy: {name: zero, stage: 1}
precision: bf16
batch_size: 64
stop: {steps: 10}
resources: {workers: 4, gpus_per_worker: 1}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "text.txt").write_text("\n\n".join("a line of some words\n" * 20 for _ in range(60)))
    (tmp_path / "big.yaml").write_text(CLUSTER.format(gpu="h100"))
    return tmp_path


def planned(capsys, *arguments) -> tuple[int, dict]:
    code = main(["plan", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------------------- the verb
def test_a_plan_is_one_screen_and_the_same_each_time(here, capsys):
    assert main(["plan", "job.yaml", "--cluster", "big.yaml", "--shapes"]) == 0
    out = capsys.readouterr().out
    assert main(["plan", "job.yaml", "--cluster", "big.yaml", "--shapes"]) == 0
    assert capsys.readouterr().out == out
    assert len(out.splitlines()) < 50
    assert all(len(line) < 130 for line in out.splitlines())
    assert re.search(r"layers\.\*\.mlp\.up\.weight +256 x 64 +16,384  x 4", out)
    assert re.search(r"weights +\d+\.\d KiB", out)
    assert re.search(r"of 79\.6 GiB, h100 \(cluster file\)", out)
    assert out.splitlines()[-1].startswith("fits: ")


def test_json_has_the_numbers_of_the_text(here, capsys):
    code, plan = planned(capsys, "job.yaml", "--cluster", "big.yaml")
    assert code == 0
    size, memory = plan["parameters"], plan["memory"]
    assert memory["model_states"] == pytest.approx(4 * size + 12 * size / 4)
    assert memory["total"] == pytest.approx(
        memory["model_states"] + sum(memory["buffers"].values()) + memory["process"]
        + max(memory["activations"]["peak"], sum(memory["at_update"].values())))  # fmt: skip
    assert plan["step"]["tokens"] == 64 * 64
    assert plan["all_states"] == 16 * size
    assert plan["fits"]
    assert plan["smallest_change"] is None


def test_a_range_of_workers_has_the_memory_of_the_fewest_and_the_step_of_as_many_as_there_is_room_for(here, capsys):
    def of(*workers):
        return planned(capsys, "job.yaml", "--cluster", "big.yaml", *workers)[1]

    few, many = of("--set", "resources.workers=2"), of("--set", "resources.workers=16")
    for most in (16, 32):  # there is room for 16
        found = of("--set", f"resources.workers={{min: 2, max: {most}}}")
        assert found["memory"] == few["memory"] != many["memory"]
        assert (found["ranks"], found["hosts"], found["step"]) == (16, 2, many["step"])
        assert found["notes"][-1] == (
            f"workers are 2 to {most}: memory is what one of 2 has, a step and its hours are of 16"
        )
    assert main(["plan", "job.yaml", "--cluster", "big.yaml", "--set", "resources.workers={min: 17, max: 32}"]) == 2
    assert "resources.workers is 17, and the cluster has room for 16" in capsys.readouterr().err


def test_a_card_that_is_too_small_is_exit_4_and_the_change_that_is_printed_fits(here, capsys):
    (here / "tiny.yaml").write_text(CLUSTER.format(gpu="{memory_gib: 0.78, tflops: 10}"))
    code, plan = planned(capsys, "job.yaml", "--cluster", "tiny.yaml")
    assert code == 4
    assert plan["over"] == "device"
    assert main(["plan", "job.yaml", "--cluster", "tiny.yaml"]) == 4
    last = capsys.readouterr().out.splitlines()[-1]
    options = shlex.split(last.removeprefix("smallest change that fits: "))
    assert options[1] == plan["smallest_change"][0] == "micro_batch_size=4"
    code, plan = planned(capsys, "job.yaml", "--cluster", "tiny.yaml", *options)
    assert code == 0


def test_the_card_that_the_spec_asks_for_is_the_plans(here, capsys):
    def memory(*arguments: str) -> str:
        assert main(["plan", "job.yaml", *arguments]) == 0
        return capsys.readouterr().out

    assert "139.8 GiB" in memory("--set", "resources.accelerator=h200")
    assert memory("--cluster", "big.yaml") == memory("--cluster", "big.yaml", "--set", "resources.accelerator=H100")
    assert main(["plan", "job.yaml", "--cluster", "big.yaml", "--set", "resources.accelerator=L4"]) == 2
    assert "resources.accelerator is L4, and the cluster file's GPUs are H100" in capsys.readouterr().err


@pytest.mark.parametrize("known", [False, True])
def test_offload_to_a_host_of_unknown_memory_fits_on_a_condition(here, capsys, known):
    """What a change moves there is said with the change, too; where the host's memory is given, it is compared."""
    text = CLUSTER.format(gpu="{memory_gib: 0.89, tflops: 10}")
    (here / "c.yaml").write_text(text if known else text.replace("host_memory_gib: 2000\n", ""))
    options = ["job.yaml", "--cluster", "c.yaml", "--set", "strategy.stage=3", "--set", "batch_size=4"]
    wide = "task.model={name: gpt, layers: 2, width: 768, vocabulary: 8192}"
    assert main(["plan", *options, "--set", wide]) == 4
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"smallest change that fits(, if the host has [\d.]+ MiB for its 4 ranks)?: --set (.*)", last)
    assert "strategy.offload" in found[2]
    assert (found[1] is None) == known
    change = ["--set", wide, "--set", shlex.split(found[2])[0]]
    code, plan = planned(capsys, *options, *change)
    assert (code, plan["host_wanted"]) == (0, None if known else plan["memory"]["host_total"] * 4)
    assert main(["plan", *options, *change]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"fits{found[1] or ''}: ")
    if not known:
        assert binary_size(plan["host_wanted"]) in found[1]


def test_a_plan_is_multiplied_out(here, capsys):
    """By GPU-hours that are given, or by the plan's own; on the cluster's GPUs where no other number is given."""
    options = ["job.yaml", "--cluster", "big.yaml", "--children", "20000"]
    assert main(["plan", *options, "--gpus", "500", "--hours-each", "2.4"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "20,000 children x 2.4 GPU-hours on 500 GPUs: 2,000 GPU-days, 4.0 days"
    code, plan = planned(capsys, *options, "--set", "stop.steps=1000000")
    many = plan["children"]
    assert (code, many["children"], many["gpus"], many["each"]) == (0, 20_000, 16, 4)
    assert [many["least"], many["most"]] == [pytest.approx(4 * hours) for hours in plan["hours"]]
    assert many["days"] == [pytest.approx(20_000 / 4 * hours / 24) for hours in plan["hours"]]
    assert planned(capsys, "job.yaml", "--cluster", "big.yaml")[1]["children"] is None


def test_where_nothing_helps_that_is_said(here, capsys):
    (here / "none.yaml").write_text(CLUSTER.format(gpu="{memory_gib: 0.1, tflops: 10}"))
    assert main(["plan", "job.yaml", "--cluster", "none.yaml"]) == 4
    assert capsys.readouterr().out.splitlines()[-1].startswith("no smaller micro-batch")


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["job.yaml", "--cluster", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["job.yaml", "--cluster", "big.yaml", "--set", "resources.workers=32"], "has room for 16"),
        (["job.yaml", "--set", "task.model.heads=3"], "heads"),
        (["job.yaml", "--gpus", "8"], "are of --children; add --children N"),
        (["job.yaml", "--children", "5", "--gpus", "2"], "each child is on 4 GPUs"),
        (["job.yaml", "--children", "5", "--set", "stop={epochs: 2.0}"], "give --hours-each"),
        (["rllib-ppo-cartpole"], "kind rllib"),
    ],
)
def test_what_a_user_can_mend_is_exit_2(here, capsys, arguments, phrase):
    assert main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert phrase in err
    assert err.count("\n") == 1


def test_shipped_jobs_of_every_sort_are_planned(here, capsys):
    for name in ("digits-ps-async", "digits-cnn", "a2c-cartpole", "own-task"):
        code, plan = planned(capsys, name)
        assert code == 0
        assert (plan["memory"]["activations"]["unknown"] is not None) == (name == "a2c-cartpole")


# -------------------------------------------------------------------------------------------------------- cluster files
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: 2\ngpu: h100\n", ":2:1: gpu is given, and gpus_per_node is 0; set it"),
        ("gpus_per_node: 8\n", ":1:1: gpus_per_node is 8, and the key 'gpu' is missing"),
        ("gpus_per_node: 8\ngpu: h10\n", ":2:6: unknown gpu 'h10'; did you mean 'h100'?"),
        ("gpus_per_node: 8\ngpu: {memory_gib: 80}\n", ":2:1: gpu needs a name, or memory_gib and tflops"),
        ("node: 2\n", ":1:1: unknown key 'node'; did you mean 'nodes'?"),
        ("nodes: two\n", ":1:8: nodes must be an integer"),
        ("links: {intra: {latency_us: 1}}\n", ":1:16: the key 'gb_per_s' is missing in links.intra"),
        ("cluster_name: mine\nprovider: {type: aws}\n", ":1:1: no node type has GPUs; write nodes"),
        ("cluster_name: mine\nprovider: {type: local}\n", ":2:18: ray up finds out what these machines have"),
        ("- 1\n", ":1:1: a cluster file must be a mapping"),
        ("", ":1:1: a cluster file must be a mapping of keys, it is empty"),
    ],
)
def test_a_wrong_cluster_file_is_one_line_that_points(tmp_path, text, said):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_cluster(file)
    assert f"{file}{said}" in str(caught.value)


CLUSTERS = sorted((Path(__file__).parents[2] / "clusters").glob("plan-*.yaml"))


def test_there_are_cluster_files_for_plan():
    assert {"plan-8xh100.yaml", "plan-2x8xh200.yaml"} <= {file.name for file in CLUSTERS}


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)
def test_each_shipped_cluster_file_is_read_and_is_what_it_is_named_after(file):
    assert file.read_text().startswith("# ")
    cluster = read_cluster(file)
    nodes, gpus, card = re.fullmatch(r"plan-(?:(\d+)x)?(\d+)x(\w+)", file.stem).groups()
    assert (cluster.nodes, cluster.gpus_per_node, cluster.card_name) == (int(nodes or 1), int(gpus), card)
    assert cluster.host_memory_gib
    assert cluster.links.intra
    assert cluster.nodes == 1 or "inter" in cluster.links.model_fields_set


def test_numbers_go_before_those_of_a_cards_name(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("gpus_per_node: 8\ngpu: {name: h100, memory_gib: 94}\n")
    card = read_cluster(file).card
    assert (card.memory_gib, card.tflops) == (94, 989)


# -------------------------------------------------------------------------------------------------- the smallest change
def attempts(spec, width, cluster):
    """Plans of a spec's variations, with activations as a straight line instead of a trace."""

    def attempt(changes):
        try:
            job = load_spec(spec, changes, directory=OWN).job
        except UsageError:
            return None
        rows, _ = micro_batches_of(job)
        layers = 1 if job.task.model.activation_checkpointing else 8
        traced = Traced(0.0, rows * layers * 4.0 * job.task.block * width)
        places = places_of(job, nodes_of(job, cluster))
        return estimate(
            job, Size({"w": (width, width * 100)}), traced, places, machine_of(job, places, cluster), cluster
        )

    return attempt


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    width=st.sampled_from([256, 1024, 4096]), strategy=st.sampled_from(["all_reduce", "zero"]),
    memory=st.floats(0.8, 6.0), batch_size=st.sampled_from([16, 64]), precision=st.sampled_from(["fp32", "bf16"]),
)  # fmt: skip
def test_what_is_suggested_fits_when_it_is_planned_again(width, strategy, memory, batch_size, precision):
    """And nothing in it can be left out."""
    gpu = GPUSpec(memory_gib=memory, tflops=10.0)
    cluster = ClusterSpec(nodes=4, gpus_per_node=4, gpu=gpu, host_memory_gib=64.0)
    task = {"name": "language_model", "block": 512, "model": {"name": "gpt", "width": 64}}
    spec = spec_of(task, strategy=strategy, precision=precision, batch_size=batch_size, optimizer={"name": "adamw"})
    spec["resources"] = {"workers": 2, "gpus_per_worker": 1}
    attempt = attempts(spec, width, cluster)
    assume(not attempt([]).fits)
    change = smallest_change(levels_of(job_of(spec), 16), attempt)
    if change is None:
        harshest = ["micro_batch_size=1", "task.model.activation_checkpointing=true",
                    "strategy={name: zero, stage: 3, offload: [optimizer, parameters]}"]  # fmt: skip
        assert not attempt(harshest).fits
        return
    assert attempt(change).fits
    for left_out in change:
        fewer = attempt([one for one in change if one != left_out])
        assert fewer is None or not fewer.fits


def test_gentle_changes_are_tried_first():
    job = job_of(spec_of({"name": "language_model", "model": {"name": "gpt"}}, batch_size=8) | {
        "resources": {"workers": 2, "gpus_per_worker": 1}})  # fmt: skip
    first = [level[0][0] for level in levels_of(job, 4)]
    assert first == ["micro_batch_size=2", "task.model.activation_checkpointing=true",
                     "strategy={name: zero, stage: 1}", 'strategy.offload=["optimizer"]',
                     "resources.workers=4"]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ in a run
def test_a_run_says_it_first(here, capsys):
    code = main(["run", "digits-single", "--set", "stop={steps: 2}", "--out", "out"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert re.fullmatch(
        r"plan: fits: [\d.]+ MiB of [\d.]+ GiB per rank, activations not counted; states 150\.2 KiB", lines[1]
    )
    assert re.fullmatch(r"plan: each step sends 0 B per rank and takes at least .*s", lines[2])


def test_a_language_models_run_counts_its_activations(here, capsys):
    sets = ("strategy=single", "resources={workers: 1}", "precision=fp32", "batch_size=8", "stop.steps=1",
            "task.model={name: gpt, layers: 1, width: 32}", "evaluate.every=100")  # fmt: skip
    options = [part for one in sets for part in ("--set", one)]
    assert main(["run", "job.yaml", *options, "--out", "out"]) == 0
    said = capsys.readouterr().out.splitlines()[1]
    assert "not counted" not in said
    code, plan = planned(capsys, "job.yaml", *options)
    assert code == 0
    assert said == key_lines_of(plan)


def key_lines_of(plan) -> str:
    """The first of them, from the JSON of a plan."""
    memory = plan["memory"]
    return (f"plan: fits: {binary_size(memory['total'])} of {binary_size(plan['device']['memory'])} per rank; "
            f"states {binary_size(memory['model_states'])}")  # fmt: skip


def test_a_small_models_step_takes_at_least_so_long(here, capsys):
    small = ["job.yaml", "--set", "resources={workers: 2}", "--set", "precision=fp32", "--set", "strategy.stage=3"]
    assert main(["plan", *small, "--set", "batch_size=2"]) == 0
    assert re.search(r"takes at least .* tokens/s at most", capsys.readouterr().out)
    assert main(["plan", *small, "--set", "batch_size=2048", "--set", "micro_batch_size=256"]) == 0
    assert re.search(r"takes  .* tokens/s at least", capsys.readouterr().out)


def test_seconds_read_well():
    read = [seconds(value) for value in (0.0, 2e-6, 0.0123, 5.0, 86400.0 * 3)]
    assert read == ["0 ms", "2 us", "12.3 ms", "5.0 s", "3.0 days"]


def test_a_whole_runs_work_is_a_range_in_hours_minutes_or_seconds_of_what_does_it():
    assert worked(1_660_340.0, 2_618_123.0, "GPU") == "1,660,000 to 2,620,000 GPU-hours"
    assert worked(2.4, 2.401, "GPU") == "2.4 GPU-hours"
    assert worked(0.02, 0.5, "worker") == "1.2 to 30 worker-minutes"
    assert worked(0.0, 0.01, "worker") == "0.00 to 36 worker-seconds"
    assert worked(1e-6, 3.44e-5, "worker") == "less than a worker-second"
    assert [amount(value) for value in (0.0, 1e-5, 0.0123, 99.96, 123_456.0)] == [
        "0.00",
        "0.00",
        "0.0123",
        "100",
        "123,000",
    ]


def test_work_and_money_are_said_for_the_same_range(here, capsys):
    (here / "slow.yaml").write_text(CLUSTER.format(gpu="{memory_gib: 40, tflops: 0.001}").replace("400}", "0.01}"))
    assert main(["plan", "job.yaml", "--cluster", "slow.yaml", "--set", "stop.steps=1000000"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "1,000,000 steps" in line)
    hours, money = re.search(r"([\d,]+ to [\d,]+) GPU-hours; ([\d,]+ to [\d,]+) in money$", row).groups()
    (least, most), (cheap, dear) = (
        [int(one.replace(",", "")) for one in text.split(" to ")] for text in (hours, money)
    )
    assert (cheap, dear) == (pytest.approx(2.0 * least, rel=0.01), pytest.approx(2.0 * most, rel=0.01))


PEAK = """
import resource, sys
from distml.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_process_has_what_was_planned(here, capsys):
    """The most that the kernel ever gave a whole run, its checkpoint included."""
    model = "task.model={name: gpt, layers: 6, width: 512, heads: 8, vocabulary: 8192}"
    sets = ("strategy=single", "resources={workers: 1}", "precision=fp32", "batch_size=32", "stop.steps=2", model)
    options = [part for one in sets for part in ("--set", one)]
    command = [sys.executable, "-c", PEAK, "run", "job.yaml", *options, "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    _, plan = planned(capsys, "job.yaml", *options)
    assert plan["memory"]["total"] == pytest.approx(int(done.stdout.splitlines()[-1]), rel=0.15)
