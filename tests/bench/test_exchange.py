"""`distml bench exchange`: plans, targets, tables; and two contenders for real, where times are not looked at."""

from __future__ import annotations

import json

import pytest
import yaml

from distml.bench import contenders, exchange, figure
from distml.bench.contenders import LABELS, ONE_HOST, STRATEGIES, TWO_HOSTS, Cell, write_spec
from distml.bench.table import summary
from distml.bench.timing import Plan, Times
from distml.cli import main
from distml.errors import RunError
from distml.spec.loader import load_spec

CELL = Cell("4.2M", 256, 2, "sgd")


def measured(**milliseconds):
    """A cell in which these contenders took these milliseconds."""
    keys = ("ms_per_step", "cpu_ms_per_step", "worker_cpu_ms_per_step", "others_cpus")
    found = {name: {key: summary([value]) for key in keys} for name, value in milliseconds.items()}
    return {"size": "4.2M", "workers": 2, "optimizer": "sgd", "contenders": exchange.with_ratios(found), "errors": {}}


def verdicts(cell, hosts=1, rate="1gbit"):
    """What -> (value, met)."""
    return {t["what"]: (pytest.approx(t["value"]), t["met"]) for t in exchange.targets(cell, hosts, rate)}


def test_targets_on_one_host():
    cell = measured(compute=10.0, ddp=28.0, pattern_sync=50.0, all_reduce=10.0, ps_sync=14.0, ps_async=12.5)
    assert list(verdicts(cell).values()) == [(1.0, True), (2.8, True), (1.4, False), (50 / 14, False), (0.8, True)]
    slower = measured(compute=10.0, ddp=28.0, pattern_sync=50.0, all_reduce=11.6, ps_sync=12.5, ps_async=12.6)
    assert [met for _, met in verdicts(slower).values()] == [False, False, True, True, False]


def test_targets_between_two_hosts():
    assert list(verdicts(measured(ddp=100.0, all_reduce=105.0), 2).values()) == [(1.05, True)]
    cell = measured(ddp=100.0, all_reduce=105.0, all_reduce_bf16=50.0, all_reduce_topk=9.0)
    assert verdicts(cell, 2, "100mbit") == {"distml all_reduce, topk: times faster than DDP": (100 / 9, True)}


def test_no_target_without_its_contenders_or_for_another_cell():
    assert verdicts(measured(compute=1.0, ps_async=1.0)).keys() == {
        "parameter_server async, updates per second over workers / compute only"
    }
    assert not verdicts(measured(ddp=1.0), 2, "100mbit")
    assert not verdicts({**measured(compute=1.0, all_reduce=1.0), "workers": 4})


def test_every_repeat_has_each_contender_once_and_begins_with_another():
    orders = [exchange.in_turn(ONE_HOST, repeat, 3) for repeat in range(3)]
    assert all(sorted(order) == sorted(ONE_HOST) for order in orders)
    assert len({order[0] for order in orders}) == 3


def test_a_report_is_json_and_its_tables_are_even():
    cell = measured(compute=10.0, all_reduce=11.0)
    cell["errors"] = {"ddp": "rank 1: it broke"}
    cell["targets"] = exchange.targets(cell, 1, "1gbit")
    about = {"hosts": 1, "rate": None, "repeats": 3, "cpus": 2, "load_before": 0.1, "torch": "2", "ray": "2"}
    report = json.loads(json.dumps({"bench": "exchange", "conditions": about, "cells": [cell]}))
    [(title, header, body, lines)] = exchange.tables(report)
    assert title == "4.2M parameters, 2 workers, sgd, one host"
    assert all(len(row) == len(header) for row in body)
    assert [row[4] for row in body] == ["1.00", "1.10"]
    assert "target at most 1.15: met" in lines[0]
    assert "torch DDP, gloo failed: rank 1: it broke" in lines
    assert "torch DDP, gloo did not come to an end" in exchange.failure(report)
    about["batch_per_worker"] = 16
    assert exchange.draw({**report, "conditions": about}).startswith(b"\x89PNG")


def test_rates_are_written_as_people_do():
    assert [figure.rate_name(rate) for rate in exchange.RATES] == ["1 Gbit/s", "100 Mbit/s"]


def test_async_is_measured_in_updates_and_others_in_their_slowest_worker():
    plan = Plan(2, 4, 2)
    quick, slow = ([gap * n for n in range(12)] for gap in (0.010, 0.020))
    times = [Times(quick, quick), Times(slow, slow)]
    sampler = exchange.Sampler(dict)
    sampler.at, sampler.readings = (
        [0.0, 1.0],
        [{"processor_s": 0.0, "others_s": 0.0}, {"processor_s": 2.0, "others_s": 0.5}],
    )
    assert exchange.one_repeat("ddp", times, plan, sampler, 1)["ms_per_step"] == pytest.approx(20)
    floor = exchange.one_repeat("compute", times, plan, sampler, 1)
    assert floor["ms_per_step"] == pytest.approx(15)
    assert floor["least_ms_per_step"] == pytest.approx(10)
    assert floor["others_cpus"] == pytest.approx(0.5)
    asynchronous = exchange.one_repeat("ps_async", times, plan, sampler, 1)
    assert asynchronous["updates_per_s"] == pytest.approx(150, rel=0.15)
    assert asynchronous["ms_per_step"] == pytest.approx(2e3 / asynchronous["updates_per_s"])
    assert asynchronous["worker_cpu_ms_per_step"] == pytest.approx(15)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_spec_of_ours_is_valid(name, tmp_path):
    path = write_spec(name, CELL, exchange.plan_for(name, CELL, 1, "1gbit"), 1, tmp_path)
    job = load_spec(path).job
    assert job.batch_size == 32
    assert job.stop.steps > 100


def test_async_runs_have_as_many_updates_as_gradients(tmp_path):
    def steps(name):
        return yaml.safe_load(write_spec(name, CELL, Plan(20, 20, 2), 1, tmp_path).read_text())["stop"]["steps"]

    assert (steps("all_reduce"), steps("ps_async"), steps("ps_ssp")) == (61, 122, 122)


def test_every_contender_has_a_label():
    assert {*ONE_HOST, *TWO_HOSTS} <= set(LABELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "5M"], "--size 5M is not known; choose from 0.1M, 4.2M, 25M"),
        (["--contenders", "horovod"], "--contenders horovod is not known; choose from compute, ddp"),
        (["--workers", "0"], "--workers 0 is not possible"),
        (["--hosts", "3"], "--hosts 3 is not possible"),
        (["--hosts", "2", "--contenders", "ray_train"], "--contenders ray_train is not known"),
        (["--repeats", "0"], "--repeats 0 is not possible"),
        (["--plot", "no/such/folder/p.png"], "there is no folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments, message, capsys):
    assert main(["bench", "exchange", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_options_of_one_measurement_are_refused_by_the_others(capsys):
    assert main(["bench", "loop", "--size", "4.2M"]) == 2
    assert "distml bench loop has no option --size" in capsys.readouterr().err


def test_a_process_that_fails_ends_the_others_and_is_named(tmp_path):
    host = contenders.ThisHost()
    waits = [host, ["-c", "import time; time.sleep(600)"]]
    breaks = [host, ["-c", "import sys; print('it broke', file=sys.stderr); sys.exit(3)"]]
    with pytest.raises(RunError, match="ended with 3: it broke"):
        contenders.run_all([waits, breaks], {}, tmp_path)


def test_two_contenders_for_real(monkeypatch, capsys):
    monkeypatch.setattr(exchange, "plan_for", lambda *_: Plan(2, 5, 2))
    options = ["--size", "0.1M", "--repeats", "1", "--contenders", "compute,all_reduce", "--json"]
    assert main(["bench", "exchange", *options]) == 0
    [cell] = json.loads(capsys.readouterr().out)["cells"]
    floor, ours = cell["contenders"]["compute"], cell["contenders"]["all_reduce"]
    assert floor["ratio_to_compute"] == 1.0
    assert ours["ms_per_step"]["median"] > 0
    assert ours["cpu_ms_per_step"]["median"] > 0
    assert ours["bytes_per_step"]["median"] > 0
    assert ours["transport"]
