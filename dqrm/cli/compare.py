"""``dqrm compare``: runs side by side."""

import shlex
import shutil
import sys
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from dqrm.cli.framework import DqrmCommand
from dqrm.cli.outputs import OutputFile

_RUNS = Path("runs")

_EXAMPLES = [
    ("dqrm compare fp32 int4", "two runs, by the names of their folders"),
    ("dqrm compare runs/* --html report.html", "with pictures, in one file for a browser"),
    ("dqrm compare --experiment census --best 5", "the best of an MLflow experiment"),
    ("dqrm compare --best 3 --by test/log_loss --log", "the report goes into MLflow as well"),
]


class _RunName(click.ParamType[str, str]):
    """A run; completes the names under ``runs``, and paths."""

    name = "run"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        found = sorted(path.parent.name for path in _RUNS.glob("*/config.yaml"))
        names = [CompletionItem(name) for name in found if name.startswith(incomplete)]
        return names or [CompletionItem(incomplete, type="dir")]


@click.command("compare", cls=DqrmCommand, examples=_EXAMPLES)
@click.argument("words", nargs=-1, type=_RunName(), metavar="[RUN]...")
@click.option("--experiment", metavar="NAME", help="MLflow experiment the runs are in.")
@click.option(
    "--best", type=click.IntRange(min=1), metavar="N", help="The best N runs, instead of RUN."
)
@click.option(
    "--by",
    metavar="METRIC",
    default="best/val_auc",
    show_default=True,
    help="Metric that --best sorts by.",
)
@click.option("--tracking-uri", metavar="URI", help="MLflow store or server the runs are in.")
@click.option("--html", "html", type=OutputFile(), metavar="FILE", help="Write a report.")
@click.option("--json", "json_", type=OutputFile(), metavar="FILE", help="Write all as JSON.")
@click.option("--log", is_flag=True, help="Record table and report in MLflow, as a run.")
def compare(
    words: tuple[str, ...],
    experiment: str | None,
    best: int | None,
    by: str,
    tracking_uri: str | None,
    html: Path | None,
    json_: Path | None,
    log: bool,
) -> None:
    """Show runs side by side: metrics, settings that differ, pictures.

    RUN is a folder, the name of a run, its MLflow id, or a unique beginning of these; a pipeline's
    folder stands for its stages. Runs that differ in the seed only are one line of means.
    """
    if bool(words) == (best is not None):
        raise click.UsageError("name runs, or let --best N choose them")

    from dqrm.comparison.differences import grouped
    from dqrm.comparison.find import Finder
    from dqrm.comparison.report import Report

    finder = Finder(tracking_uri, experiment)
    runs = finder.find(words) if best is None else finder.best(by, best)
    report = Report(runs, grouped(runs), _command())
    click.echo(report.text(shutil.get_terminal_size().columns), nl=False)
    if html is not None:
        report.write_html(html)
        click.echo(f"\nreport in {html}")
    if json_ is not None:
        report.write_json(json_)
    if log:
        from dqrm.comparison.recording import record_report

        folder, run = record_report(report, tracking_uri, experiment)
        if run is None:
            click.echo(f"\nin {folder}; not in MLflow yet: dqrm tracking sync {folder}")
        else:
            click.echo(f"\nrecorded in {folder} and as MLflow run {run.run_id} in {run.uri}")


def _command() -> str:
    return shlex.join(["dqrm", *sys.argv[1:]])
