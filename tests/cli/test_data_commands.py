"""`dqrm data` from end to end on small files."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from dqrm.cli.data_prepare import split_arguments

Run = Callable[..., Result]

SCHEMA = """\
format: csv
schema:
  label: click
  dense: [age, {name: price, transform: none}]
  categorical: [city, {name: tags, multi_hot: true}]
split: {by: fraction, validation: 0.2, test: 0.2}
"""


def write_csv(path: Path, rows: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    lines = ["click,age,price,city,tags"]
    for _ in range(rows):
        tags = "|".join(draw.sample("abcdef", draw.randint(0, 3)))
        city = draw.choice(["Bern", "Chur", "Genf", ""])
        lines.append(
            f"{draw.randint(0, 1)},{draw.randint(0, 90)},{draw.random():.3f},{city},{tags}"
        )
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "clicks.yaml").write_text(SCHEMA)
    write_csv(tmp_path / "clicks.csv", 300)
    return tmp_path


def test_prepare_describe_apply(dqrm: Run, files: Path) -> None:
    prepared = dqrm(
        *("data", "prepare", "clicks.csv", "-o", "out/clicks", "-c", "clicks.yaml", "--json"),
        *("workers=1", "min_frequency=2"),
    )
    assert prepared.exit_code == 0, prepared.stderr
    report = json.loads(prepared.stdout)
    assert report["rows"] == 300
    assert report["malformed"] == 0
    assert sum(report["split_rows"].values()) == 300

    described = dqrm("data", "describe", "out/clicks", "--json", "--embedding-dim", "8")
    figures = json.loads(described.stdout)
    assert figures["digest"] == report["digest"]
    assert [table["name"] for table in figures["tables"]] == ["city", "tags"]
    assert figures["embedding_dim"] == 8
    text = dqrm("data", "describe", "out/clicks", "--plot", "skew.png")
    assert "city" in text.stdout
    assert (files / "skew.png").read_bytes().startswith(b"\x89PNG")

    write_csv(files / "new.csv.gz", 50, seed=1)
    applied = dqrm("data", "apply", "new.csv.gz", "--like", "out/clicks", "-o", "out/new")
    assert applied.exit_code == 0, applied.stderr
    assert "50 test" in applied.stdout
    assert "dqrm eval RUN --data out/new" in applied.stdout


def test_a_second_run_says_what_to_do(dqrm: Run, files: Path) -> None:
    line = ("data", "prepare", "clicks.csv", "-o", "out", "-c", "clicks.yaml", "workers=1")
    assert dqrm(*line).exit_code == 0
    again = dqrm(*line)
    assert again.exit_code == 2
    assert "overwrite" in again.stderr
    assert dqrm(*line, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "-o", "out"], "name at least one file"),
        (["prepare", "absent.csv", "-o", "out", "-c", "clicks.yaml"], "absent.csv"),
        (["prepare", "clicks.csv"], "--output"),
        (["prepare", "clicks.csv", "-o", "out", "formt=csv"], "did you mean format?"),
        (["prepare", "clicks.csv", "-o", "out", "format=xls"], "format=xls: must be"),
        (["prepare", "clicks.csv", "-o", "out", "split.by=luck"], "split.by=luck: must be one of"),
        (
            ["prepare", "clicks.csv", "-o", "out", "-c", "clicks.yaml", "split.test=2"],
            "split.test=2",
        ),
        (["prepare", "clicks.csv", "-o", "out", "-c", "none.yaml"], "no such configuration file"),
        (["apply", "clicks.csv", "--like", "absent", "-o", "out"], "absent"),
        (["apply", "clicks.csv", "-o", "out"], "--like"),
        (["describe", "absent"], "absent: no such folder"),
        (["describe", "clicks.csv"], "is a file"),
        (["synth"], "--output"),
        (["synth", "-o", "out", "scale=2"], "scale=2: must be less than or equal to 1"),
        (["synth", "-o", "out", "--scale", "0.1", "scale=0.1"], "give only one of them"),
        (["synth", "-o", "out", "row=100"], "did you mean rows?"),
    ],
    ids=lambda value: "-".join(value[:1] + value[-1:]) if isinstance(value, list) else None,
)
def test_mistakes(dqrm: Run, files: Path, arguments: list[str], message: str) -> None:
    before = sorted(files.iterdir())
    result = dqrm("data", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(files.iterdir()) == before, "nothing half-written"


def test_too_many_malformed_lines(dqrm: Run, files: Path) -> None:
    with (files / "clicks.csv").open("a") as file:
        file.write("7,1,1,Bern,a\n" * 20)
    result = dqrm("data", "prepare", "clicks.csv", "-o", "out", "-c", "clicks.yaml", "workers=1")
    assert result.exit_code == 2
    assert "clicks.csv:302" in result.stderr
    assert not (files / "out" / "dataset.json").exists()
    allowed = dqrm(
        *("data", "prepare", "clicks.csv", "-o", "out", "-c", "clicks.yaml", "workers=1"),
        *("max_malformed=20", "--overwrite"),
    )
    assert allowed.exit_code == 0, allowed.stderr
    assert "20 lines left out" in allowed.stdout
    assert "malformed: " in allowed.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [("formt=csv", "did you mean format?"), ("min_frequency=3", "the data set decides it")],
)
def test_apply_changes_only_how_rows_are_read(
    dqrm: Run, files: Path, change: str, message: str
) -> None:
    line = ("data", "prepare", "clicks.csv", "-o", "out", "-c", "clicks.yaml", "workers=1")
    assert dqrm(*line).exit_code == 0
    result = dqrm("data", "apply", "clicks.csv", "--like", "out", "-o", "new", change)
    assert result.exit_code == 2
    assert message in result.stderr


def test_synth(dqrm: Run, tmp_path: Path) -> None:
    result = dqrm("data", "synth", "--scale", "0.0001", "-o", "synth", "rows=3000")
    assert result.exit_code == 0, result.stderr
    assert "best test AUC" in result.stdout
    assert "dqrm train data.path=synth" in result.stdout
    again = dqrm("data", "synth", "--scale", "0.0001", "-o", "other", "rows=3000", "--json")
    figures = json.loads(again.stdout)
    assert figures["digest"] in result.stdout, "the same settings give the same data"
    assert 0.5 < figures["bayes_test"]["auc"] < 1.0
    twice = dqrm("data", "synth", "-o", "synth", "rows=3000")
    assert twice.exit_code == 2
    assert "synth: exists already" in twice.stderr


def test_files_and_overrides_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "odd=name.csv").touch()
    arguments = ("a.csv", "format=csv", "odd=name.csv", "split.by=file", "dir/b=c.csv")
    files, overrides = split_arguments(arguments)
    assert files == ["a.csv", "odd=name.csv", "dir/b=c.csv"]
    assert overrides == ["format=csv", "split.by=file"]
