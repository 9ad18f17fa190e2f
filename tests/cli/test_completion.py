"""Completion scripts, tried in bash itself where there is one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dqrm.cli import cli
from dqrm.config import RunConfig
from dqrm.configuration import describe_fields, shipped_configs

Run = Callable[..., Result]

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def complete(shell: str, *words: str) -> list[str]:
    """What a shell is told for a line whose last word is being typed."""
    variables = {"_DQRM_COMPLETE": f"{shell}_complete"}
    if shell == "fish":
        variables |= {"COMP_WORDS": " ".join(words[:-1]), "COMP_CWORD": words[-1]}
    else:
        separator = "\n" if shell == "bash" else " "
        variables |= {"COMP_WORDS": separator.join(words), "COMP_CWORD": str(len(words) - 1)}
    done = CliRunner().invoke(cli, [], env=variables)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    if shell == "bash":
        return [line.partition(",")[2] for line in lines if line.startswith("plain,")]
    return lines


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(dqrm: Run, shell: str) -> None:
    result = dqrm("completion", shell)
    assert result.exit_code == 0
    assert f"_DQRM_COMPLETE={shell}_complete" in result.stdout
    assert result.stdout.startswith("# ")


def test_unknown_shell(dqrm: Run) -> None:
    result = dqrm("completion", "tcsh")
    assert result.exit_code == 2
    assert "bash" in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dqrm", "tra"], ["train", "tracking"]),
        (["dqrm", "configs", ""], ["ls", "cp"]),
        (["dqrm", "train", "quant.b"], ["quant.bits="]),
        (["dqrm", "train", "quant.bits", "="], ["2", "4", "8", "16", "32"]),
        (["dqrm", "train", "quant.granularity", "=", "r"], ["row"]),
        (["dqrm", "train", "quant.bits", "=", "4", "optim.na"], ["optim.name="]),
        (["dqrm", "train", "--no-t"], ["--no-track"]),
        (["dqrm", "eval", "--split", "te"], ["test"]),
        (["dqrm", "eval", "--split", "=", "te"], ["test"]),
        (["dqrm", "data", "synth", "zip"], ["zipf="]),
        (["dqrm", "config", "--for", "prepare", "min_"], ["min_frequency="]),
    ],
    ids=lambda value: " ".join(value) if value[0] == "dqrm" else None,
)
def test_bash_words(words: list[str], expected: list[str]) -> None:
    assert complete("bash", *words) == expected


def test_names_of_shipped_configurations() -> None:
    names = list(shipped_configs())
    assert complete("bash", "dqrm", "train", "--config", "") == names
    assert complete("bash", "dqrm", "configs", "cp", "") == names


def test_names_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fp32", "int4", "int8"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    assert complete("bash", "dqrm", "compare", "fp32", "int") == ["int4", "int8"]


def test_every_key_is_offered_in_fish() -> None:
    keys = [f"{field.path}=" for field in describe_fields(RunConfig)]
    offered = complete("fish", "dqrm", "train", "optim.")
    assert [line.partition(",")[2].partition("\t")[0] for line in offered] == [
        key for key in keys if key.startswith("optim.")
    ]
    (line,) = complete("fish", "dqrm", "train", "quant.granularity=r")
    assert line.endswith("quant.granularity=row")


@needs_bash
def test_bash_itself(tmp_path: Path) -> None:
    """Press the key in a real bash: source the script and call what it registers."""
    program = tmp_path / "dqrm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m dqrm "$@"\n')
    program.chmod(0o755)
    script = """
        eval "$(dqrm completion bash)"
        complete -p dqrm
        compopt() { printf "%s;" "$@"; echo; }
        COMP_WORDS=(dqrm train quant.bits = 1); COMP_CWORD=4
        _dqrm_completion dqrm; echo "${COMPREPLY[*]}"
        COMP_WORDS=(dqrm train quant.bi); COMP_CWORD=2; COMPREPLY=()
        _dqrm_completion dqrm; echo "${COMPREPLY[*]}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "complete -o nosort -F _dqrm_completion dqrm",
        "16",
        "-o;nospace;",
        "quant.bits=",
    ]
