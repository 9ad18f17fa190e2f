"""Contestants take turns, batches are what they say, bars are judged, absent peers are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dqrm.bench.speed import peers
from dqrm.bench.speed.bars import BARS, verdicts
from dqrm.bench.speed.contestants import Entry, Unavailable
from dqrm.bench.speed.groups import KERNELS, TRAIN, Group
from dqrm.bench.speed.report import (
    as_metrics,
    as_record,
    bar_lines,
    case_rows,
    phase_rows,
    rate_text,
    shown,
)
from dqrm.bench.speed.study import Plan, run_study
from dqrm.bench.speed.timing import WARM_UP_CALLS, Runner, Spread, take_turns
from dqrm.bench.speed.traffic import Shape, default_max_rows, kaggle_shape, make_traffic
from dqrm.training import step as step_module

GROUPS = {group.name: group for group in (*KERNELS, TRAIN)}
TINY = Plan(
    batches=(8,), kinds=("uniform",), threads=(1,), rounds=2, scale=1e-5, ring_lookups=1000,
    turn_seconds=1e-4,
)  # fmt: skip


def silent(key: str, done: int, total: int) -> None:
    assert 0 < done <= total, key


def test_every_contestant_works_in_every_round():
    calls = {"a": [], "b": []}
    runners = [Runner(name, numbers.append) for name, numbers in calls.items()]
    told = []
    timings = take_turns(
        runners, rounds=4, turn_seconds=0.0, seed=0, progress=lambda *p: told.append(p)
    )
    for timing, numbers in zip(timings, calls.values(), strict=True):
        assert timing.calls_per_turn == 1
        assert len(timing.cpu_seconds) == len(timing.wall_seconds) == 4
        # Batches follow each other: warm-up, calibration, then one untimed and one timed a turn.
        assert numbers == list(range(WARM_UP_CALLS + 1 + 4 * 2))
    assert told == [(done, 10) for done in range(1, 11)]


def test_spread_is_of_the_middle_half():
    spread = Spread.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (spread.smallest, spread.lower_quartile, spread.median) == (1.0, 2.0, 3.0)
    assert spread.upper_quartile == 4.0
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0)


def test_the_tables_are_those_of_criteo_kaggle():
    shape = kaggle_shape(16, 1.0, default_max_rows(16))
    assert (len(shape.rows), shape.total_rows) == (26, 33_762_577)
    assert max(kaggle_shape(64, 1.0, default_max_rows(64)).rows) == 1_000_000
    assert min(kaggle_shape(16, 1e-9, None).rows) == 1


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
def test_ids_lie_in_their_tables_and_skew_is_skew(kind):
    shape = Shape((1, 5, 100_000), 4)
    traffic = make_traffic(shape, 1000, kind, seed=3, ring_lookups=60_000)
    assert len(traffic.batches) == 20
    ids = torch.cat(list(traffic.batches), dim=1)
    assert ids.shape == (3, 20_000)
    assert ids.dtype == torch.int64
    for column, rows in zip(ids, shape.rows, strict=True):
        assert int(column.min()) >= 0
        assert int(column.max()) < rows
    top = ids[2].unique(return_counts=True)[1].sort(descending=True)[0][:100].sum() / 20_000
    # 100 ids of 100,000: 0.1 % of uniform draws and a few; about half of those of a Zipf law.
    assert (top < 0.05) if kind == "uniform" else (0.3 < top < 0.8)
    again = make_traffic(shape, 1000, kind, seed=3, ring_lookups=60_000)
    assert all(torch.equal(a, b) for a, b in zip(traffic.batches, again.batches, strict=True))


def test_bars_are_judged_against_the_fastest_rival():
    seconds = {"dqrm INT4": 1.0, "dqrm FP32": 0.99, "slow": 9.0, "fast": 2.2}
    at_2048 = verdicts("train", 2048, 16, seconds, ["slow", "fast"])
    assert [(v.against, round(v.ratio, 2), v.met) for v in at_2048] == [
        ("fast", 2.2, True),
        ("dqrm FP32", 0.99, True),
    ]
    assert [v.met for v in verdicts("train", 128, 16, seconds, ["slow", "fast"])] == [False, True]
    gathers = {"dqrm INT4": 1.0, "random gather, 0 ahead": 1.2, "random gather, 8 ahead": 0.8}
    (limit,) = verdicts("packed-one-table", 2048, 16, gathers, [])
    assert (limit.against, limit.met) == ("random gather, 8 ahead", False)
    assert verdicts("sgd", 2048, 128, seconds, ["fast"]) == []


def test_every_bar_names_contestants_that_exist():
    for bar in BARS:
        shape = GROUPS[bar.group].tables(16, 1e-5, None)
        names = {entry.name for entry in GROUPS[bar.group].entries(shape)}
        roots = names | {name.partition(",")[0] for name in names}
        assert set(bar.against) | set(bar.ours) <= roots, bar


@pytest.mark.parametrize("name", [name for name in GROUPS if name not in ("interaction", "mlp")])
def test_everybody_in_a_group_does_the_work(name):
    only = [
        entry.name
        for entry in GROUPS[name].entries(Shape((3, 5), 4))
        if "compile" not in entry.name
    ]
    (case,) = run_study([GROUPS[name]], TINY, progress=silent, only=only)
    taken = {found.name for found in case.measured}
    assert taken | set(case.skipped) == set(only)
    assert all("not installed" in reason for reason in case.skipped.values())
    for found in case.measured:
        assert len(found.timing.cpu_seconds) == TINY.rounds
        assert set(found.slower_than) == {
            other.name for other in case.measured if other.role == "ours"
        } - {found.name}
    header, lines = case_rows(case)
    assert all(len(line) == len(header) for line in lines)
    assert [line[5] for line in bar_lines([case])] == [
        "met" if bar.met else "short" for bar in case.bars
    ]
    (record,) = json.loads(json.dumps(as_record([case])))
    assert record["key"] == case.key
    assert {found["name"] for found in record["measured"]} == taken
    metrics = as_metrics([case])
    assert len(metrics) == 3 * len(taken)
    assert all(value > 0 for value in metrics.values())


@pytest.mark.parametrize(
    ("name", "only"),
    [
        pytest.param(
            "interaction", ("dqrm", "torch.compile FP32"), marks=pytest.mark.slow, id="compiled"
        ),
        ("interaction", ("dqrm", "torch eager BF16")),
        ("mlp", ("dqrm INT4", "dqrm BF16", "torch autocast", "torch BF16", "torch FP32")),
    ],
)
def test_parts_without_tables(name, only):
    (case,) = run_study([GROUPS[name]], TINY, progress=silent, only=only)
    assert case.indices is None
    assert {found.name for found in case.measured} == set(only)
    assert all(found.gigabytes_per_second is None for found in case.measured)


def test_the_thread_count_is_put_back():
    before = torch.get_num_threads()
    list(run_study([GROUPS["forward"]], TINY, progress=silent, only=["dqrm FP32"]))
    assert torch.get_num_threads() == before


def test_a_contestant_that_does_not_fit_is_left_out(monkeypatch):
    def refuse():
        raise AssertionError("must not be built")

    group = Group("x", "x", lambda shape: [Entry("big", "peer", refuse, 1 << 60)], "look-ups")
    (case,) = run_study([group], TINY, progress=silent)
    assert "GiB are free" in case.skipped["big"]
    assert case.measured == []


def test_a_peer_that_does_not_load_is_named(monkeypatch, tmp_path):
    (tmp_path / "fbgemm_gpu").mkdir()
    (tmp_path / "fbgemm_gpu" / "__init__.py").write_text("raise OSError('made for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "fbgemm_gpu"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(Unavailable, match="FBGEMM does not load: made for another torch; pip"):
        peers.peer_module("fbgemm_gpu.anything")


@pytest.fixture
def without_peers(tmp_path: Path) -> dict[str, str]:
    """An environment in which FBGEMM and TorchRec are not installed."""
    folder = tmp_path / "absent"
    for name in ("fbgemm_gpu", "torchrec"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(
            f"raise ModuleNotFoundError('no module {name}', name='{name}')"
        )
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("command", "extra", "absent", "threads"),
    [
        (
            "kernels",
            ["--only", "sgd,packed", "--dim", "16", "--threads", "1,2", "--plot", "out.png"],
            ["FBGEMM EXACT_SGD"],
            [1, 2, 1, 2],
        ),
        (
            "train",
            [
                *("--threads", "1", "--track", "--only"),
                "dqrm INT4,dqrm FP32,torch eager BF16,FBGEMM + eager BF16,TorchRec BF16",
            ],
            ["FBGEMM + eager BF16", "TorchRec BF16"],
            [1],
        ),
    ],
)
def test_the_commands_from_end_to_end(command, extra, absent, threads, without_peers, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dqrm", "bench", command, *extra),
            *("--batch", "32", "--indices", "zipf", "--repeats", "2"),
            *("--scale", "1e-5", "--json", "out.json"),
        ],
        cwd=tmp_path,
        env=without_peers,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["command"] == f"bench {command}"
    assert record["plan"]["seed"] == 0
    assert record["tags"]["version.torch"] == torch.__version__
    assert record["peers"].keys() <= {"fbgemm-gpu-cpu", "torchrec"}
    if sys.platform.startswith("linux"):
        assert record["huge_pages_forced"] is True
    assert [case["threads"] for case in record["cases"]] == threads
    for case in record["cases"]:
        assert case["indices"] == "zipf"
        assert "dqrm INT4" in [found["name"] for found in case["measured"]]
        for found in case["measured"]:
            assert found["cpu"]["lower_quartile"] <= found["cpu"]["median"]
            if found["name"] != "dqrm INT4":
                assert found["slower_than"]["dqrm INT4"]["median"] > 0
    for name in absent:
        reason = record["cases"][0]["skipped"][name]
        assert "is not installed: pip install 'dqrm[bench]'" in reason
        assert f"{name}: left out: {reason}" in done.stdout
    assert "dqrm INT4 is" in done.stdout
    assert (tmp_path / "out.png").exists() == ("--plot" in extra)
    assert (f"recorded as bench-{command}-" in done.stdout) == ("--track" in extra)
    assert (tmp_path / "mlflow.db").exists() == ("--track" in extra)


def test_rates_have_three_digits():
    assert [rate_text(rate) for rate in (0.5, 12.0, 81_720_000.0)] == ["0.5", "12", "81.7 M"]


def test_our_steps_tell_where_their_time_goes():
    untouched = step_module.interaction_forward
    (case,) = run_study([TRAIN], TINY, progress=silent, only=["dqrm INT4", "torch eager FP32"])
    ours, peer = shown(case)
    assert peer.phases == {}
    assert sum(ours.phases.values()) > 0
    assert {"embedding forward", "top MLP backward", "everything else"} < set(ours.phases)
    header, lines = phase_rows(case)
    assert header == ["CPU ms", "dqrm INT4"]
    assert [line[0] for line in lines] == list(ours.phases)
    assert step_module.interaction_forward is untouched


def test_the_fastest_of_each_limit_is_shown():
    (case,) = run_study(
        [GROUPS["mlp"]],
        TINY,
        progress=silent,
        only=["dqrm BF16", "one BF16 product", "one INT8 product"],
    )
    assert {found.name for found in shown(case)} == {found.name for found in case.measured}
    (case,) = run_study([GROUPS["packed"]], TINY, progress=silent)
    assert sum(found.role == "limit" for found in shown(case)) == 1
