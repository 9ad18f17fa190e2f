"""pipelines/MLproject calls commands that exist."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dqrm.tracking.quiet import import_mlflow

MAIN = "from dqrm.cli import main; main()"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("entry", "parameters", "expected"),
    [
        ("train", {}, "dqrm train --config census quant.bits=4 train.seed=0"),
        (
            "train",
            {"bits": "8", "config": "c.yaml", "run-name": "a"},
            "dqrm train --config c.yaml quant.bits=8 train.seed=0 --run-name a",
        ),
        ("eval", {"run": "runs/a"}, "dqrm eval runs/a --split test"),
    ],
    ids=["defaults", "own-values", "eval"],
)
def test_commands(entry: str, parameters: dict[str, str], expected: str) -> None:
    import_mlflow()
    from mlflow.projects._project_spec import load_project

    project = load_project(str(ROOT / "pipelines"))
    command = project.get_entry_point(entry).compute_command(parameters, None)
    assert command == f"cd .. && {expected}"
    arguments = [word for word in shlex.split(expected)[1:] if word.startswith("--")]
    done = subprocess.run(
        [sys.executable, "-c", MAIN, entry, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for option in arguments:
        assert option in done.stdout
