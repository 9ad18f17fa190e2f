"""``dqrm doctor``: what a bug report needs, and what to mend."""

import json

import click

from dqrm.cli.errors import ExitCode
from dqrm.cli.framework import DqrmCommand

_MARKS = {"ok": " ", "note": "-", "problem": "!"}


@click.command(
    "doctor",
    cls=DqrmCommand,
    examples=[
        ("dqrm doctor", "what will be used, why, and a fix for each problem"),
        ("dqrm doctor --json > machine.json", "the same for a bug report or a script"),
    ],
)
@click.option("--tracking-uri", metavar="URI", help="MLflow store to check.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(tracking_uri: str | None, as_json: bool) -> int:
    """Show what this machine offers and what will be used.

    Lines marked "-" cost speed or a feature, lines marked "!" keep something from working; each
    has a fix. The exit code is 1 when there is a "!".
    """
    from dqrm.doctor import as_dicts, examine
    from dqrm.runtime import prepare_threads

    prepare_threads()
    findings = examine(tracking_uri)
    if as_json:
        click.echo(json.dumps(as_dicts(findings), indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        section = None
        for finding in findings:
            if finding.section != section:
                section = finding.section
                click.echo(section)
            click.echo(f"{_MARKS[finding.level]} {finding.name:<{width}}  {finding.value}")
            if finding.fix is not None:
                click.echo(f"  {'':<{width}}  fix: {finding.fix}")
    broken = any(finding.level == "problem" for finding in findings)
    return ExitCode.FAILED if broken else ExitCode.DONE
