"""`dqrm bits`: bits of each table under a budget, and training with them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]

SMALL = [
    *("model.bottom_mlp=[16]", "model.top_mlp=[16]", "model.embedding_dim=4"),
    *("data.batch_size=128", "train.threads=1", "--no-track"),
]


@pytest.fixture
def fp32(dqrm: Run, dataset: Path) -> Path:
    done = dqrm("train", f"data.path={dataset}", *SMALL, "quant.bits=32", "-n", "fp32")
    assert "packed size" in done.stdout, "tables are FP32, and the networks have 4 bits"
    assert done.exit_code == 0, done.stderr
    return Path("runs/fp32")


def test_what_is_printed_trains_within_the_budget(dqrm: Run, dataset: Path, fp32: Path) -> None:
    found = dqrm("bits", fp32, "--like", "4")
    assert found.exit_code == 0, found.stderr
    argument = found.stdout.removesuffix("\n")
    assert argument.startswith("quant.table_bits={")
    assert "\n" not in argument
    told = json.loads(dqrm("bits", fp32, "--like", "4", "--json").stdout)
    assert json.loads(argument.partition("=")[2]) == told["table_bits"]
    place = told["options"].index(4)
    tables = told["tables"].values()
    assert told["bytes"] <= sum(table["bytes"][place] for table in tables)
    assert told["expected_loss"] < sum(table["expected_loss"][place] for table in tables)
    assert len(set(told["table_bits"].values())) > 1

    done = dqrm("train", f"data.path={dataset}", *SMALL, argument, "-n", "mixed")
    assert done.exit_code == 0, done.stderr
    measured = json.loads(Path("runs/mixed/measurements.json").read_text())["tables"]
    assert {table["name"]: table["bits"] for table in measured} == told["table_bits"]
    assert sum(table["packed_bytes"] for table in measured) == told["bytes"]


def test_scales_of_rows_are_within_the_budget_too(dqrm: Run, dataset: Path, fp32: Path) -> None:
    found = dqrm("bits", fp32, "--ratio", "3", "--granularity", "row")
    assert "one a row" in found.stderr
    told = json.loads(dqrm("bits", fp32, "--ratio", "3", "--granularity", "row", "--json").stdout)
    assert told["granularity"] == "row"
    row = ("quant.granularity=row", found.stdout.strip(), "train.max_steps=1", "-n", "rows")
    done = dqrm("train", f"data.path={dataset}", *SMALL, *row)
    assert done.exit_code == 0, done.stderr
    measured = json.loads(Path("runs/rows/measurements.json").read_text())["tables"]
    taken = sum(table["packed_bytes"] for table in measured)
    assert taken == told["bytes"] <= told["fp32_bytes"] / 3


def test_a_ratio_and_other_options(dqrm: Run, fp32: Path) -> None:
    line = ("bits", fp32, "--ratio", "3", "--options", "16,8,2", "--batches", "2", "--json")
    told = json.loads(dqrm(*line).stdout)
    assert told["fp32_bytes"] / told["bytes"] >= 3
    assert set(told["table_bits"].values()) <= {16, 8, 2}
    checkpoint = sorted((fp32 / "checkpoints").iterdir())[-1]
    assert json.loads(dqrm("bits", checkpoint, *line[2:]).stdout) == told


def test_what_it_cannot_do_it_says(dqrm: Run, fp32: Path) -> None:
    for arguments, message in (
        ((fp32,), "set --ratio or --like"),
        ((fp32, "--ratio", "4", "--like", "4"), "set --ratio or --like"),
        ((fp32, "--like", "3"), "--like 3: name one of the --options, 8, 4, 2"),
        ((fp32, "--ratio", "4", "--options", "8"), "name two or more"),
        ((fp32, "--ratio", "4", "--options", "8,8"), "name two or more"),
        ((fp32, "--ratio", "4", "--options", "8,3"), "'3': tables have 2, 4, 8, 16, 32 bits"),
        ((fp32, "--ratio", "40"), "the cheapest candidates cost"),
        ((fp32 / "artifact", "--ratio", "4"), "holds no checkpoint"),
        (("runs/none", "--ratio", "4"), "runs/none: no such run or checkpoint"),
    ):
        done = dqrm("bits", *arguments)
        assert done.exit_code == 2, (arguments, done.stderr)
        assert message in done.stderr, (arguments, done.stderr)
    (fp32 / "summary.json").unlink()
    done = dqrm("bits", fp32, "--ratio", "4")
    assert done.exit_code == 2
    assert "that run has not finished" in done.stderr
