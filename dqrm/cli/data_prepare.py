"""``dqrm data prepare``: raw rows to a prepared data set."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dqrm.cli.framework import DqrmCommand
from dqrm.cli.options import OverrideType, config_option
from dqrm.text import bytes_text, pairs, seconds_text

if TYPE_CHECKING:
    from dqrm.data.prepare import PrepareReport

PREPARE_MODEL = "dqrm.data.config:PrepareConfig"

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.DOTALL)

_EXAMPLES = [
    ("dqrm data prepare train.txt -o prepared/kaggle", "Criteo Kaggle, 80/10/10 by chance"),
    (
        "dqrm data prepare day_0.gz day_1.gz -o prepared/tb split.by=file 'split.test=[day_1*]'",
        "Criteo Terabyte, the last day for the test",
    ),
    (
        "dqrm data prepare today.parquet -o prepared/today --base prepared/yesterday",
        "columns and ids of an earlier data set; new values get ids after them",
    ),
    (
        "dqrm data prepare clicks.csv -o prepared/clicks --config clicks.yaml min_frequency=5",
        "your own columns, described in a file; `dqrm config --for prepare` writes a first one",
    ),
]


class SourceOrOverride(OverrideType):
    """A file, or ``key=value``."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Take the text as it is; `split_arguments` tells files from overrides."""
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        """Complete files, and keys once something is typed that begins one."""
        keys = super().shell_complete(ctx, param, incomplete) if incomplete else []
        return keys or [click.shell_completion.CompletionItem(incomplete, type="file")]


def split_arguments(arguments: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Files and overrides, each in order. A file that exists is a file, whatever its name."""
    files: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        is_override = _OVERRIDE.fullmatch(argument) and not Path(argument).exists()
        (overrides if is_override else files).append(argument)
    return files, overrides


@click.command("prepare", cls=DqrmCommand, examples=_EXAMPLES)
@click.argument(
    "arguments", nargs=-1, type=SourceOrOverride(PREPARE_MODEL), metavar="FILE... [KEY=VALUE]..."
)
@config_option()
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder to write; train on it with data.path.",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Prepared data set whose ids are kept; its columns too, unless --config says them.",
)
@click.option(
    "--growth",
    type=click.Choice(["append", "none"]),
    default="append",
    show_default=True,
    help="With --base: values it does not know get ids after all of its own, or none.",
)
@click.option("--overwrite", is_flag=True, help="Drop what the folder holds, finished or not.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def prepare(
    arguments: tuple[str, ...],
    source: str | None,
    output: Path,
    base: Path | None,
    growth: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn raw rows into a data set to train on.

    Files are Criteo logs, CSV, TSV or Parquet (format=...), text plain or compressed with gzip
    or zstd. Values come from the defaults, then --config, then KEY=VALUE overrides; `dqrm config
    --for prepare --fields` lists the keys. When stopped or killed, the same command continues.
    """
    from dqrm.data.pool import use_one_thread

    use_one_thread()
    from dqrm.cli.progress import ProgressDisplay
    from dqrm.configuration import load
    from dqrm.data.config import PrepareConfig
    from dqrm.data.prepare import prepare as run

    files, overrides = split_arguments(arguments)
    begins_with = None
    if base is not None:
        from dqrm.data.base import base_of, inherited, require_same_features
        from dqrm.yaml_text import dump_value

        begins_with, manifest = base_of(base, grows=growth == "append")
        if source is None:
            given = [f"{key}={dump_value(value)}" for key, value in inherited(manifest).items()]
            overrides = [*given, *overrides]
    config = load(PrepareConfig, source, overrides)
    if begins_with is not None:
        require_same_features(config.resolved_schema, manifest.schema_, str(base))
    if not files:
        raise click.UsageError("name at least one file to prepare")
    with ProgressDisplay() as display:
        report = run(
            files,
            output,
            config,
            base=begins_with,
            overwrite=overwrite,
            progress=lambda p: display.show(p.phase, p.done, p.total, p.unit),
        )
    print_report(report, as_json)


def print_report(report: "PrepareReport", as_json: bool) -> None:
    """Print what a preparation did and what it cost."""
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2, default=str))
        return
    splits = ", ".join(f"{rows:,} {name}" for name, rows in report.split_rows.items())
    rows = [
        ("data set", str(report.path)),
        ("digest", report.digest),
        ("rows", f"{report.rows:,} read: {splits}"),
        ("malformed", f"{report.malformed:,} lines left out"),
        ("time", f"{seconds_text(report.wall_seconds)}, {report.cpu_seconds:.1f} CPU seconds"),
        (
            "memory",
            f"{bytes_text(report.peak_bytes)} at most, "
            f"bound {bytes_text(report.memory_bound_bytes)}",
        ),
    ]
    if report.new_ids:
        rows.insert(4, ("new ids", f"{sum(report.new_ids.values()):,} values not in the base"))
    if report.split_rows.get("train"):
        rows.append(("train on it", f"dqrm train data.path={report.path}"))
    else:
        rows.append(("measure on it", f"dqrm eval RUN --data {report.path}"))
    click.echo(pairs(rows))
    for example in report.malformed_examples:
        click.echo(f"malformed: {example}", err=True)
