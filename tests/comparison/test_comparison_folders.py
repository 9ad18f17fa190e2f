"""Comparing runs by their folders: table, differences, sparse and damaged runs, errors."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from dqrm.comparison.differences import Difference, differences, grouped
from dqrm.comparison.folders import read_folder

Make = Callable[..., Path]
Run = Callable[..., Result]


def lines(result: Result) -> list[list[str]]:
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.stdout.splitlines()]


def test_the_table_marks_the_best_and_shows_settings_that_differ(dqrm: Run, make: Make) -> None:
    make("fp32", auc=0.81, quant__bits=32)
    make("int4", auc=0.80)
    found = lines(dqrm("compare", "fp32", "int4"))
    header, fp32, int4 = found[:3]
    assert " ".join(header).startswith("run test AUC test log loss calibration validation AUC")
    assert fp32[1] == "0.8100*"
    assert int4[1] == "0.8000"
    # 1,000 bytes against 8,000.
    assert "1000" in int4
    assert "B*" in int4
    assert ["quant.bits", "32", "4"] in found
    assert not any(row and row[0] in ("data.path", "train.seed", "name") for row in found)


def test_equal_figures_are_not_told_apart(dqrm: Run, make: Make) -> None:
    make("one", auc=0.80001)
    make("two", auc=0.80002, quant__bits=8)
    make("three", auc=0.7, quant__bits=2)
    found = lines(dqrm("compare", "one", "two", "three"))
    assert [row[1] for row in found[1:4]] == ["0.8000*", "0.8000*", "0.7000"]


def test_seeds_are_one_line_of_means(dqrm: Run, make: Make) -> None:
    make("int4-seed0", auc=0.80)
    make("int4-seed1", auc=0.82, train__seed=1)
    make("fp32", auc=0.81, quant__bits=32)
    result = dqrm("compare", "runs/fp32", "runs/int4-seed0", "runs/int4-seed1")
    found = lines(result)
    [mean] = [row for row in found if row[:2] == ["int4", "(2)"]]
    assert mean[2:5] == ["0.8100", "+-", "0.0141"]
    assert ["setting", "fp32", "int4"] in found
    assert "train.seed" not in result.stdout


def test_a_narrow_terminal_gets_narrow_tables(
    dqrm: Run, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    make("fp32", quant__bits=32)
    make("int4", train__epochs=9)
    result = dqrm("compare", "fp32", "int4")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 60
    assert result.stdout.count("\nrun ") >= 1


def test_speeds_are_medians_and_killed_runs_have_what_they_measured(make: Make) -> None:
    [run] = read_folder(make("killed", finished=False))
    assert run.status == "UNFINISHED"
    assert run.steps_per_epoch == 10
    assert run.metrics["perf/samples_per_second"] == 2000.0
    assert run.metrics["best/val_auc"] == 0.8
    assert "test/auc" not in run.metrics
    assert run.curves["val/auc"] == ((10, 0.78), (20, 0.8), (30, 0.79))


def test_runs_that_measured_different_things_are_compared(dqrm: Run, make: Make) -> None:
    make("whole")
    make("untested", tested=False, quant__bits=8)
    make("killed", finished=False, quant__bits=2)
    make("old", measured=False, history=[{"step": 3, "train/loss": 0.5}], train__epochs=1)
    result = dqrm("compare", "whole", "untested", "killed", "old", "--json", "all.json")
    found = {row[0]: row for row in lines(result)[1:5]}
    assert found["untested"][1:3] == ["-", "-"]
    assert found["killed"][-1] == "unfinished"
    fields = json.loads(Path("all.json").read_text())
    assert [run["name"] for run in fields["runs"]] == ["whole", "untested", "killed", "old"]
    assert fields["differences"]["quant.bits"] == ["4", "8", "2", "4"]
    assert fields["runs"][0]["measurements"]["tables"][0]["relative_error"] == 0.1
    assert fields["runs"][3]["curves"] == {"train/loss": [[3, 0.5]]}


def test_settings_that_only_some_know_are_set_apart() -> None:
    unequal, partial = differences(
        [{"a": "1", "b": "1"}, {"a": "2"}, {"a": "1", "train.seed": "3"}]
    )
    assert [(found.key, found.values) for found in unequal] == [("a", ("1", "2", "1"))]
    assert [(found.key, found.values) for found in partial] == [("b", ("1", None, None))]


def test_long_numbers_are_cut_where_they_stay_apart() -> None:
    far = Difference("optim.lr", ("0.011781448719376511", "0.01", None))
    assert far.texts(24) == ["0.011781", "0.01", "-"]
    near = Difference("optim.lr", ("0.011781448", "0.011781449"))
    assert near.texts(24) == ["0.011781448", "0.011781449"]
    path = Difference("data.path", ("prepared/clicks/of/2026-11-20", "x"))
    assert path.texts(20) == ["prepared/...26-11-20", "x"]


def test_groups_keep_their_order_and_have_names_of_their_own(make: Make) -> None:
    runs = [
        *read_folder(make("a0", quant__bits=8)),
        *read_folder(make("x-seed7", train__seed=7)),
        *read_folder(make("x-seed8", train__seed=8)),
        *read_folder(make("x-other", quant__bits=2)),
        *read_folder(make("census-20261121-1249", quant__bits=16)),
        *read_folder(make("census-20261121-1255", quant__bits=16, train__seed=10)),
    ]
    groups = grouped(runs)
    assert [group.name for group in groups] == ["a0", "x", "x-other", "census-20261121"]
    assert groups[1].seeds == ["7", "8"]


def test_stages_of_a_pipeline_are_runs(dqrm: Run) -> None:
    folder = Path("runs/reviews")
    for name, accuracy in (("tune", 0.9), ("small", 0.88)):
        stage = folder / "stages" / name
        stage.mkdir(parents=True)
        metrics = {"test/accuracy": accuracy, "size/encoder_bytes": 1e6 * accuracy}
        record = {"stage": "compress", "digest": "0" * 40, "metrics": metrics}
        (stage / "stage.json").write_text(json.dumps(record))
    stages = [{"stage": "finetune", "name": "tune", "epochs": 3}, {"stage": "small", "epochs": 1}]
    (folder / "pipeline.yaml").write_text(json.dumps({"name": "reviews", "stages": stages}))
    found = lines(dqrm("compare", "runs/reviews"))
    assert found[1][:2] == ["reviews/small", "0.8800"]
    assert found[2][:2] == ["reviews/tune", "0.9000*"]
    assert ["epochs", "1", "3"] in found
    one = lines(dqrm("compare", "runs/reviews/stages/tune"))
    assert one[1] == ["reviews/tune", "0.9000", "878.9", "KiB"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["int4-sed0"], "no such run; did you mean int4-seed0"),
        (["zzz"], "no such run; looked in folder runs"),
        (["int4-s"], "fits 2 runs: int4-seed0, int4-seed1; write one of them out, or name all"),
        (["runs"], "this is no run"),
        (["int4-seed0", "--best", "2"], "name runs, or let --best N choose them"),
        ([], "name runs, or let --best N choose them"),
        (["--best", "2"], "no runs are recorded in sqlite:///"),
    ],
    ids=["mistyped", "unknown", "ambiguous", "no-run", "both", "neither", "no-store"],
)
def test_what_cannot_be_compared_is_said(
    dqrm: Run, make: Make, words: list[str], message: str
) -> None:
    make("int4-seed0")
    make("int4-seed1")
    result = dqrm("compare", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not Path("mlflow.db").exists(), "looking makes no store"


def test_a_damaged_file_is_named(dqrm: Run, make: Make) -> None:
    (make("broken") / "measurements.json").write_text('{"format_version": 1')
    result = dqrm("compare", "broken")
    assert result.exit_code == 2
    assert "runs/broken/measurements.json: damaged" in result.stderr


def test_a_run_named_twice_is_compared_once(dqrm: Run, make: Make) -> None:
    make("int4")
    assert sum("int4" in row for row in lines(dqrm("compare", "int4", "runs/int4", "int"))) == 1
