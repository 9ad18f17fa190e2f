"""The frame of the command line: lazy imports, help, examples, errors and exit codes."""

import errno
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import Result

from dqrm.cli import cli, errors, logs
from dqrm.cli.framework import DqrmCommand, LazyGroup, RootGroup

Run = Callable[..., Result]

HEAVY = [
    *("torch", "mlflow", "pandas", "pyarrow", "numpy", "matplotlib", "sklearn", "scipy"),
    *("pydantic", "yaml", "psutil"),
]


Place = tuple[str, ...]


def walk(command: click.Command, path: Place = ()) -> Iterator[tuple[Place, click.Command]]:
    yield path, command
    if isinstance(command, LazyGroup):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from walk(below, (*path, name))


COMMANDS = dict(walk(cli))


def test_the_commands_are_these() -> None:
    leaves = {" ".join(path) for path, found in COMMANDS.items() if isinstance(found, DqrmCommand)}
    assert leaves == {
        *("data prepare", "data describe", "data apply", "data synth"),
        *("train", "sweep", "eval", "bits", "config", "configs ls", "configs cp"),
        *("bench accuracy", "bench prepare", "bench exactness", "bench replicas"),
        *("bench kernels", "bench train", "bench exchange", "bench network"),
        *("jobs validate", "jobs list", "jobs run", "jobs serve", "jobs pause", "jobs resume"),
        *("jobs history", "jobs logs", "jobs export"),
        "bench transformers",
        *("study overfit", "study bits", "study scale-period", "study exchange"),
        *("study memory", "study multihot"),
        *("compare", "champion"),
        *("ui", "doctor", "tracking sync", "completion"),
        *("pipeline run", "pipeline validate", "pipeline ls", "pipeline cp", "pipeline import"),
        "profile",
    }


def test_help_of_every_command_imports_nothing_heavy() -> None:
    calls = [[*path, "--help"] for path in COMMANDS]
    code = (
        "import contextlib, io, json, sys\n"
        "from dqrm.cli import cli\n"
        "found = {}\n"
        "for call in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as text:\n"
        "        assert cli.main(call, standalone_mode=False) == 0, call\n"
        "    assert 'Usage: dqrm' in text.getvalue(), call\n"
        "    heavy = sorted(set(json.loads(sys.argv[2])) & set(sys.modules))\n"
        "    if heavy: found[' '.join(call)] = heavy\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls), json.dumps(HEAVY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


def test_help_of_the_group_imports_no_command() -> None:
    code = (
        "import sys; from dqrm.cli import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "loaded = [m for m in sys.modules if m.startswith('dqrm.')]\n"
        "print(sorted(loaded), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = {"app", "errors", "framework", "logs"}
    assert done.stderr.strip() == str(["dqrm.cli", *sorted(f"dqrm.cli.{name}" for name in names)])


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: "-".join(path) or "dqrm")
def test_every_command_explains_itself(dqrm: Run, path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    text = dqrm(*path, "-h")
    assert text.exit_code == 0
    assert text.stdout == dqrm(*path, "--help").stdout
    assert command.help
    assert command.get_short_help_str().endswith(".")
    if isinstance(command, DqrmCommand):
        assert command.examples, "worked examples"
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert option.help, f"{option.opts} has no help"
    for example, purpose in getattr(command, "examples", ()):
        assert example in text.stdout
        assert purpose in text.stdout


def test_lines_of_the_lists_match_the_commands() -> None:
    for path, command in COMMANDS.items():
        if isinstance(command, LazyGroup):
            for name, (_, line) in command.lazy.items():
                assert line == COMMANDS[(*path, name)].get_short_help_str(200), (path, name)


EXAMPLES = [
    (path, example)
    for path, command in COMMANDS.items()
    for example, _ in getattr(command, "examples", ())
]


@pytest.mark.parametrize(("path", "example"), EXAMPLES, ids=[text for _, text in EXAMPLES])
def test_examples_parse(path: tuple[str, ...], example: str) -> None:
    line = example.removeprefix('eval "$(').removesuffix(')"').partition(" >")[0]
    program, *words = shlex.split(line)
    assert program == "dqrm"
    command: click.Command = cli
    context = click.Context(cli, info_name="dqrm")
    while isinstance(command, LazyGroup):
        name, below, words = command.resolve_command(context, words)
        assert below is not None
        context = click.Context(below, info_name=name, parent=context)
        command = below
    if path:
        assert context.command_path.split()[1:] == list(path)
    if "--help" not in words:
        command.make_context(command.name, words, parent=context.parent)


def test_version(dqrm: Run) -> None:
    from dqrm import __version__

    assert dqrm("--version").stdout == f"dqrm, version {__version__}\n"


def test_a_mistyped_command_names_the_nearest(dqrm: Run) -> None:
    result = dqrm("trian")
    assert result.exit_code == 2
    assert "'train'" in result.stderr
    assert result.stdout == ""


def test_a_mistyped_option_names_the_nearest(dqrm: Run) -> None:
    result = dqrm("train", "--confg", "x")
    assert result.exit_code == 2
    assert "--config" in result.stderr


class _Trouble(RuntimeError):
    """An error of dqrm's own kind."""


_Trouble.__module__ = "dqrm.training.loop"


def _raising(error: BaseException) -> RootGroup:
    class Failing(RootGroup):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
            return fail

    @click.command("fail", cls=DqrmCommand)
    def fail() -> None:
        raise error

    return Failing("dqrm", lazy={})


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("data.path: no such folder"), 2, "Error: data.path: no such folder"),
        (
            FileNotFoundError(2, "No such file or directory", "x.txt"),
            2,
            "Error: x.txt: No such file",
        ),
        (FileNotFoundError("x.yaml: no such file"), 2, "Error: x.yaml: no such file"),
        (PermissionError(13, "Permission denied", "x.txt"), 1, "Error: x.txt: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "device; free some space"),
        (ConnectionError("http://x does not answer"), 1, "Error: http://x does not answer"),
        (MemoryError(), 1, "dqrm train --dry-run"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate"), 1, "not enough memory"),
        (_Trouble("the loss became nan"), 1, "Error: the loss became nan"),
        (EOFError("Compressed file ended"), 1, "ended too early: Compressed file ended"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.UsageError("no"), 2, "Error: no"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_become_one_message_and_a_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        _raising(error).main(["fail"])
    assert ended.value.code == code
    text = capsys.readouterr()
    assert message in text.err
    assert "Traceback" not in text.err
    assert text.out == ""
    if not isinstance(error, KeyboardInterrupt):
        with pytest.raises(SystemExit) as ended:
            _raising(error).main(["--debug", "fail"])
        assert ended.value.code == code
        assert "Traceback" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            _raising(error).main(["fail", "--debug"])
        assert "Traceback" in capsys.readouterr().err


def test_a_defect_shows_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _raising(TypeError("not our day")).main(["fail"])
    assert ended.value.code == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "please report" in text


def test_a_reader_that_leaves_is_not_an_error() -> None:
    # `dqrm config --fields | head -1`
    producer = subprocess.Popen(
        [sys.executable, "-m", "dqrm", "config", "--schema"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert producer.stdout is not None
    assert producer.stderr is not None
    producer.stdout.close()
    assert producer.stderr.read() == ""
    producer.wait()


def test_module_and_script_are_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dqrm", "train", "optm.lr=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "Error: optm: unknown key; did you mean optim?\n"


def test_interrupting_a_process_gives_130() -> None:
    code = (
        "import os, signal, sys, time\n"
        "import click\n"
        "from dqrm.cli.framework import DqrmCommand, RootGroup\n"
        "group = RootGroup('dqrm', lazy={})\n"
        "@click.command('wait', cls=DqrmCommand)\n"
        "def wait():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "group.get_command = lambda ctx, name: wait\n"
        "group.main(['wait'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 130
    assert text.split() == ["interrupted"]


@pytest.mark.parametrize(
    ("verbosity", "rank", "shown"),
    [
        (-1, None, ["warning: careful"]),
        (0, None, ["at work", "warning: careful"]),
        (1, None, ["details", "at work", "careful"]),
        (0, "0", ["at work", "warning: careful"]),
        (0, "3", ["warning: [rank 3] careful"]),
    ],
    ids=["quiet", "plain", "verbose", "rank-0", "rank-3"],
)
def test_what_the_log_shows(
    capsys: pytest.CaptureFixture[str], verbosity: int, rank: str | None, shown: list[str]
) -> None:
    if rank is None:
        os.environ.pop("RANK", None)
    else:
        os.environ["RANK"] = rank
    logs.set_up(verbosity)
    log = logging.getLogger("dqrm.somewhere")
    log.debug("details")
    log.info("at work")
    log.warning("careful")
    text = capsys.readouterr()
    assert text.out == ""
    lines = text.err.splitlines()
    assert len(lines) == len(shown)
    for line, end in zip(lines, shown, strict=True):
        assert line.endswith(end)
        assert line == end or verbosity == 1


def test_exit_codes_are_the_documented_ones() -> None:
    codes = {code.name: code.value for code in errors.ExitCode}
    assert codes == {"DONE": 0, "FAILED": 1, "USAGE": 2, "GATE_NOT_MET": 3, "INTERRUPTED": 130}


def test_files_are_written_where_the_shell_stands(dqrm: Run, tmp_path: Path) -> None:
    assert dqrm("config").exit_code == 0
    assert list(tmp_path.iterdir()) == []
